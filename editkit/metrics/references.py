"""What the unedited model says: the yardstick of locality, asked once per probe and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from editkit.edits import Probe
from editkit.functional.scores import answers_match, cut_answer
from editkit.lm.editable import EditableLM
from editkit.metrics.ask import Question, ask
from editkit.metrics.protocol import EvalProtocol

PLACEHOLDER = "."  # forced where the unedited model answers nothing; only its place matters


@dataclass
class Reference:
    """The unedited model's side of one probe; None where not asked yet.

    Args:
        prompt: Prompt of the probe, to notice two probes of one id.
        target: Target of the probe.
        counted: Whether the unedited model meets the probe's conditions, where it has any.
        answer: Its free answer, cut at the first stop.
        argmax: Its most likely token at each position of the forced continuation.
    """

    prompt: str
    target: str | None
    counted: bool | None = None
    answer: str | None = None
    argmax: list[int] | None = None


def accepted_answers(probe: Probe) -> tuple[str, ...]:
    """Return the right answers of a probe, its target first; none where it has no target."""
    return () if probe.target is None else (probe.target, *probe.aliases)


class References:
    """The unedited model's answers by probe id: filled where missing, saved in checkpoints."""

    def __init__(self) -> None:
        self._decoding: dict[str, Any] = {}
        self._by_id: dict[str, Reference] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def counts(self, probe: Probe) -> bool:
        """Whether the unedited model meets the probe's conditions, so that its scores count."""
        return not probe.conditions or bool(self[probe].counted)

    def continuation(self, probe: Probe) -> str:
        """Return the text forced on the model: the target, else the unedited model's answer."""
        if probe.target is not None:
            return probe.target
        return self[probe].answer or PLACEHOLDER

    def __getitem__(self, probe: Probe) -> Reference:
        """Return a probe's reference, a new one where there is none.

        Raises:
            ValueError: If another probe has the same id.
        """
        reference = self._by_id.setdefault(probe.id, Reference(probe.prompt, probe.target))
        if (reference.prompt, reference.target) != (probe.prompt, probe.target):
            raise ValueError(
                f"probe id {probe.id!r} stands for {reference.prompt!r} -> {reference.target!r} "
                f"and for {probe.prompt!r} -> {probe.target!r}; ids must be unique in a run"
            )
        return reference

    @torch.no_grad()
    def fill(
        self, lm: EditableLM, probes: Sequence[Probe], protocol: EvalProtocol, batch_size: int
    ) -> None:
        """Ask the unedited model what these probes need and was not asked before.

        Args:
            lm: The model, edited or not.
            probes: Probes about to be scored.
            protocol: How to decode; one for the life of these references.
            batch_size: Rows per forward pass.

        Raises:
            ValueError: If the protocol decodes otherwise than the one that filled these before.
        """
        self._check(protocol)
        with lm.unedited():
            self._fill_counted(lm, probes, protocol, batch_size)
            local = [p for p in probes if p.kind == "locality" and self.counts(p)]
            unknown = [p for p in local if p.target is None and self[p].answer is None]
            self._fill_local(lm, unknown, protocol, batch_size, is_free=True)
            needed = [p for p in local if self._lacks(p, protocol)]
            self._fill_local(lm, needed, protocol, batch_size, protocol.is_free)

    def state_dict(self) -> dict[str, Any]:
        """Return all references as plain lists, texts and numbers."""
        return {
            "decoding": dict(self._decoding),
            "probes": {name: asdict(reference) for name, reference in self._by_id.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._decoding = dict(state["decoding"])
        self._by_id = {name: Reference(**kept) for name, kept in state["probes"].items()}

    def about(self, probes: Sequence[Probe]) -> dict[str, Reference]:
        """Return what is known of these probes, by id."""
        return {p.id: self._by_id[p.id] for p in probes if p.id in self._by_id}

    def take(self, known: dict[str, Reference], protocol: EvalProtocol) -> None:
        """Take over what another device asked, by this protocol."""
        self._check(protocol)
        self._by_id |= known

    def _check(self, protocol: EvalProtocol) -> None:
        """Refuse to mix answers that were decoded in different ways."""
        decoding = {"max_new_tokens": protocol.max_new_tokens, "stop": list(protocol.stop)}
        self._decoding = self._decoding or decoding
        if self._decoding != decoding:
            raise ValueError(
                f"references were decoded with {self._decoding}, the protocol says {decoding}; "
                "use the same protocol, or start from new References()"
            )

    def _fill_counted(
        self, lm: EditableLM, probes: Sequence[Probe], protocol: EvalProtocol, batch_size: int
    ) -> None:
        """Find the probes whose conditions the unedited model meets."""
        open_ones = [p for p in probes if p.conditions and self[p].counted is None]
        pairs = list(dict.fromkeys(pair for p in open_ones for pair in p.conditions))
        questions = [Question(prompt, right, accepted=(right,)) for prompt, right in pairs]
        met = {
            pair: answers_match(cut_answer(heard.answer or "", protocol.stop, pair[1]), pair[1])
            for pair, heard in zip(
                pairs, ask(lm, questions, protocol, batch_size, is_free=True), strict=True
            )
        }
        for probe in open_ones:
            self[probe].counted = all(met[pair] for pair in probe.conditions)

    def _lacks(self, probe: Probe, protocol: EvalProtocol) -> bool:
        """Whether a locality probe was not asked all that the protocol compares."""
        kept = self[probe]
        return (protocol.is_free and kept.answer is None) or (
            protocol.is_forced and kept.argmax is None
        )

    def _fill_local(
        self,
        lm: EditableLM,
        local: Sequence[Probe],
        protocol: EvalProtocol,
        batch_size: int,
        is_free: bool,
    ) -> None:
        """Note the unedited model's answer, and its likeliest tokens where a text is forced."""
        questions = []
        for p in local:
            is_unknown = p.target is None and self[p].answer is None
            draft = None if is_unknown else self.continuation(p)
            questions.append(Question(p.prompt, draft, accepted=accepted_answers(p)))
        heard = ask(lm, questions, protocol, batch_size, is_free)
        for probe, question, one in zip(local, questions, heard, strict=True):
            kept = self[probe]
            if kept.answer is None and one.answer is not None:
                kept.answer = cut_answer(one.answer, protocol.stop)
            if question.draft is not None:
                kept.argmax = list(one.argmax)
