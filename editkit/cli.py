"""`editkit`: one program, one verb a job.

`fit`, `validate`, `test` and `predict` are Lightning's own command line with editkit's Trainer
defaults; the other verbs stand beside it in `editkit.verbs`.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError

from jsonargparse import auto_cli

from editkit import __version__, verbs

VERBS = {"inspect": verbs.inspect, "generate": verbs.generate, "export": verbs.export}


def main(args: list[str] | None = None) -> int:
    """Run one verb and return its exit code; an error is one sentence on stderr."""
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["--version"]:
            sys.stdout.write(f"editkit {__version__}\n")
        elif given and given[0] in VERBS:
            auto_cli(
                VERBS[given[0]], args=given[1:], prog=f"editkit {given[0]}", as_positional=True
            )
        else:
            from editkit.trainer_cli import run_trainer

            run_trainer(args)
    except (ArgumentError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("EDITKIT_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split())
        sys.stderr.write(f"editkit: error: {sentence}\n")
        return 2 if isinstance(error, ArgumentError) else 1
    return 0
