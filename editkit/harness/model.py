"""An `EditableLM` as lm-evaluation-harness asks one: three kinds of question, in batches.

Source: EleutherAI's lm-evaluation-harness 0.4.13, `lm_eval/api/model.py` for the contract and
`lm_eval/models/huggingface.py` (HFLM) for tokenisation, so that figures compare with the field's.
A routed method routes as in every pass of the LM: once a row, from the context's tokens alone, or
from the whole window where a text is read without context.

Deviations from HFLM:
    - BOS is not predicted as the first token of a text that is read whole.
    - A row's last token takes a position, so a window holds one token less.
    - A budget of new tokens beyond the model's positions ends there; it is no error.
    - Answers are greedy; a task that asks for sampling is refused.

Legend: B rows, N target tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track

from editkit.functional.scores import all_by_row, token_hits, token_nll
from editkit.harness.rows import (
    Row,
    cut_left,
    longest_row,
    pair_rows,
    prefix_id,
    stops_and_budget,
    window_rows,
)
from editkit.lm.editable import EditableLM
from editkit.lm.reading import decode_ids


class Request(Protocol):
    """The harness' `Instance`."""

    args: tuple[Any, ...]


def part_of_harness(name: str) -> Any:
    """Import a module of lm-evaluation-harness, such as `lm_eval.evaluator`.

    Raises:
        ImportError: If it is not installed; the text names the extra.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError(
            "lm-evaluation-harness is not installed: pip install editkit[eval]"
        ) from error


def harness_model(lm: EditableLM, batch_size: int = 16) -> Any:
    """Return `lm` as an `lm_eval.api.model.LM`, to hand to `lm_eval.simple_evaluate`.

    Args:
        lm: The model; it is asked as it stands, edited or within `unedited()`.
        batch_size: Rows per forward pass; changes no score beyond rounding.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
    """
    base = part_of_harness("lm_eval.api.model").LM
    return type("EditedLM", (Answers, base), {})(lm, batch_size)


class Answers:
    """What the harness calls; `harness_model` joins it with the harness' own base class.

    Args:
        lm: The model.
        batch_size: Rows per forward pass.
    """

    def __init__(self, lm: EditableLM, batch_size: int) -> None:
        super().__init__()
        self.lm = lm
        self.batch_size = batch_size

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) its log-likelihood, nats, and whether greedy."""
        rows = pair_rows(self.lm, [request.args for request in requests])
        return self._score(rows, "asking about continuations")

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Return each text's log-likelihood, nats; every token counts once."""
        windows = [window_rows(self.lm, request.args[0]) for request in requests]
        rows = [row for part in windows for row in part]
        values = iter(self._score(rows, "reading texts", routes_on_all=True))
        return [sum(next(values)[0] for _ in part) for part in windows]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Answer each context greedily, up to the first of its stop strings.

        Raises:
            ValueError: If a task asks for sampling.
        """
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[stops_and_budget(request.args[1])].append(i)
        heads = self.lm.policy.ids([request.args[0] for request in requests])
        jobs = [
            (until, budget, part)
            for (until, budget), rows in groups.items()
            for part in self._batches(rows, [len(heads[i]) for i in rows])
        ]
        answers = [""] * len(requests)
        for until, budget, rows in _track(jobs, "answering"):
            found = self._decode([heads[i] for i in rows], budget, until)
            for i, ids in zip(rows, found, strict=True):
                text = self.lm.tokenizer.decode(ids, skip_special_tokens=True)
                for stop in until:
                    text = text.split(stop)[0]
                answers[i] = text
        return answers

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which the harness keeps with rendered conversations."""
        return str(self.lm.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's chat template."""
        return self.lm.tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation as the tokenizer's template does."""
        text: str = self.lm.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    @torch.no_grad()
    def _score(
        self, rows: Sequence[Row], doing: str, routes_on_all: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each row's log-likelihood of its tail, and whether that is the greedy answer."""
        rows = cut_left(self.lm, rows)
        found = [(0.0, True)] * len(rows)
        batches = self._batches(range(len(rows)), [len(r.head) + len(r.tail) for r in rows])
        for index in _track(batches, doing):
            heads, tails = [rows[i].head for i in index], [rows[i].tail for i in index]
            tokens = self.lm.policy.pad(heads, tails, [-1] * len(index)).to(self.lm.device)
            if routes_on_all:
                tokens = replace(tokens, prompt_BT=tokens.mask_BT)
            logits_NV = self.lm.target_logits(tokens)
            nll_N = token_nll(logits_NV, tokens.target_ids_N).cpu().double()
            hits_N = token_hits(logits_NV, tokens.target_ids_N).cpu()
            row_N = tokens.target_rows_N.cpu()
            sum_B = nll_N.new_zeros(len(index)).index_add(0, row_N, -nll_N)
            greedy_B = all_by_row(hits_N, row_N, len(index))
            for i, value, greedy in zip(index, sum_B.tolist(), greedy_B.tolist(), strict=True):
                found[i] = value, greedy
        return found

    def _decode(
        self, heads: list[list[int]], budget: int, until: tuple[str, ...]
    ) -> list[list[int]]:
        """Return the ids behind each context, of which the last tokens are kept where too long."""
        longest = longest_row(self.lm)
        keep = max(longest - budget, longest // 2)
        heads = [(head or [prefix_id(self.lm)])[-keep:] for head in heads]
        tokens = self.lm.policy.pad(heads, [[] for _ in heads], [-1] * len(heads), "left")
        return decode_ids(self.lm, tokens.to(self.lm.device), budget, until)

    def _batches(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Put rows in batches of like length, longest first, so that too large fails at once."""
        order = [row for _, row in sorted(zip(lengths, rows, strict=True), key=lambda p: -p[0])]
        size = self.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]


def _track(jobs: Sequence[Any], doing: str) -> Iterator[Any]:
    """Show progress on a terminal."""
    console = Console(stderr=True)
    silent = not console.is_terminal
    return iter(track(jobs, doing, console=console, disable=silent, transient=True))
