"""MaskKeys: the keys that open a memory, apart from what they open.

Each key is a packed mask and belongs to an edit. The key of an edit's own prompt is a *slot*: its
mask is also the set of columns that the edit writes. Further keys of the edit point to that slot.

Legend: K keys, W 64-bit words of a mask, B rows asked about, A keys to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from editkit.adapters.base import fit_to
from editkit.functional.masks import best_match

Tables = tuple[Tensor, ...]
NAMES = ("bits_KW", "edit_K", "slot_K", "text_K")


@dataclass(frozen=True)
class Routing:
    """How a prompt becomes a mask and when a mask is answered.

    Args:
        tau: Share of the k ones that a prompt's mask must have in common with a stored one; none
            calibrates it.
        false_positives: Share of held-out unrelated prompts that a calibrated tau may let through.
        background: Unrelated prompts whose mean fingerprint is the centre; 0 does not centre.
        held_out: Further unrelated prompts, to calibrate tau on; 0 takes a tau above chance.
        fingerprint: `mean` over the prompt's tokens, as published, or its `last` token alone.
        mask: `top` marks a fingerprint's largest magnitudes, as published; for ablations `hash` is
            pseudo-random and the same for the same prompt only, `random` new at every look.
        columns: Columns that a mask opens: `permuted` by a fixed permutation, as published;
            `drawn` as many by a hash of the mask, so that edits with like masks share no more of
            them than any two; for ablations the `same` places as the mask's.
        own_mask: For ablations: answer every prompt, through its own mask.
    """

    tau: float | None = None
    false_positives: float = 0.01
    background: int = 100
    held_out: int = 1000
    fingerprint: Literal["mean", "last"] = "mean"
    mask: Literal["top", "hash", "random"] = "top"
    columns: Literal["permuted", "drawn", "same"] = "permuted"
    own_mask: bool = False

    def __post_init__(self) -> None:
        """Check user input."""
        for name, known in (
            ("fingerprint", ("mean", "last")),
            ("mask", ("top", "hash", "random")),
            ("columns", ("permuted", "drawn", "same")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"routing.{name} is {getattr(self, name)!r}; use one of {known}")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ValueError(f"routing.tau is {self.tau}; it is a share of k, from 0 to 1")
        if not 0 <= self.false_positives < 1:
            raise ValueError(f"routing.false_positives is {self.false_positives}; use 0 to 1")
        if min(self.background, self.held_out) < 0:
            raise ValueError(
                f"routing.background is {self.background}, held_out is {self.held_out}; numbers of "
                "prompts are not negative"
            )


class MaskKeys(nn.Module):
    """Packed masks with the edit, the slot and the text that each stands for.

    Texts are known by a hash, so that a prompt edited again is found whatever rounding does to its
    mask. Tables are replaced and never written in place: an old set of them stays what it was.

    Args:
        words: 64-bit words W of a mask.
        device: Where to keep them.
    """

    bits_KW: Tensor
    edit_K: Tensor
    slot_K: Tensor
    text_K: Tensor

    def __init__(self, words: int, device: torch.device) -> None:
        super().__init__()
        empty = torch.zeros(0, dtype=torch.long, device=device)
        self.register_buffer("bits_KW", empty.new_zeros(0, words))
        for name in NAMES[1:]:
            self.register_buffer(name, empty.clone())

    def __len__(self) -> int:
        return len(self.bits_KW)

    @property
    def tables(self) -> Tables:
        """The four tables as they are; setting them goes back to those."""
        return tuple(getattr(self, name) for name in NAMES)

    @tables.setter
    def tables(self, tables: Tables) -> None:
        for name, table in zip(NAMES, tables, strict=True):
            setattr(self, name, table)

    def match(self, queries_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best key's index and the ones it shares, int64 [B]; there must be a key."""
        return best_match(queries_BW, self.bits_KW)

    def slots_of(self, texts: Sequence[int]) -> Tensor:
        """Return the slot of each prompt, known by its text hash, int64; -1: never edited."""
        text_B = self.text_K.new_tensor(texts)
        found_BK = (self.text_K == text_B[:, None]) & self._is_slot
        if len(self) == 0:
            return torch.full_like(text_B, -1)
        return found_BK.long().argmax(1).where(found_BK.any(1), -1)

    def add_slots(self, bits_EW: Tensor, edit_ids: Sequence[int], texts: Sequence[int]) -> None:
        """Let prompts belong to edits: as new slots, or in place where they have one.

        A prompt that was another wording of an older edit is that no longer. One that is named
        several times is taken once.
        """
        once = [i for i, text in enumerate(texts) if texts.index(text) == i]
        bits_EW, edit_ids, texts = (
            bits_EW[once],
            [edit_ids[i] for i in once],
            [texts[i] for i in once],
        )
        slot_E = self.slots_of(texts)
        edit_E, text_E = self.edit_K.new_tensor(edit_ids), self.text_K.new_tensor(texts)
        is_new_E = slot_E < 0
        for slot, edit_id in zip(slot_E[~is_new_E], edit_E[~is_new_E], strict=True):
            self.edit_K = self.edit_K.where(self.slot_K != slot, edit_id)
        is_own_K = self.text_K[self.slot_K] == self.text_K  # also where it was moved to
        self._keep(is_own_K | ~torch.isin(self.text_K, text_E))
        place_A = torch.arange(int(is_new_E.sum())).to(slot_E) + len(self)
        self._append(bits_EW[is_new_E], edit_E[is_new_E], place_A, text_E[is_new_E])

    def add_wordings(self, bits_AW: Tensor, edit_id: int, texts: Sequence[int]) -> None:
        """Let further wordings open the slot of an edit; wordings that are slots stay those."""
        is_free_A = self.slots_of(texts) < 0
        text_A = self.text_K.new_tensor(texts)[is_free_A]
        self._keep(self._is_slot | ~torch.isin(self.text_K, text_A))
        slot = self.slot_K[self.edit_K == edit_id][0]
        owner_A = torch.full_like(text_A, edit_id)
        self._append(bits_AW[is_free_A], owner_A, slot.expand_as(text_A), text_A)

    def move(self, bits_AW: Tensor, texts: Sequence[int]) -> None:
        """Let prompts that are keys be found by other masks.

        A slot keeps its own mask besides, which says what it answers with.
        """
        text_A = self.text_K.new_tensor(texts)
        is_further_AK = (self.text_K == text_A[:, None]) & ~self._is_slot
        moved_A, key_A = is_further_AK.nonzero(as_tuple=True)
        self.bits_KW = self.bits_KW.index_copy(0, key_A, bits_AW[moved_A])
        slot_A = self.slots_of(texts)
        is_new_A = (slot_A >= 0) & ~is_further_AK.any(1)
        slot_A = slot_A[is_new_A]
        self._append(bits_AW[is_new_A], self.edit_K[slot_A], slot_A, text_A[is_new_A])

    def drop(self, edit_id: int) -> None:
        """Forget all keys of an edit."""
        self._keep(self.edit_K != edit_id)

    @property
    def _is_slot(self) -> Tensor:
        return self.slot_K == torch.arange(len(self), device=self.slot_K.device)

    def _append(self, *added: Tensor) -> None:
        """Add rows to the four tables."""
        self.tables = tuple(torch.cat(pair) for pair in zip(self.tables, added, strict=True))

    def _keep(self, kept_K: Tensor) -> None:
        """Drop the other keys; a slot that stays is known by its new index."""
        if bool(kept_K.all()):
            return  # the tables are long
        index_K = kept_K.cumsum(0) - 1
        tables = [table[kept_K] for table in self.tables]
        tables[2] = index_K[tables[2]]
        self.tables = tuple(tables)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept tables that have grown since."""
        fit_to(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
