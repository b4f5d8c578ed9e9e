"""A language model, or any callable, that says whether a free answer is right; asked once.

A `Judge` gets cases (question, expected answers, answer) and returns a verdict for each. Verdicts
are kept on disk under a hash of the judge and the case, so that the same answer is never judged
twice, whichever run gave it. A judge that fails is an error that names the case; it never counts
as a wrong answer.

Judges at hand: `LocalJudge`, a model of one's own machine, and `CallableJudge`, any function; both
are named in YAML by class path, as a subclass of `Judge` written by a user is.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, final

import torch

from editkit.lm.editable import EditableLM
from editkit.lm.load import weight_hash
from editkit.lm.spec import LMSpec

CACHE = Path("~/.cache/editkit/verdicts")
FIELD = re.compile(r"\{(question|expected|answer)\}")

# after the binary grading of SimpleQA (Wei et al. 2024) and WILD (Yang et al. 2025, arXiv
# 2502.11177): an answer that contradicts itself or goes on repeating is not right
TEMPLATE = """\
Judge whether a model's answer to a question is correct.
The question or unfinished sentence: {question}
Correct answer: {expected}
The model's answer: {answer}
The answer is CORRECT if it states the correct answer, whatever the wording or case, and nothing
that contradicts it. It is INCORRECT if it states something else, states several different answers,
or repeats itself without end.
Reply with one letter: A for CORRECT, B for INCORRECT."""


class Case(NamedTuple):
    """What is judged: a question, its right answers with the target first, and a model's answer."""

    question: str
    expected: tuple[str, ...]
    answer: str


class JudgeError(ValueError):
    """A judge gave no verdict; the text names the case."""


