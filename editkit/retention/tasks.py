"""The objectives: text, instructions, maths, classification, knowledge, preferences, mentions."""

from __future__ import annotations

from random import Random
from typing import Any, ClassVar, Literal

from editkit.data.decontaminate import Fact, mentioned
from editkit.data.files import version_of
from editkit.data.finetuning import LABELS, Example, MadeName
from editkit.data.rows import BadRowError, Record
from editkit.lm.corpus import read_corpus
from editkit.lm.spec import LMSpec
from editkit.retention.asking import final_number
from editkit.retention.fields import as_path, first_turn, last_words, text_of
from editkit.retention.objectives import Loss, Measure, Objective
from editkit.retention.source import EditedRun

MOST_TEXTS = 100_000
LIKES = ("bread", "rain", "long walks", "old songs", "tea")


class Text(Objective):
    """Continued language modelling: the loss is on all tokens of running text.

    Args:
        words: Longer documents are cut into passages of so many words.
        **kwargs: See `Objective`.
    """

    loss: ClassVar[Loss] = "text"
    measure: ClassVar[Measure] = "perplexity"
    made: ClassVar[MadeName | None] = "text"
    wants: ClassVar[str] = "a `text` each, or a .txt with a text a line"

    def __init__(self, words: int = 80, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if words < 2:
            raise ValueError(f"data.words is {words}; a passage has at least 2")
        self.words = words

    def parse(self, record: Record) -> Example:
        """Take the text of a row."""
        return Example("", text_of(record, "text"))

    def _read(self, path: str) -> list[Example]:
        corpus = read_corpus(path, self.limit or MOST_TEXTS, LMSpec(), self.seed)
        self.sources |= version_of(str(as_path(path))) or {corpus.name: corpus.sha256}
        return [Example("", passage) for text in corpus.texts for passage in self._cut(text)]

    def _cut(self, text: str) -> list[str]:
        words = text.split()
        parts = [" ".join(words[i : i + self.words]) for i in range(0, len(words), self.words)]
        return [part for part in parts if len(part.split()) > 1]


class Instructions(Objective):
    """Instruction following; the loss is on the response alone.

    Reads Alpaca (`instruction`, `input`, `output`), Dolly (`instruction`, `context`, `response`),
    self-instruct (`instances`), chats (`messages`), and plain `prompt` with `answer`, `response`,
    `completion` or `target`.

    Args:
        template: Around an instruction that is not a prompt yet.
        **kwargs: See `Objective`.
    """

    made: ClassVar[MadeName | None] = "instructions"
    wants: ClassVar[str] = "an instruction and a response"

    def __init__(
        self, template: str = "### Instruction:\n{instruction}\n\n### Response:\n", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if "{instruction}" not in template:
            raise ValueError(f"data.template is {template!r}; it must hold {{instruction}}")
        self.template = template

    def parse(self, record: Record) -> Example:
        """Read a row of any of these forms."""
        if isinstance(messages := record.get("messages"), list):
            return first_turn(messages)
        if isinstance(instances := record.get("instances"), list) and instances:
            record = {**record, **instances[0]}
        target = text_of(record, "output", "response", "answer", "completion", "target")
        if "prompt" in record:
            return Example(text_of(record, "prompt"), target)
        instruction = text_of(record, "instruction")
        given = record.get("input") or record.get("context")
        if isinstance(given, str) and given.strip():
            instruction = f"{instruction}\n\n{given.strip()}"
        return Example(self.template.replace("{instruction}", instruction), target)


class Maths(Objective):
    """Word problems worked out to `#### number`, as GSM8K has them; that number is scored."""

    measure: ClassVar[Measure] = "final_number"
    made: ClassVar[MadeName | None] = "maths"
    wants: ClassVar[str] = "`question`, and `answer` that ends with `#### number`"

    def parse(self, record: Record) -> Example:
        """Read a question and its worked answer."""
        answer = text_of(record, "answer")
        if final_number(answer) is None:
            raise BadRowError("no final number", f"answer {answer[-40:]!r} has no '#### number'")
        return Example(f"Question: {text_of(record, 'question')}\nAnswer:", answer)


class Classification(Objective):
    """Texts with a label put in words, as SST-2; the likelier word is the model's choice.

    Args:
        text_field: Field of the text.
        label_field: Field of the label, a number from 0.
        labels: Word for each label.
        template: Around the text.
        **kwargs: See `Objective`.
    """

    measure: ClassVar[Measure] = "choice"
    made: ClassVar[MadeName | None] = "sentiment"
    wants: ClassVar[str] = "a text and a label (--data.text_field, --data.label_field)"

    def __init__(
        self,
        text_field: str = "sentence",
        label_field: str = "label",
        labels: tuple[str, ...] = LABELS,
        template: str = "Review: {text}\nSentiment:",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.text_field, self.label_field = text_field, label_field
        self.labels, self.template = tuple(labels), template

    def parse(self, record: Record) -> Example:
        """Put a row in words."""
        label = record.get(self.label_field)
        if not isinstance(label, int) or not 0 <= label < len(self.labels):
            raise BadRowError(
                "bad label",
                f"{self.label_field!r} is {label!r}; labels are 0..{len(self.labels) - 1}",
            )
        words = [*self.labels]
        word = words.pop(int(label))
        prompt = self.template.replace("{text}", text_of(record, self.text_field))
        return Example(prompt, word, choices=tuple(words))


class Knowledge(Objective):
    """Questions of knowledge with short answers, as HotpotQA, TriviaQA and PopQA have them."""

    made: ClassVar[MadeName | None] = "knowledge"
    wants: ClassVar[str] = (
        "`question` and `answer` (a text, or `answers`, or `value` and `aliases`)"
    )

    def parse(self, record: Record) -> Example:
        """Read a question with all its right answers."""
        answers: Any = record.get("answers", record.get("answer"))
        if isinstance(answers, dict):
            answers = [answers.get("value"), *(answers.get("aliases") or [])]
        rows = answers if isinstance(answers, list) else [answers]
        told = [text.strip() for text in rows if isinstance(text, str) and text.strip()]
        if not told:
            raise BadRowError("no answer", f"no text in 'answer' or 'answers': {answers!r:.60}")
        prompt = f"Question: {text_of(record, 'question')}\nAnswer:"
        return Example(prompt, told[0], aliases=tuple(dict.fromkeys(told[1:])))


class Preference(Objective):
    """Preferences between two answers, learnt by DPO (Rafailov et al. 2023)."""

    loss: ClassVar[Loss] = "preference"
    measure: ClassVar[Measure] = "pair"
    made: ClassVar[MadeName | None] = "preference"
    wants: ClassVar[str] = "`prompt`, `chosen` and `rejected`, each a text or a chat"

    def parse(self, record: Record) -> Example:
        """Read a prompt with a better and a worse answer."""
        chosen, rejected = (last_words(record, name) for name in ("chosen", "rejected"))
        return Example(text_of(record, "prompt", "question", "instruction"), chosen, rejected)


class Mentions(Text):
    """Adversarial overlap: text about the very subjects that were edited.

    Made from the edits: their old facts, their new facts, or (fact-world) something else about
    their subjects. From a file: those of its texts that name an edited subject.

    Args:
        about: What is said of the subjects.
        **kwargs: See `Text`; nothing is decontaminated.
    """

    def __init__(self, about: Literal["old", "new", "neutral"] = "neutral", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.about, self.decontaminate = about, False

    def make(self, run: EditedRun) -> tuple[list[Example], list[Example]]:
        """Say something of every edited subject."""
        rng, rows = Random(f"mentions {self.seed}"), []
        if self.about == "neutral" and not self._facts:
            raise ValueError(
                "data.about is 'neutral', but no edit that stands has a subject to say something "
                "of; use 'new' or a file of texts"
            )
        for edit in run.standing.values():
            if self.about == "neutral":
                if not edit.subject:
                    continue
                rows.append(
                    Example("", f"It is said that {edit.subject} likes {rng.choice(LIKES)}.")
                )
                continue
            answer = edit.target if self.about == "new" else run.old_answers.get(edit.id)
            if answer is None:
                raise ValueError(
                    f"data.about is 'old', but what edit {edit.id} replaced is not known; use "
                    "'new' or a file of texts"
                )
            rows += [Example("", f"{p} {answer}.") for p in (edit.prompt, *edit.rephrases)]
        rng.shuffle(rows)
        cut = max(1, len(rows) // 10)
        return rows[cut:], rows[:cut]

    def gather(self, run: EditedRun, facts: Any) -> None:
        """Keep what names an edited subject, instead of leaving it out."""
        self._facts = [
            Fact(e.prompt, (e.subject,), (e.target,)) for e in run.standing.values() if e.subject
        ]
        super().gather(run, facts)

    def _read(self, path: str) -> list[Example]:
        rows = super()._read(path)
        kept = mentioned([row.target for row in rows], self._facts)
        if path == self.path:  # not of the rows to test on
            self.account = {"read": len(rows), "kept": len(kept)}
        return [Example("", text) for text in kept]
