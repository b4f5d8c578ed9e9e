"""Values that a batch of edits wants at the subject's last token, and the keys that recall them.

What ROME, MEMIT and their successors do before they solve (Meng et al. 2022, eq. 4; 2023, eq. 16):
the value z of an edit starts from the state of its bare prompt and moves, by Adam, to where the
target follows the prompt behind every prefix, without changing what the subject is.

Deviations from the released code (LyapLock, MEMIT, AlphaEdit: `compute_z.py`, `compute_ks.py`):
    - All edits of a batch move together, and nothing that cannot change is run twice. Values are
      the same but for rounding, and so are the numbers of steps.
    - Prefixes are written without special tokens, so that none has a second BOS.

Legend: E edits, B rows, N target tokens, V vocabulary, D width of a value, F width of a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from editkit.descend import descend_rows
from editkit.edits import Edit
from editkit.lm.editable import EditableLM
from editkit.lm.prefixes import strip_braces
from editkit.lm.row_states import RowStates, Shortcuts
from editkit.lm.shortcuts import find_shortcuts
from editkit.lm.sites import Site, find_blocks
from editkit.lm.subject_rows import encode_edits, shared_leads
from editkit.methods.value_search import ValueLoss, ValueSearch
from editkit.parallel import ranks_of

Weights = Literal["halves", "flat", "bare"]


@dataclass(frozen=True)
class Values:
    """What a search found, on the model's device, fp32 where nothing else is said.

    Args:
        z_DE: Values wanted.
        init_DE: Values before: the states (or MLP outputs) of the bare prompts.
        nll_E: Target NLL at each edit's last pass, mean over the contexts, nats per token.
        kl_E: KL term at that pass, weighted.
        decay_E: Weight-decay term at that pass, weighted.
        passes_E: Forward passes each edit took part in, int64; one more than its Adam steps.
        stopped_E: Whether it stopped by its loss or by rank, bool.
    """

    z_DE: Tensor
    init_DE: Tensor
    nll_E: Tensor
    kl_E: Tensor
    decay_E: Tensor
    passes_E: Tensor
    stopped_E: Tensor

    @property
    def loss_E(self) -> Tensor:
        """Total loss at each edit's last pass."""
        return self.nll_E + self.kl_E + self.decay_E


