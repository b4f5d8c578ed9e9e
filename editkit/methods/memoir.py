"""MEMOIR: each edit trains the columns that its prompt's mask names, and answers like prompts.

Source: Wang, Qin, Dimitriadis, Favero, Frossard, "MEMOIR: Lifelong Model Editing with Minimal
Overwrite and Informed Retention for LLMs", NeurIPS 2025 (arXiv 2506.07899); released code:
github.com/qym7/MEMOIR at d231b6c.

Equations: y_t = W_0 a_t + W_m (m ⊙ a_t) at one down-projection. The mask m(x) of a prompt is
TopHash: the k largest magnitudes of mean_t a_t - μ, sent through a fixed permutation
(`ResidualMemory.masks`, `gates`). An edit minimises the mean of -1/|y| log p(y | c x) over
contexts c by clipped SGD on W_m, whose gradient lives in the k columns of m. A prompt is answered
through the stored mask m_i that shares most ones with its own, where these are at least τ k of
them; otherwise the base model answers, bit for bit (`ResidualMemory.route`).

Deviations:
    - Weight decay is 0. The release decays all of W_m by 1e-5 at every step, which shrinks the
      first of 1,000 edits of 30 steps by a quarter. `compat` does so too, divides each row's loss
      by one token too many, and stops as the release does: once a loss of 0.02 has settled.
    - τ is calibrated: the lowest at which the memory answers at most `false_positives` of held-out
      unrelated prompts, found again as keys come. The paper has a constant per model, and unrelated
      prompts come ever closer to the nearest of N keys.
    - Several edits may be written in one step, each through its own mask and clipped by itself:
      with disjoint masks that is one after another; columns that several share move by the sum.
      The release takes one edit at a time.
    - An edited prompt is known by its text, not by bit-equality of masks. Edited again, it keeps
      its columns and changes its answer.
    - Padding is told by the attention mask, BOS counts in the mean as released (there is no option
      to leave it out); the twelfth, unused row of the release is dropped.

Beyond the paper: with `shield` s, an edit's gradient G is turned to G (1 + s C)^-1 before it is
clipped, C being the second moments of the masked inputs from which earlier answers are read, of
trace 1 for each edit (`Shield`, `functional.solve.turned_away`). Old answers then hardly move. An
edit undone stays in C; one made again is not held back by what it wrote. C costs F^2 fp32
(Llama-3-8B: 822 MB) and an edit k^3 / 3 operations.

Undo is exact where locality is concerned: the edit's keys go, its prompts are routed as if it had
never been made, to the base bit for bit where no other edit answers. The newest, made alone, also
leaves W_m bit for bit. What an older one wrote stays in columns that later edits trained on.

Costs: F / 8 bytes of mask per edit (Llama-3-8B: 1.8 kB); W_m once (235 MB fp32 there).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from editkit.adapters.keys import Routing
from editkit.adapters.residual import ResidualMemory
from editkit.edits import Edit
from editkit.lm.openings import shared_prompts
from editkit.lm.rows import SiteRows
from editkit.methods.base import UndoError
from editkit.methods.column_search import RELEASED_DECAY, descend_columns
from editkit.methods.memory import MemoryEdit, text_hashes, wordings
from editkit.methods.wordings import as_asked, undisputed

PUBLISHED = Routing()
Rephrases = tuple[list[int], list[int], Tensor]  # their edits, hashes and masks


class MEMOIR(MemoryEdit):
    """Writes each edit into columns of a residual memory that its prompt's mask names.

    Args:
        k: Columns of an edit; below 1 a share of the layer's input width.
        steps: Most SGD steps per batch of edits.
        lr: Learning rate.
        clip: Largest norm of each edit's gradient.
        stop_below: Loss in nats per token at which an edit is done.
        rephrase_keys: Let the rephrases of an edit be further keys to it.
        routing: How prompts are matched.
        corpus: Texts of which unrelated prompts are made: a .txt, .jsonl or folder, or a data set
            of the Hub; none takes the `corpus.txt` of the base model, else the model writes them.
        shield: Weight of each earlier edit against a new edit's gradient, which is turned away
            from what they read (not in the paper); 0 is off.
        compat: Decay, weigh and stop as the released code does.
    """

    memory: ResidualMemory

    def __init__(
        self,
        k: float = 4096 / 14336,
        steps: int = 30,
        lr: float = 1.0,
        clip: float = 1.0,
        stop_below: float = 0.02,
        rephrase_keys: bool = False,
        routing: Routing = PUBLISHED,
        corpus: str | None = None,
        shield: float = 0.0,
        compat: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if k <= 0 or (k >= 1 and k != int(k)) or steps < 1 or shield < 0:
            raise ValueError(
                f"k is {k}, steps is {steps}, shield is {shield}; k is a share below 1 or a whole "
                "number of columns, steps at least 1 and shield at least 0"
            )
        self.k = k
        self.steps = steps
        self.lr = lr
        self.clip = clip
        self.stop_below = stop_below
        self.rephrase_keys = rephrase_keys
        self.routing = routing
        self.corpus = corpus
        self.shield = shield
        self.compat = compat
        self.newest: list[int] = []  # edits of the last batch of this session

    def make_memory(self, base_layer: nn.Module) -> ResidualMemory:
        """Build the layer around a base layer."""
        k = round(self.k * self.site.in_features) if self.k < 1 else int(self.k)
        return ResidualMemory(base_layer, k, self.routing, self.generator)

    def owners(self, slot_B: Tensor) -> list[int | None]:
        """Return the edit that owns each slot; None for slot -1."""
        if len(self.memory.keys) == 0:
            return [None] * len(slot_B)
        owner_B = self.memory.keys.edit_K[slot_B.clamp_min(0)].where(slot_B >= 0, -1)
        return [None if owner < 0 else owner for owner in owner_B.tolist()]

    @property
    def held(self) -> list[int]:
        """Ids of the edits that the memory answers with, in order."""
        return sorted(set(self.memory.keys.edit_K.tolist()))

    def prepare(self) -> None:
        """Write prefixes; centre and calibrate on unrelated prompts, where that is not done yet."""
        super().prepare()
        if self.memory.is_centred or not (self.routing.background or self.routing.held_out):
            return
        background, held_out = self._unrelated()
        self.centre_on(background)
        self.memory.quiet_NW = self._masks(held_out)

    @torch.no_grad()
    def centre_on(self, prompts: list[str]) -> None:
        """Let the mean fingerprint of these prompts be the centre; none leaves it at zero."""
        found = [self.memory.fingerprint(*inputs) for inputs in self.inputs(prompts)]
        if found:
            self.memory.mean_F.copy_(torch.cat(found).mean(0))

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Descend on the columns of the batch, then let the prompts be keys to them.

        Of two edits of one prompt in a batch the later is made; repeats share a mask and a key.
        """
        texts, keys = text_hashes(self.lm, [e.prompt for e in edits]), self.memory.keys
        kept = undisputed(edits, texts)
        edits, texts = [edits[i] for i in kept], [texts[i] for i in kept]
        mask_EW = self._masks([e.prompt for e in edits])[[texts.index(text) for text in texts]]
        shield_E = [self.shield] * len(edits)
        for i, slot in enumerate(keys.slots_of(texts).tolist()):
            if slot >= 0:  # edited again: the same columns
                mask_EW[i], shield_E[i] = keys.bits_KW[slot], 0.0
        further, rows = self._rephrases(edits), self.rows(edits)
        columns = self.memory.columns(mask_EW, shield_E)
        losses_E, steps = descend_columns(
            rows, columns, self.steps, self.lr, self.clip, self.stop_below, self.compat
        )
        shrink = (1 - self.lr * RELEASED_DECAY) ** steps if self.compat else 1.0
        before = self.memory.before
        try:
            self.memory.write(columns.used_C, columns.values_DC, shrink)
            keys.add_slots(mask_EW, [e.id for e in edits], texts)
            if self.shield:
                self.memory.shield.add(*columns.read(rows.inputs_BTF, rows.tokens.predicts_BT))
            numbers = {"steps": float(steps), "loss": float(losses_E.mean())}
            numbers["self_match"] = self._self_match(edits, rows)
            rates = self._add_rephrases(further)
            numbers["false_activations"] = self.memory.calibrate(torch.cat([mask_EW, further[2]]))
        except BaseException:  # as if the edits had not come
            if self.memory.before is not before:
                self.memory.take_back()
                self.memory.calibrate()
            raise
        self.newest = [*as_asked(edits)]
        return numbers | rates | {"tau": float(self.memory.tau), "memory_norm": self.memory.norm}

    def undo(self, edit_id: int) -> None:
        """Take an edit out: its keys always, what it wrote where it is the newest.

        Raises:
            UndoError: If a later edit of the same prompt stands in its place.
        """
        if edit_id not in self.held:
            raise UndoError(
                f"MEMOIR cannot undo edit {edit_id}: its prompt was edited again; undo that edit"
            )
        if self.newest != [edit_id] or not self.memory.take_back():
            self.memory.forget(edit_id)
        self.newest = []
        self.memory.calibrate()

    def rekey(self, edits: list[Edit]) -> None:
        """Let edits be found by the masks that their prompts have now; calibrate again.

        Their own masks still name the columns that answer.
        """
        texts = wordings(edits)
        self.memory.keys.move(self._masks(texts), text_hashes(self.lm, texts))
        if len(self.memory.quiet_NW):
            self.memory.quiet_NW = self._masks(self._unrelated()[1])
        self.memory.forget_history()
        self.memory.calibrate()

    # private

    def _unrelated(self) -> tuple[list[str], list[str]]:
        """Return unrelated prompts: those that the centre is found from, and those held out."""
        wanted = self.routing.background, self.routing.held_out
        return shared_prompts(self.lm, self.corpus, wanted, self.seed)

    def _self_match(self, edits: list[Edit], rows: SiteRows) -> float:
        """Return the share of the prompts that, as they stand among the rows, find their edits."""
        first = torch.arange(0, len(rows.tokens.ids_BT), len(rows.tokens.ids_BT) // len(edits))
        asked = rows.inputs_BTF[first], rows.tokens.prompt_BT[first]
        found = self.owners(self.memory.route(*asked).slot_B)
        return sum(a == e.id for a, e in zip(found, edits, strict=True)) / len(edits)

    def _rephrases(self, edits: list[Edit]) -> Rephrases:
        """Return the rephrases that are to be keys."""
        own = as_asked(edits).values() if self.rephrase_keys else ()
        ids, texts = [e.id for e in own for _ in e.rephrases], [t for e in own for t in e.rephrases]
        return ids, text_hashes(self.lm, texts), self._masks(texts)

    def _add_rephrases(self, further: Rephrases) -> dict[str, float]:
        """Let rephrases be keys; return how they were routed before."""
        owners, hashes, mask_AW = further
        if not owners:
            return {}
        found = self.owners(self.memory.route_masks(mask_AW).slot_B)
        own = sum(a == b for a, b in zip(found, owners, strict=True))
        for edit_id in dict.fromkeys(owners):
            mine = [i for i, owner in enumerate(owners) if owner == edit_id]
            self.memory.keys.add_wordings(mask_AW[mine], edit_id, [hashes[i] for i in mine])
        rejected = found.count(None)
        counts = {"rejected": rejected, "wrong": len(found) - rejected - own}
        return {f"rephrases_{name}": count / len(found) for name, count in counts.items()}

    def _masks(self, prompts: Sequence[str]) -> Tensor:
        """Return the packed masks of prompts [B, W]."""
        none_BW = self.memory.keys.bits_KW[:0]
        return torch.cat([none_BW, *(self.memory.masks(*pair) for pair in self.inputs(prompts))])
