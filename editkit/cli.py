"""`editkit`: one program, one verb a job.

`fit`, `validate`, `test` and `predict` are Lightning's own command line with editkit's Trainer
defaults; the other verbs stand beside it in `editkit.verbs`.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError

from jsonargparse import CLI, ArgumentParser

from editkit import __version__, verbs

VERBS = {
    "inspect": verbs.inspect,
    "trace": verbs.trace,
    "generate": verbs.generate,
    "export": verbs.export,
    "lm-eval": verbs.lm_eval,
    "report": verbs.report,
}
TRAINER_VERBS = ("fit", "validate", "test", "predict")
USAGE = """usage: editkit VERB [options]      editkit VERB --help shows the options of a verb

  fit        apply a stream of edits and show what it did
  validate   ask the probes of an edited model again (also: test)
  predict    answer the probes' prompts with an edited model
  generate   answer a prompt with an edited model
  inspect    list a model's editable sites and propose layers
  trace      show which layers and tokens carry facts, and propose layers to edit
  export     write an edited model as a plain Hugging Face folder
  report     draw runs side by side in one HTML file
  lm-eval    measure general ability by lm-evaluation-harness, before and after editing

editkit --version shows the version; EDITKIT_TRACEBACK=1 the traceback behind an error.
"""


def plain(message: str) -> str:
    """Put a message on one line, and in a user's words what jsonargparse says of an option."""
    sentence = " ".join(message.split())
    if found := re.search(r"class_path '([^']+)': Option '([^']+)' is not accepted", sentence):
        cls, option = found.groups()
        return (
            f"option {option!r} is not accepted by {cls}; `editkit fit --model.help {cls}` or "
            f"`--data.help {cls}` lists its options"
        )
    if "NoneType" in sentence:
        return sentence.split(" - Expected a <class 'NoneType'>")[0]
    return "; ".join(line.strip() for line in message.splitlines() if line.strip())


def run_report(args: list[str]) -> None:
    """Run `report`, which takes any number of folders, one after another."""
    about = (verbs.report.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(prog="editkit report", description=about)
    what = "run folders; the first is the reference of the comparisons"
    parser.add_argument("runs", nargs="+", type=str, help=what)
    parser.add_function_arguments(verbs.report, skip={"runs"}, as_group=False)
    verbs.report(**parser.parse_args(args).as_dict())


def main(args: list[str] | None = None) -> int:
    """Run one verb and return its exit code; an error is one sentence on stderr."""
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["--version"]:
            sys.stdout.write(f"editkit {__version__}\n")
        elif given in ([], ["-h"], ["--help"]):
            sys.stdout.write(USAGE)
        elif not given[0].startswith("-") and given[0] not in (*TRAINER_VERBS, *VERBS):
            raise ValueError(
                f"no verb {given[0]!r}; there are {', '.join((*TRAINER_VERBS, *VERBS))}"
            )
        elif given and given[0] == "report":
            run_report(given[1:])
        elif given and given[0] in VERBS:
            CLI(VERBS[given[0]], args=given[1:], prog=f"editkit {given[0]}", as_positional=True)
        else:
            from editkit.trainer_cli import run_trainer

            run_trainer(args)
    except (ArgumentError, ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("EDITKIT_TRACEBACK"):
            raise
        if getattr(error, "is_told", False):  # by the first device
            return 1
        sentence = plain(str(error))
        if "unexpected pos" in sentence:  # torch's word for a file that it could not finish
            sentence = f"a checkpoint could not be written, is the disk full? ({sentence})"
        sys.stderr.write(f"editkit: error: {sentence}\n")
        return 2 if isinstance(error, ArgumentError) else 1
    return 0