class SubjectRows:
    """A batch of edits behind every prefix, run once up to the layer whose value is wanted.

    Call in this order: `find_values`, then for each site from the lowest to the highest `keys`,
    `states`, and the solve that writes into the site's layer.

    Args:
        lm: Model to edit, with the edits as they stand.
        edits: Edits of one batch, each with a subject.
        prefixes: Texts as `make_prefixes` returns them, or templates that end in {}; the bare
            prompt is added.
        sites: Linear layers to edit, in ascending order of block.
        value_layer: Block whose value is wanted.
        value_at: `block` for the block's output (MEMIT), `mlp` for the output of the last site
            (ROME).
        weights: `halves` weighs the bare prompt by 1/2 and the others together by 1/2 (MEMIT),
            `flat` weighs all alike (ROME).
        micro_batch: Edits whose rows run together.
        kl_prompt: Text that must not change its meaning, with {} for the subject.
        shortcuts: What to run once only; none finds out what the model can take.

    Raises:
        ValueError: If there are no edits, an edit has no subject, its subject is not in its
            prompt, a row is too long, or the sites are not in order below the value.
    """

    def __init__(
        self,
        lm: EditableLM,
        edits: Sequence[Edit],
        prefixes: Sequence[str],
        sites: Sequence[Site],
        value_layer: int,
        value_at: Literal["block", "mlp"] = "block",
        weights: Weights = "halves",
        micro_batch: int = 50,
        kl_prompt: str = "{} is a",
        shortcuts: Shortcuts | None = None,
    ) -> None:
        is_inside = value_at == "mlp"
        _check(sites, value_layer, is_inside)
        if not edits or micro_batch < 1:
            raise ValueError(f"{len(edits)} edits in groups of {micro_batch}; both need 1 or more")
        self.lm = lm
        self.ranks, self.count = ranks_of(lm.model), len(edits)
        own = self.ranks.own(self.count)  # the rows of these run here
        self.edits = list(edits[own])
        self.weights = weights
        blocks, _ = find_blocks(lm.model)
        path = sites[-1].path if is_inside else f"{blocks}.{value_layer}"
        first = value_layer if is_inside else value_layer + 1
        rows = encode_edits(lm, edits, strip_braces(prefixes), kl_prompt)
        self.shortcuts = shortcuts or find_shortcuts(lm, rows[0], sites[0], path, first)
        leads, rows = shared_leads(rows), rows[own]
        self.groups = [
            RowStates(lm, rows[i : i + micro_batch], leads, sites[0], path, first, self.shortcuts)
            for i in range(0, len(rows), micro_batch)
        ]

    def find_values(self, search: ValueSearch) -> Values:
        """Search for the values z of all edits.

        Raises:
            ValueError: If the loss of an edit is not finite.
        """
        found, terms = [], []
        edits = iter(self.edits)
        for group in self.groups:
            names = [f"edit {edit.id}" for edit in islice(edits, group.n_edits)]
            loss = ValueLoss(group, search)
            start_ED = torch.zeros_like(group.init_ED)
            found.append(descend_rows(start_ED, loss, search.steps, search.lr, names.__getitem__))
            terms.append(loss.terms_3E)
        init_ED = self._of_all([group.init_ED for group in self.groups])
        delta_ED = self._of_all([part.found_BD for part in found])
        nll_E, kl_E, decay_E = self._of_all([terms_3E.T for terms_3E in terms]).T
        return Values(
            z_DE=(init_ED + delta_ED).T,
            init_DE=init_ED.T,
            nll_E=nll_E,
            kl_E=kl_E,
            decay_E=decay_E,
            passes_E=self._of_all([part.calls_B for part in found]),
            stopped_E=self._of_all([part.stopped_B for part in found]),
        )

    def keys(self, site: Site, weights: Weights | None = None) -> Tensor:
        """Return the keys [F, E] of a site under the edits as they stand, fp32.

        Args:
            site: One of `sites`, not below the site asked for last.
            weights: The constructor's by default; `bare` takes the bare prompts alone.
        """
        return self._of_all([
            _weighted(group.keys(site), group.each, weights or self.weights)
            for group in self.groups
        ]).T  # fmt: skip

    def states(self) -> Tensor:
        """Return the values [D, E] of the bare prompts under the edits as they stand, fp32.

        Before anything is written they are `init_DE` of the values.
        """
        return self._of_all([group.values() for group in self.groups]).T

    def _of_all(self, parts: list[Tensor]) -> Tensor:
        """Return the rows of all edits, those of other devices included."""
        return self.ranks.gather(torch.cat(parts), self.count)


def _check(sites: Sequence[Site], value_layer: int, is_inside: bool) -> None:
    """Refuse sites that are not in order, or not below the value."""
    layers = [site.layer for site in sites]
    if not layers or layers != sorted(set(layers)) or layers[-1] > value_layer:
        raise ValueError(
            f"sites in blocks {layers} with the value at block {value_layer}: give one or more in "
            "ascending order, none above the value"
        )
    if is_inside and layers != [value_layer]:
        raise ValueError(
            f"a value at an MLP's output is of one site, that of block {value_layer}, not {layers}"
        )


def _weighted(keys_BF: Tensor, each: int, weights: Weights) -> Tensor:
    """Return one key [E, F] per edit from those of its `each` contexts, the bare one first."""
    keys_ECF = keys_BF.float().unflatten(0, (-1, each))
    bare_EF = keys_ECF[:, 0]
    if weights == "bare" or each == 1:
        return bare_EF
    if weights == "flat":
        return keys_ECF.mean(1)
    return (bare_EF + keys_ECF[:, 1:].mean(1)) / 2
