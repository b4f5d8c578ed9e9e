"""All token positions and all token policy: prompt end, target span, subject, spaces, BOS, padding.

Policy, the same for every tokenizer and written down once:

- **Text.** The row's text is `prompt + separator + target`. Spaces at the end of a prompt move
  into the separator, which is one space; after a line break and after a chat template it is
  empty. Targets come without a leading space.
- **Prompt tokens** are what the tokenizer gives for the prompt alone, special tokens included
  (so BOS as the tokenizer has it; an EOS that it appends is taken off). Generation starts from
  exactly these ids.
- **Target tokens** are what the tokenizer adds for the rest of the text. Where a merge crosses
  the border, the target is encoded apart, behind an anchor, so prompt ids never change.
- **Subject.** The index of its last token is `len(encode(prompt up to the subject's end)) - 1`,
  as ROME and its successors count (also where a merge crosses the subject's end); spaces at its
  end do not count. A subject that occurs several times counts at its last place.

Legend: B rows, T tokens, N target tokens of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Padding = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Encoded rows.

    Args:
        ids_BT: Token ids, int64.
        mask_BT: True at real tokens.
        prompt_BT: True at prompt tokens, BOS included.
        target_BT: True at target tokens.
        subject_B: Index of the subject's last token in its padded row, -1 where not asked for.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    prompt_BT: Tensor
    target_BT: Tensor
    subject_B: Tensor

    @property
    def positions_BT(self) -> Tensor:
        """Position ids: 0 at each row's first real token, whatever the padding."""
        return (self.mask_BT.long().cumsum(1) - 1).clamp_min(0)

    @property
    def predicts_BT(self) -> Tensor:
        """True where a token's logits predict a target token (one place to the left of it)."""
        return torch.cat([self.target_BT[:, 1:], torch.zeros_like(self.target_BT[:, :1])], dim=1)

    @property
    def target_ids_N(self) -> Tensor:
        """Ids of all target tokens, row by row."""
        return self.ids_BT[self.target_BT]

    @property
    def target_rows_N(self) -> Tensor:
        """Row of each target token, matching `target_ids_N`."""
        return self.target_BT.nonzero()[:, 0]

    def rows(self, index: Tensor) -> Tokens:
        """Return the rows at `index` (int64), cut to the longest of them where right-padded."""
        part = {name: getattr(self, name)[index] for name in self.__slots__}
        columns = part["mask_BT"].any(0)
        cut = {k: v[:, columns] for k, v in part.items() if k != "subject_B"}
        skipped = int(columns.long().argmax())
        subject_B = part["subject_B"]
        return Tokens(**cut, subject_B=torch.where(subject_B < 0, subject_B, subject_B - skipped))

    def to(self, device: torch.device | str) -> Tokens:
        """Return the same rows on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__slots__})


class TokenPolicy:
    """Turns texts into rows of ids, by the policy at the head of this file.

    Args:
        tokenizer: A transformers tokenizer.
        chat_template: Wrap prompts as a user's turn and let targets be the assistant's answer.

    Raises:
        ValueError: If a chat template is asked for and the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, chat_template: bool = False) -> None:
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"chat_template: true, but the tokenizer of {tokenizer.name_or_path!r} has none; "
                "set chat_template: false or give the tokenizer a template"
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        eos = tokenizer.eos_token_id
        probe = tokenizer("x")["input_ids"]
        self.eos_id: int | None = eos
        self.adds_eos = eos is not None and len(probe) > 1 and probe[-1] == eos
        bare = tokenizer("x", add_special_tokens=False)["input_ids"]
        self.adds_bos = bool(probe[: len(probe) - len(bare) - self.adds_eos])
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else eos if eos is not None else 0

    def prompt_text(self, prompt: str) -> str:
        """Return the text in front of the separator: the template's, or the prompt's own."""
        if not self.chat_template:
            return prompt.rstrip(" ")
        turns = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return text

    def separator(self, prompt_text: str) -> str:
        """Return what stands between prompt and target: one space, or nothing after a break."""
        return "" if self.chat_template or prompt_text[-1:].isspace() or not prompt_text else " "

    def ids(self, texts: list[str], plain: bool = False) -> list[list[int]]:
        """Encode whole texts, special tokens as the tokenizer adds them, without a closing EOS."""
        if not texts:
            return []
        # a chat template writes its own special tokens; plain texts have been through none
        plain = plain or not self.chat_template
        rows = self.tokenizer(texts, add_special_tokens=plain)["input_ids"]
        return [list(row[:-1]) if self.adds_eos and plain else list(row) for row in rows]

    def target_ids(self, prompt_texts: list[str], targets: list[str]) -> list[list[int]]:
        """Encode targets as they continue their prompts."""
        seps = [self.separator(p) for p in prompt_texts]
        prompts = self.ids(prompt_texts)
        joint = self.ids([p + s + t for p, s, t in zip(prompt_texts, seps, targets, strict=True)])
        return [
            whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._apart(sep, target)
            for whole, prompt, sep, target in zip(joint, prompts, seps, targets, strict=True)
        ]

    def _apart(self, separator: str, target: str) -> list[int]:
        """Encode a target behind an anchor that no merge crosses."""
        anchor = "\n" if separator == "" else "a"
        head, whole = self.ids([anchor, anchor + separator + target])
        return whole[len(head) :] if whole[: len(head)] == head else self.ids([target])[0]

    def subject_index(self, prompt: str, subject: str) -> int:
        """Return the index of the subject's last token in the unpadded prompt.

        Raises:
            ValueError: If the subject does not occur in the prompt.
        """
        return self.subject_indices([prompt], [subject])[0]

    def subject_indices(self, prompts: list[str], subjects: list[str]) -> list[int]:
        """Return `subject_index` of many prompts."""
        heads = [self._up_to(p, s) for p, s in zip(prompts, subjects, strict=True)]
        return [len(head) - 1 for head in self.ids(heads)]

    def template_indices(self, template: str, subjects: list[str]) -> list[int]:
        """Return each subject's last token's index in a template's {}, spaces included (ROME)."""
        head = template.partition("{}")[0]
        return [len(ids) - 1 for ids in self.ids([head + s for s in subjects], plain=True)]

    def _up_to(self, prompt: str, subject: str) -> str:
        """Return the prompt's text up to its subject's end."""
        text = self.prompt_text(prompt)
        place = text.rfind(prompt.rstrip(" ")) if self.chat_template else 0
        start = prompt.rfind(subject)
        if start < 0 or place < 0:
            raise ValueError(f"subject {subject!r} not found in prompt {prompt!r}")
        return text[: place + start + len(subject.rstrip(" ") or subject)]

    def encode(
        self,
        prompts: list[str],
        targets: list[str] | None = None,
        subjects: list[str] | None = None,
        padding: Padding = "right",
        append_eos: bool = False,
    ) -> Tokens:
        """Encode rows of prompt and target.

        Args:
            prompts: One text per row.
            targets: Answer per row without a leading space; None for prompts alone.
            subjects: Subject per row, each a substring of its prompt.
            padding: Side to pad on.
            append_eos: Close each target with the tokenizer's EOS.

        Raises:
            ValueError: If there are no rows, a prompt has no tokens, a target is empty, or a
                subject is not in its prompt.
        """
        heads, tails = self.pieces(prompts, targets, append_eos)
        index = [-1] * len(prompts)
        if subjects is not None:
            index = self.subject_indices(prompts, subjects)
        return self.pad(heads, tails, index, padding)

    def pieces(
        self, prompts: list[str], targets: list[str] | None = None, append_eos: bool = False
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the ids of prompts and of targets, unpadded; see `encode` for the errors."""
        if not prompts:
            raise ValueError("no prompts to encode")
        texts = [self.prompt_text(p) for p in prompts]
        heads = self.ids(texts)
        for prompt, head in zip(prompts, heads, strict=True):
            if not head:
                raise ValueError(f"prompt {prompt!r} has no tokens; write at least one word")
        if targets is None:
            return heads, [[] for _ in prompts]
        tails = self.target_ids(texts, targets)
        for target, tail in zip(targets, tails, strict=True):
            if not tail:
                raise ValueError(f"target {target!r} has no tokens; an edit needs an answer")
        if append_eos:
            if self.eos_id is None:
                raise ValueError("append_eos: true, but the tokenizer has no EOS token")
            tails = [[*tail, self.eos_id] for tail in tails]
        return heads, tails

    def pad(
        self,
        heads: list[list[int]],
        tails: list[list[int]],
        index: list[int],
        padding: Padding = "right",
    ) -> Tokens:
        """Lay rows of prompt and target ids out in one rectangle, with each row's subject index."""
        width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        ids, kind, subject = [], [], []
        for head, tail, place in zip(heads, tails, index, strict=True):
            gap = width - len(head) - len(tail)
            left, right = (gap, 0) if padding == "left" else (0, gap)
            ids.append([self.pad_id] * left + head + tail + [self.pad_id] * right)
            kind.append([0] * left + [1] * len(head) + [2] * len(tail) + [0] * right)
            subject.append(place + left if place >= 0 else -1)
        kind_BT = torch.tensor(kind)
        return Tokens(
            ids_BT=torch.tensor(ids),
            mask_BT=kind_BT > 0,
            prompt_BT=kind_BT == 1,
            target_BT=kind_BT == 2,
            subject_B=torch.tensor(subject),
        )
