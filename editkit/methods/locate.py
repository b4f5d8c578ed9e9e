"""LocateThenEdit: write facts where the model recalls them, in closed form.

The family of ROME and MEMIT. A value that makes the model say the new answer is searched for at the
subject's last token, behind the last edited block; then each site from the lowest to the highest
takes its share of what is missing, by ridge regression on the keys it sees there.

A method says what holds its change back (`penalty`), whether it remembers its keys (`rules`) and,
where that is not all, how it solves (`solve`). With a queue, drift pulls the whole change back.

Legend: E edits of a batch, F layer input, D layer output.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from editkit.adapters.delta import DeltaLayer
from editkit.edits import Edit
from editkit.functional.grams import Batch
from editkit.functional.regression import NOT_KEPT, Regression, Rules
from editkit.functional.spectral import Penalty, stabilised
from editkit.lm.corpus import read_corpus
from editkit.lm.moments import second_moments
from editkit.lm.prefixes import planned_prefixes, strip_braces
from editkit.lm.sites import Site
from editkit.lm.subject_rows import check_edits, check_subjects
from editkit.methods.base import EditModule, UndoError
from editkit.methods.statistics import check_same, told_of
from editkit.methods.targets import SubjectRows, Values, ValueSearch, Weights
from editkit.methods.wordings import expanded

SEARCH = ValueSearch()


class LocateThenEdit(EditModule):
    """Base of the locate-then-edit family.

    Args:
        layers: Blocks whose down-projection is edited; none takes the model's causal layers.
        search: How the values are searched for.
        corpus: Text that edits must leave alone: a .txt, a .jsonl, a folder of them, or a dataset
            of the Hub; none takes the model's own corpus.txt, or Wikipedia.
        corpus_texts: Texts to read from it.
        corpus_tokens: Tokens to measure at most; none measures all.
        prefixes: Texts in front of the prompts while editing; none lets the model write them.
        cache: Folder for the measured moments; none takes ~/.cache/editkit.
    """

    one_by_one: ClassVar[bool] = False  # each edit of a batch sees those before it
    value_at: ClassVar[Literal["block", "mlp"]] = "block"
    prompt_weights: ClassVar[Weights] = "halves"
    prefix_plan: ClassVar[tuple[tuple[int, int], ...]] = ((5, 10),)  # numbers and lengths in tokens
    passing: ClassVar[tuple[str, ...]] = ("cache", "search.micro_batch")
    needs_past: ClassVar[bool] = False  # cannot go on without what it knew of earlier edits
    reads_weights: ClassVar[bool] = False  # computes with them, so none may lie packed

    def __init__(
        self,
        layers: list[int] | None = None,
        search: ValueSearch = SEARCH,
        corpus: str | None = None,
        corpus_texts: int = 100_000,
        corpus_tokens: int | None = None,
        prefixes: list[str] | None = None,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers, self.search = layers, search
        self.corpus, self.corpus_texts, self.corpus_tokens = corpus, corpus_texts, corpus_tokens
        self.prefixes, self.cache = prefixes, cache
        self.contexts = None if prefixes is None else tuple(strip_braces(prefixes))
        self.sites: list[Site] = []
        self.regressions: dict[str, Regression] = {}
        self.saved: dict[str, Any] = {}
        self.statistics: dict[str, Any] = {}  # corpus, its tokens, and what was added to moments
        self.known = 0  # edits that the regressions know of

    # what a method says

    @property
    def rules(self) -> Rules:
        """How this method treats its sites."""
        return Rules()

    @abstractmethod
    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return what holds a site's changes back, given the fp64 second moments of its keys."""

    def weight(self, count: int) -> float:
        """Return the weight V of a batch of `count` edits against the penalty."""
        return 1.0 if self.rules.queue is None else self.rules.queue.V

    def residual(
        self, rows: SubjectRows, values: Values, site: Site, keys_FE: Tensor, left: int
    ) -> Tensor:
        """Return a site's share [D, E] of what the values lack, with `left` sites to go."""
        return (values.z_DE - rows.states()) / left

    def solve(self, site: Site, keys_FE: Tensor, resid_DE: Tensor) -> Tensor:
        """Return the change [D, F] that moves a site's outputs for its keys by the residual.

        Args:
            site: Where to write.
            keys_FE: Keys of the batch, fp64.
            resid_DE: What the site's outputs for them lack, fp64.

        Raises:
            ValueError: If the solve is singular.
        """
        batch = Batch(self.ids, keys_FE, resid_DE, self._delta(site), self.weight(len(self.ids)))
        change_DF, self.drafts[site.path] = self.drafts[site.path].step(batch)
        return change_DF

    def settle(self) -> None:
        """Have the last word on the layers' scratch, once all sites are solved for."""

    @property
    def default_layers(self) -> list[int]:
        """Blocks to edit where none are named."""
        return self.lm.causal_layers

    def attach(self) -> None:
        """Wrap the down-projection of each layer."""
        chosen = self.default_layers if self.layers is None else self.layers
        if not chosen:
            raise ValueError("layers is empty; name at least one block, or none for the model's")
        self.sites = [self.lm.site(layer) for layer in sorted(set(chosen))]
        self.deltas = {s.path: self.lm.attach(s.path, DeltaLayer) for s in self.sites}

    def prepare(self) -> None:
        """Measure the keys' second moments and let the model write its prefixes."""
        if self.reads_weights:
            self.check_weights()
        cache = None if self.cache is None else Path(self.cache)
        corpus = read_corpus(self.corpus, self.corpus_texts, self.spec, cache=cache)
        check_same(corpus, self.statistics)
        found = second_moments(self.lm, self.sites, corpus, self.corpus_tokens, cache=cache)
        known = self.stream_state()["sites"]  # resumed, or prepared before on another device
        added: dict[str, float] = {}
        for site in self.sites:
            cov_FF, added[site.path] = stabilised(self._solvable(site, found[site.path].cov_FF))
            shape_oi, penalty = (site.out_features, site.in_features), self.penalty(site, cov_FF)
            begun = Regression.begin(self.rules, penalty, cov_FF, shape_oi, known.get(site.path))
            self.regressions[site.path] = begun
        self.statistics = told_of(corpus, found, added)
        if self.contexts is None:
            self.contexts = planned_prefixes(self.lm, self.prefix_plan, self.seed)

    def check(self, edits: list[Edit]) -> None:
        """Refuse edits without a subject in their prompt, and those too long for the model."""
        check_edits(self.lm, expanded(edits, self.paraphrases, 0), self.contexts or ())

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Search for the values of a batch and write them into the sites, all or nothing.

        Raises:
            ValueError: If an edit has no subject or diverges, or earlier ones are not known.
        """
        self._check(edits)
        self.drafts = dict(self.regressions)
        parts = [[edit] for edit in edits] if self.one_by_one else [edits]
        numbers = [self._edit_together(part) for part in parts]
        self._commit()
        self.known += len({edit.id for edit in edits})
        means = {name: sum(n[name] for n in numbers) / len(numbers) for name in numbers[0]}
        return means | {f"change/{s.layer}": self.deltas[s.path].moved for s in self.sites}

    def _edit_together(self, edits: list[Edit]) -> dict[str, float]:
        """Write a batch into the scratch of the edit layers."""
        rows = SubjectRows(
            self.lm, edits, self.contexts or (), self.sites, self.sites[-1].layer,
            self.value_at, self.prompt_weights, self.search.micro_batch,
        )  # fmt: skip
        values = rows.find_values(self.search)
        found = {"value_passes": values.passes_E, "stopped_early": values.stopped_E}
        numbers = {name: float(each_E.float().mean()) for name, each_E in found.items()}
        self.ids = tuple(edit.id for edit in edits)
        for i, site in enumerate(self.sites):
            keys_FE = self._solvable(site, rows.keys(site).float())
            resid_DE = self.residual(rows, values, site, keys_FE, len(self.sites) - i)
            self.deltas[site.path].stage(self.solve(site, keys_FE, self._solvable(site, resid_DE)))
            numbers[f"residual/{site.layer}"] = float(resid_DE.norm())
        self.settle()
        for site in self.sites:
            draft = self.drafts[site.path].settled(self._delta(site), len(set(self.ids)))
            self.drafts[site.path] = draft
            numbers |= {f"{k}/{site.layer}": v for k, v in draft.numbers().items()}
        return numbers

    @torch.no_grad()
    def undo(self, edit_id: int) -> None:
        """Take one edit out: fit the pairs of key and value that remain again, exactly."""
        self.drafts = {}
        for site in self.sites:
            regression, layer = self.regressions.get(site.path), self.deltas[site.path]
            reason = NOT_KEPT if regression is None else regression.why_not_undo(edit_id)
            if regression is None or reason:
                raise UndoError(f"{type(self).__name__} cannot undo edit {edit_id}: {reason}")
            delta_DF, self.drafts[site.path] = regression.without(edit_id, self._delta(site))
            layer.open()["delta"].copy_(delta_DF)
        self._commit()

    def found_args(self) -> dict[str, Any]:
        """Return the prefixes that the model wrote."""
        return {} if self.contexts is None else {"prefixes": list(self.contexts)}

    def stream_state(self) -> dict[str, Any]:
        """Return prefixes, past and queue of each site."""
        sites = {path: regression.state() for path, regression in self.regressions.items()}
        own = {"prefixes": self.contexts, "known": self.known, "statistics": self.statistics}
        return own | {"sites": sites or self.saved}

    def for_summary(self) -> dict[str, Any]:
        """Return which corpus the moments are of, for `summary.json`."""
        return {"corpus": self.statistics} if self.statistics else {}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take `stream_state` back; `prepare` puts it beside the statistics."""
        self.contexts, self.known, self.saved = state["prefixes"], state["known"], state["sites"]
        self.statistics, self.regressions = state.get("statistics", {}), {}  # older ones have none

    def _commit(self) -> None:
        """Take over what was written, and what is known of it."""
        for layer in self.deltas.values():
            layer.commit()
        self.regressions = self.drafts

    def _delta(self, site: Site) -> Tensor:
        """Return a site's change as it stands, fp64."""
        return self._solvable(site, self.deltas[site.path].value("delta").detach())

    def _solvable(self, site: Site, tensor: Tensor) -> Tensor:
        """Return a tensor in fp64 beside its site's weight, or on the CPU: MPS has no fp64."""
        device = self.deltas[site.path].delta.device
        return tensor.to("cpu" if device.type == "mps" else device).double()

    def _check(self, edits: list[Edit]) -> None:
        check_subjects(edits)
        rules, name = self.rules, type(self).__name__
        if self.known != self.edits_seen and (self.needs_past or rules.remembers or rules.queue):
            raise ValueError(
                f"{name} needs what it knew of all {self.edits_seen} edits so far, and a saved run "
                "does not keep that: go on from its checkpoint (--ckpt_path last)"
            )
