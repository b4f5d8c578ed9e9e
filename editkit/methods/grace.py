"""GRACE: each edit is a key with a radius, and a value that answers what comes near the key.

Source: Hartvigsen, Sankaranarayanan, Palangi, Kim, Ghassemi, "Aging with GRACE: Lifelong Model
Editing with Discrete Key-Value Adaptors", NeurIPS 2023 (arXiv 2211.11031); released code:
github.com/Thartvigsen/GRACE at f674183, and EasyEdit's copy at 6906666.

Equations: the key of a prompt is the layer's input h at the prompt's last token. Where the nearest
key k_i is within its radius ε_i, the layer gives v_i instead of its output (`Codebook`). An edit
becomes a key with radius ε, widens the nearest key, or halves radii (Alg. 1,
`functional.codebook.placed`); its value minimises -1/|y| log p(y | x) by Adam.

Deviations:
    - A prompt is routed once, on its own tokens; what decodes keeps to it. The release asks again
      at every token that it generates, and takes that token for the key.
    - Answers are the same where their tokens are. The release compares mean(label ids), the -100 of
      the prompt among them, so that answers agree by chance and differ by the length of a prompt;
      `compat` does so too.
    - A prompt that is edited again loses its old key first. In the release both keys stand in one
      place, one with a negative radius, and the old value is trained and never given.
    - A halved radius stays at least 1 % of its key's norm, below which padding and precision alone
      move a prompt; the nearest key decides there anyway.
    - An edit is done at `stop_below` (the release takes all steps; 0 does so too).
    - Edits of a batch are placed one after another and trained together, a key that several of them
      share once for each, in order: what comes out is what comes of one at a time.
    - Options that the release's configurations leave off are not offered: values trained under
      noise (`val_train: adv`), keys that move (`eps_expand: moving_average`).

`replace_prompt` leaves the last prompt token as it is, as released, and so does nothing in the last
block. Without `prefixes` an edit trains on its bare prompt, as released.

Undo is exact, as if the edit had never been made, where its key has met no other edit. Otherwise it
is refused, but for the newest edit, made alone, which is always taken back bit for bit.

Costs: 4 (F + D) bytes an edit (Llama-3-8B's down-projection: 74 kB), a distance to every key per
prompt, and up to `steps` passes through the blocks above the layer per edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from editkit.adapters.codebook import Codebook, Replacement
from editkit.descend import descend_rows
from editkit.edits import Edit
from editkit.functional.codebook import Book, mean_label, placed
from editkit.lm.rows import SiteRows
from editkit.lm.site_values import SiteValues
from editkit.methods.base import UndoError
from editkit.methods.memory import MemoryEdit, text_hashes, wordings
from editkit.methods.wordings import as_asked

INITS = ("cold", "warm")


class GRACE(MemoryEdit):
    """Answers prompts near an edited one with a value that stands in for a layer's output.

    Args:
        eps: Radius ε of a new key, in units of the layer's input.
        steps: Most Adam steps per edit.
        lr: Adam's learning rate.
        stop_below: Loss in nats per token at which an edit is done.
        val_init: Start of a value: `cold` draws it from [0, 1), `warm` takes the layer's output.
        replacement: Tokens that take the value: `replace_last`, the prompt's last; the ones before
            it, `replace_prompt`; `replace_all`, decoded ones included.
        role: Part of the block whose layer is edited, as `editkit inspect` lists it.
        prefixes: Texts in front of an edit's prompt, each a further row to train on; none lets the
            model write ten.
        compat: Compare answers as the released code does.
    """

    memory: Codebook

    def __init__(
        self,
        eps: float = 1.0,
        steps: int = 100,
        lr: float = 1.0,
        stop_below: float = 0.02,
        val_init: Literal["cold", "warm"] = "cold",
        replacement: Replacement = "replace_last",
        role: str = "mlp.down",
        prefixes: Sequence[str] | None = (),
        compat: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(prefixes=None if prefixes is None else list(prefixes), **kwargs)
        if eps <= 0 or steps < 1 or lr <= 0:
            raise ValueError(f"eps is {eps}, steps {steps}, lr {lr}; all must be above 0")
        if val_init not in INITS or replacement not in get_args(Replacement):
            raise ValueError(
                f"val_init is {val_init!r}, replacement is {replacement!r}; use one of {INITS} and "
                f"one of {get_args(Replacement)}"
            )
        self.eps = eps
        self.steps = steps
        self.lr = lr
        self.stop_below = stop_below
        self.val_init = val_init
        self.replacement = replacement
        self.role = role
        self.compat = compat
        self.newest: list[int] = []  # edits of the last batch of this session

    def attach(self) -> None:
        """Wrap the layer of the block.

        Raises:
            ValueError: If nothing would come of the replacement there.
        """
        block = self.lm.memory_layer if self.layer is None else self.layer
        if self.replacement == "replace_prompt" and block == len(self.lm.blocks) - 1:
            raise ValueError(
                f"replace_prompt changes no answer in block {block}, the last: no block above "
                "looks back at the prompt; use replace_last, or a lower layer"
            )
        self.site = self.lm.site(block, self.role)
        self.memory = self.lm.attach(self.site.path, self.make_memory)

    def make_memory(self, base_layer: nn.Module) -> Codebook:
        """Build the codebook around a base layer."""
        return Codebook(base_layer, self.replacement)

    def owners(self, slot_B: Tensor) -> list[int | None]:
        """Return the edit that made each key; None for slot -1."""
        edit_ids = self.memory.edit_K.tolist()
        return [None if slot < 0 else edit_ids[slot] for slot in slot_B.tolist()]

    @property
    def held(self) -> set[int]:
        """Edits that have a key, and of each prompt the latest, which another's key may cover."""
        latest = {e["prompt"]: e["edit_id"] for e in self.ledger if not e.get("rolled_back")}
        return {*latest.values(), *self.memory.edit_K.tolist()}

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Place the edits among the keys, and teach each its answer there."""
        memory, rows = self.memory, self.rows(edits)
        bare = torch.arange(0, len(rows), len(rows) // len(edits), device=self.lm.device)
        x_ETF, prompt_ET = rows.inputs_BTF[bare], rows.tokens.prompt_BT[bare]
        query_EF = memory.query(x_ETF, prompt_ET)
        places = placed(memory.book, self._as_keys(edits, query_EF), self.eps)
        start_ED = self._starts(query_EF, x_ETF.dtype)
        values_KD = torch.cat([memory.values.detach(), start_ED])[places.kept_K]
        losses_E, steps = self._teach(edits, rows, values_KD, places.key_E)
        memory.write(places.book, values_KD, places.kept_K)
        self.newest = [*as_asked(edits)]
        found_E = memory.route(x_ETF, prompt_ET).slot_B.cpu()
        is_found_E = (found_E == places.key_E) & (found_E >= 0)
        numbers = {"steps": float(steps), "loss": float(losses_E.nanmean())}
        numbers["self_match"] = float(is_found_E.float().mean())
        return numbers | {
            "keys": float(len(memory.values)),
            "radius": float(memory.radius_K.mean()),
        }

    def undo(self, edit_id: int) -> None:
        """Take an edit out: the newest always, an older one where its key has met no other.

        Raises:
            UndoError: If other edits hang together with it.
        """
        if self.newest == [edit_id] and self.memory.take_back():
            self.newest = []
            return
        is_shaped = self.memory.is_shaped_K[self.memory.edit_K == edit_id].tolist()
        why = "its key and those of other edits have shaped one another"
        if not is_shaped:
            why = "it has no key: another edit's covers its prompt, or took its key's place"
        if is_shaped != [False]:
            raise UndoError(f"GRACE cannot undo edit {edit_id}: {why}")
        self.memory.drop(edit_id)

    @torch.no_grad()
    def rekey(self, edits: list[Edit]) -> None:
        """Move keys to where their prompts lie now; radii and values stay."""
        at = {text: key for key, text in enumerate(self.memory.text_K.tolist())}
        texts = wordings(edits)
        hashes = text_hashes(self.lm, texts)
        known = [(at[h], text) for h, text in zip(hashes, texts, strict=True) if h in at]
        found = [self.memory.query(*pair) for pair in self.inputs([text for _, text in known])]
        if found:
            self.memory.move([key for key, _ in known], torch.cat(found))

    # private

    def _as_keys(self, edits: list[Edit], query_EF: Tensor) -> Book:
        """Return the edits as keys that nothing has shaped."""
        prompts, targets = [e.prompt for e in edits], [e.target for e in edits]
        labels = text_hashes(self.lm, targets)
        if self.compat:
            pieces = zip(*self.lm.policy.pieces(prompts, targets, self.append_eos), strict=True)
            labels = [mean_label(head, tail) for head, tail in pieces]
        ids = self.memory.edit_K.new_tensor
        return Book(
            query_EF,
            query_EF.new_full((len(edits),), self.eps),
            ids(labels),
            ids([e.id for e in edits]),
            ids(text_hashes(self.lm, prompts)),
            self.memory.is_shaped_K.new_zeros(len(edits)),
        )

    @torch.no_grad()
    def _starts(self, query_EF: Tensor, dtype: torch.dtype) -> Tensor:
        """Return where the values of new keys start, fp32 [E, D]."""
        if self.val_init == "warm":
            return self.memory.base_layer(query_EF.to(dtype)).float()
        size, draw = self.site.out_features, self.generator
        rows = [torch.rand(size, generator=draw, dtype=torch.float32) for _ in query_EF]
        return torch.stack(rows).to(query_EF)

    def _teach(
        self, edits: list[Edit], rows: SiteRows, values_KD: Tensor, key_E: Tensor
    ) -> tuple[Tensor, int]:
        """Train the edits' values in place; return last losses [E] (nan: not taught), and steps."""
        memory, each, keys = self.memory, len(rows) // len(edits), key_E.tolist()
        rows_E = torch.arange(len(rows), device=self.lm.device).view(len(edits), each)
        losses_E = torch.full((len(edits),), torch.nan, dtype=torch.float32)
        waiting = [e for e, key in enumerate(keys) if key >= 0]
        steps = 0
        while waiting:
            now = sorted({keys[e]: e for e in reversed(waiting)}.values())  # the first of each key
            waiting = [e for e in waiting if e not in now]
            part = rows.at(rows_E[now].flatten())
            here_BT = memory.places(part.tokens.prompt_BT)
            loss = SiteValues(part, memory.base_layer, here_BT, each, self.stop_below)
            names = [f"edit {edits[e].id}" for e in now]
            at = [keys[e] for e in now]
            # one call more than steps, as the last takes none
            found = descend_rows(values_KD[at], loss, self.steps + 1, self.lr, names.__getitem__)
            values_KD[at] = found.found_BD
            losses_E[now] = loss.last_E.cpu()
            steps += int(found.calls_B.max()) - 1
        return losses_E, steps