class Judge(ABC):
    """Says whether free answers are right, and remembers what it said.

    Args:
        cache: Folder that verdicts are kept in.
    """

    def __init__(self, cache: Path = CACHE) -> None:
        self.cache = Path(cache).expanduser()

    @property
    def name(self) -> str:
        """What the verdicts depend on beside the case: they are kept under it and stamped by it."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @abstractmethod
    def judge(self, cases: Sequence[Case]) -> list[bool]:
        """Return whether each answer is right.

        Raises:
            JudgeError: If a case cannot be judged.
        """

    @final
    def verdicts(self, cases: Sequence[Case]) -> list[bool]:
        """Return whether each answer is right; asks for what is not in the cache.

        Raises:
            JudgeError: If the judge fails, or does not return one truth value a case.
        """
        open_ones = [case for case in dict.fromkeys(cases) if self._key(case) not in self._kept]
        if open_ones:
            found = self.judge(open_ones)
            if len(found) != len(open_ones) or not all(isinstance(v, bool) for v in found):
                raise JudgeError(
                    f"{self.name} returned {found!r:.80} for {len(open_ones)} cases; return one "
                    "True or False for each"
                )
            self._keep(dict(zip(open_ones, found, strict=True)))
        return [self._kept[self._key(case)] for case in cases]

    def _key(self, case: Case) -> str:
        return hashlib.sha256(json.dumps(case, ensure_ascii=False).encode()).hexdigest()

    @cached_property
    def _path(self) -> Path:
        return self.cache / f"{hashlib.sha256(self.name.encode()).hexdigest()[:16]}.jsonl"

    @cached_property
    def _kept(self) -> dict[str, bool]:
        """Verdicts by key; a line cut short by a crash is left out."""
        kept: dict[str, bool] = {}
        if self._path.exists():
            with self._path.open("rb") as file:  # as bytes: only "\n" ends a line, not U+2028
                for line in file:
                    try:
                        row = json.loads(line)
                    except ValueError:  # JSON or UTF-8 that stops in the middle
                        continue
                    kept[row["key"]] = row["verdict"]
        return kept

    def _keep(self, found: dict[Case, bool]) -> None:
        """Remember verdicts, and append them to the file in one write."""
        lines = [
            {"key": self._key(case), "judge": self.name, **case._asdict(), "verdict": verdict}
            for case, verdict in found.items()
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self._path.open("a+b") as file:  # a torn line of an earlier crash ends here
            file.seek(0, 2)
            torn = file.tell() > 0 and (file.seek(-1, 2), file.read())[1] != b"\n"
            file.write(("\n" if torn else "").encode() + text.encode())
        self._kept.update((self._key(case), verdict) for case, verdict in found.items())


class LocalJudge(Judge):
    """A causal LM on this machine, asked by a template; its reply starts with A (right) or B.

    Args:
        lm: The judging model; set `chat_template: true` for an instruct model.
        template: Text with the fields {question}, {expected} and {answer}; several right answers
            are joined by " or ".
        batch_size: Cases per forward pass.
        device: Such as `cpu` or `cuda`; None takes the GPU where there is one.
        cache: Folder that verdicts are kept in.
    """

    def __init__(
        self,
        lm: LMSpec,
        template: str = TEMPLATE,
        batch_size: int = 16,
        device: str | None = None,
        cache: Path = CACHE,
    ) -> None:
        super().__init__(cache)
        if missing := {"question", "expected", "answer"} - set(FIELD.findall(template)):
            raise ValueError(f"the judge's template lacks {sorted(missing)}: {template!r:.80}")
        self.spec, self.template = lm, template
        self.batch_size = batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def name(self) -> str:
        """Class, model, weights, chat template and template's hash."""
        if not Path(self.spec.path).is_dir():
            _ = self._lm  # a Hub id's files are there once it is loaded
        template = hashlib.sha256(self.template.encode()).hexdigest()[:12]
        weights = weight_hash(self.spec)[:12]
        chat = "chat" if self.spec.chat_template else "plain"
        return f"{super().name}({self.spec.id}, {weights}, {chat}, template {template})"

    def judge(self, cases: Sequence[Case]) -> list[bool]:
        """Ask the model; a reply that begins with neither letter is an error."""
        found: list[bool] = []
        for start in range(0, len(cases), self.batch_size):
            part = cases[start : start + self.batch_size]
            replies = self._lm.generate([self._text(case) for case in part], max_new_tokens=4)
            found += [_verdict(reply, case) for reply, case in zip(replies, part, strict=True)]
        return found

    @cached_property
    def _lm(self) -> EditableLM:
        return EditableLM.load(self.spec).to(self.device)

    def _text(self, case: Case) -> str:
        values = {
            "question": case.question,
            "expected": " or ".join(case.expected),
            "answer": case.answer,
        }
        return FIELD.sub(lambda field: values[field[1]], self.template)


class CallableJudge(Judge):
    """Any function of (question, expected answers, answer) that returns True or False.

    Args:
        path: Where it is imported from, such as `my_package.grading.is_right`.
        cache: Folder that verdicts are kept in; give each version of the function its own.
    """

    def __init__(self, path: str, cache: Path = CACHE) -> None:
        super().__init__(cache)
        module, _, name = path.rpartition(".")
        try:
            self.function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"no judge {path!r}: {error}") from error
        if not callable(self.function):
            raise ValueError(f"judge {path!r} is a {type(self.function).__name__}, not a function")
        self.path = path

    @property
    def name(self) -> str:
        """Class and path of the function."""
        return f"{super().name}({self.path})"

    def judge(self, cases: Sequence[Case]) -> list[bool]:
        """Call the function on each case."""
        return [self.function(case.question, case.expected, case.answer) for case in cases]


def _verdict(reply: str, case: Case) -> bool:
    """Read A or B."""
    letter = reply.strip().strip("*(\"'")[:2].rstrip(".):*, \n\"'")
    if letter not in ("A", "B"):
        raise JudgeError(
            f"the judge replied {reply!r} to {case.question!r} -> {case.answer!r}, neither A nor "
            "B; take a model that follows instructions, or set chat_template: true"
        )
    return letter == "A"
