"""States of a batch's rows: once up to the value wanted, then upwards under the edits.

Rows of different edits begin alike behind the same prefix. What they share is their lead: it runs
once per prefix, and the rows run on their own tokens only, looking back at it.

Legend: B rows, E edits, T own tokens of a row, D width of a value, F width of a key, H hidden
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editkit.lm.editable import EditableLM
from editkit.lm.passes import Span, Watched, parts_of, run_spans
from editkit.lm.prefix_cache import PrefixCache
from editkit.lm.sites import Site
from editkit.lm.subject_rows import EditRows


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """What is left out of the passes. All on; a model that cannot take one goes without it.

    Args:
        below: The blocks below the change are run once.
        left: The tokens left of the place are run once, and what rows share once for all.
        head: The LM head sees the wanted tokens only.
        last: So does the MLP of the last block.
    """

    below: bool = True
    left: bool = True
    head: bool = True
    last: bool = True


class RowStates:
    """States of some edits' rows.

    The first pass runs whole rows up to the value, under the edits as they stand. Later ones go on
    from the block reached, under the edits as they stand then, with what can matter to a key: the
    contexts up to their places.

    Args:
        lm: Model.
        rows: Rows of the edits.
        leads: Ids that the rows of each lead begin with.
        site: Lowest site whose keys will be asked for.
        path: Module whose output at the place is the value, in the site's block or above it.
        first: Block from which a change of the value can be followed: the one of that module or,
            for a whole block's output, the next.
        shortcuts: What to leave out.
    """

    def __init__(
        self,
        lm: EditableLM,
        rows: Sequence[EditRows],
        leads: Sequence[list[int]],
        site: Site,
        path: str,
        first: int,
        shortcuts: Shortcuts,
    ) -> None:
        self.lm = lm
        self.path = path
        self.first = first
        self.shortcuts = shortcuts
        self.n_edits = len(rows)
        self.each = len(rows[0].contexts)
        self.leads = [Span(lead if shortcuts.left else [], 0) for lead in leads]
        self.rows = [row for edit in rows for row in edit.contexts] + [edit.anchor for edit in rows]
        starts = [len(self.leads[row.lead].ids) for row in self.rows]
        self.places = [row.place - start for row, start in zip(self.rows, starts, strict=True)]
        self.spans = [
            Span(row.ids[start:], start, row.lead)
            for row, start in zip(self.rows, starts, strict=True)
        ]
        contexts = range(self.n_edits * self.each)
        self.cut = [self.spans[b].upto(self.places[b] + 1) for b in contexts]
        self._start(site)

    def _start(self, site: Site) -> None:
        """Run leads through the model, and whole rows up to the value."""
        blocks, module = self.lm.blocks, self.lm.model.get_submodule(self.path)
        reached = self._reached(site)
        self.lead_cache, lead_TH = self._run_leads(0, None, [*reached[:1], (blocks[-1], False)])
        is_inside = not any(module is block for block in blocks)
        kept = (blocks[self.first], True) if is_inside else (module, False)
        entering, keys, self.hidden_TH, values = self._run(
            self.spans, 0, None, self.lead_cache, [*reached, kept, (module, False)]
        )
        bare = range(0, len(self.cut), self.each)
        self.init_ED = torch.stack([values[b][self.places[b]] for b in bare]).float()
        self.writes = self._writes()
        self._reach(site, lead_TH, entering, keys)

    def keys(self, site: Site) -> Tensor:
        """Return a site's inputs [B, F] at the contexts' places; sites are asked for in order."""
        if site != self.site:
            block, reached = self.site.layer, self._reached(site)
            cache, lead_TH = self._run_leads(block, self.lead_TH, reached)
            entering, keys = self._run(self.cut, block, self.cut_TH, cache, reached)
            self._reach(site, lead_TH, entering, keys)
        return self.keys_BF

    def values(self) -> Tensor:
        """Return the values [E, D] of the bare prompts, fp32, from where the contexts stand."""
        if self._writes() == self.writes:
            return self.init_ED
        until, block = [(self.lm.model.get_submodule(self.path), False)], self.site.layer
        bare = slice(0, len(self.cut), self.each)
        cache, _ = self._run_leads(block, self.lead_TH, until)
        cut_TH = None if self.cut_TH is None else self.cut_TH[bare]
        (values,) = self._run(self.cut[bare], block, cut_TH, cache, until)
        return torch.stack([states[-1] for states in values]).float()

    def _reached(self, site: Site) -> list[Watched]:
        """Return what to watch on the way to a site: the entry of its block, and its input."""
        linear = self.lm.model.get_submodule(site.path)
        return [(self.lm.blocks[site.layer], True), (linear, True)]

    def _reach(
        self, site: Site, lead_TH: list[Tensor], entering_TH: list[Tensor], keys_TF: list[Tensor]
    ) -> None:
        """Note where leads and contexts stand now, and the keys at the contexts' places."""
        ends = [len(span.ids) for span in self.cut]
        self.site = site
        resume = self.shortcuts.below
        self.lead_TH = lead_TH if resume else None
        self.cut_TH = [h[:n] for h, n in zip(entering_TH, ends, strict=False)] if resume else None
        self.keys_BF = torch.stack([keys[n - 1] for keys, n in zip(keys_TF, ends, strict=False)])

    def _writes(self) -> list[int]:
        """Return how often each edit layer was written: what is not committed counts, too."""
        return [layer.writes for layer in self.lm.layers.values()]

    def _run_leads(
        self, block: int, hidden_TH: list[Tensor] | None, watched: list[Watched]
    ) -> tuple[PrefixCache | None, list[Tensor]]:
        """Run the leads; return their keys and values, and what was watched first."""
        lengths = torch.tensor([len(lead.ids) for lead in self.leads], device=self.lm.device)
        if not any(lead.ids for lead in self.leads):
            return None, []
        cache = PrefixCache(records=True)
        found = run_spans(self.lm, self.leads, block, hidden_TH, cache, watched)
        return cache.closed(lengths), found[0]

    def _run(
        self,
        spans: list[Span],
        block: int,
        hidden_TH: list[Tensor] | None,
        leads: PrefixCache | None,
        watched: list[Watched],
    ) -> list[list[Tensor]]:
        """Run spans behind their leads, in parts of like length."""
        found: list[list[Tensor]] = [[torch.empty(0)] * len(spans) for _ in watched]
        for picked in parts_of(self.lm, [len(span.ids) for span in spans]):
            part = [spans[b] for b in picked]
            part_TH = None if hidden_TH is None else [hidden_TH[b] for b in picked]
            cache = None if leads is None else leads.spread([span.lead for span in part])
            for out, states in zip(
                found, run_spans(self.lm, part, block, part_TH, cache, watched), strict=True
            ):
                for b, own in zip(picked, states, strict=True):
                    out[b] = own
        return found
