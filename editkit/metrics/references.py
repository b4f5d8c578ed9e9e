"""What the unedited model says: the yardstick of locality, asked once per probe and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from editkit.edits import Probe
from editkit.functional.scores import answers_match, cut_answer
from editkit.lm.editable import EditableLM
from editkit.metrics.ask import forced_batches, free_answers
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
            self._fill_answers(lm, local, protocol, batch_size)
            if protocol.is_forced:
                self._fill_argmax(lm, local, batch_size)

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
        prompts, targets = [p for p, _ in pairs], [t for _, t in pairs]
        answers = free_answers(lm, prompts, targets, protocol, batch_size)
        met = {
            pair: answers_match(cut_answer(answer, protocol.stop, pair[1]), pair[1])
            for pair, answer in zip(pairs, answers, strict=True)
        }
        for probe in open_ones:
            self[probe].counted = all(met[pair] for pair in probe.conditions)

    def _fill_answers(
        self, lm: EditableLM, local: Sequence[Probe], protocol: EvalProtocol, batch_size: int
    ) -> None:
        """Let the unedited model answer freely where that is compared or continued."""
        needed = [p for p in local if protocol.is_free or p.target is None]
        needed = [p for p in needed if self[p].answer is None]
        prompts, targets = [p.prompt for p in needed], [p.target for p in needed]
        answers = free_answers(lm, prompts, targets, protocol, batch_size)
        for probe, answer in zip(needed, answers, strict=True):
            self[probe].answer = cut_answer(answer, protocol.stop)

    def _fill_argmax(self, lm: EditableLM, local: Sequence[Probe], batch_size: int) -> None:
        """Note the unedited model's most likely token at every forced position."""
        needed = [p for p in local if self[p].argmax is None]
        prompts, texts = [p.prompt for p in needed], [self.continuation(p) for p in needed]
        for rows, tokens in forced_batches(lm, prompts, texts, batch_size):
            argmax_N = lm.target_logits(tokens).argmax(-1)
            sizes = tokens.target_BT.sum(1).tolist()
            for row, ids_T in zip(rows, argmax_N.split(sizes), strict=True):
                self[needed[row]].argmax = ids_T.tolist()
