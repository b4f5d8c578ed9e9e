"""Two ways of asking an LM about many rows: force a text on it, or let it answer freely.

Rows go longest first in batches of like length; results keep the order of the input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from editkit.functional.scores import inner_stops
from editkit.lm.editable import EditableLM
from editkit.lm.tokens import Tokens
from editkit.metrics.protocol import EvalProtocol


def forced_batches(
    lm: EditableLM, prompts: Sequence[str], targets: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], Tokens]]:
    """Yield (row numbers, their encoded prompts and targets), every row once.

    Args:
        lm: Model whose tokenizer policy decides on spaces and special tokens.
        prompts: One text per row.
        targets: Text that follows each prompt.
        batch_size: Rows per batch.
    """
    lengths = [len(p) + len(t) for p, t in zip(prompts, targets, strict=True)]
    for rows in _batches(range(len(lengths)), lengths, batch_size):
        yield rows, lm.encode([prompts[i] for i in rows], [targets[i] for i in rows])


def free_answers(
    lm: EditableLM,
    prompts: Sequence[str],
    targets: Sequence[str | None],
    protocol: EvalProtocol,
    batch_size: int,
) -> list[str]:
    """Decode an answer to each prompt greedily, uncut behind the stop that ends it.

    A row's budget depends on its own target alone: rows of one budget decode together.

    Args:
        lm: Model to ask.
        prompts: One text per row.
        targets: Expected answers, for the budget and for stops inside them; None has neither.
        protocol: Budget and stop strings.
        batch_size: Rows per batch.
    """
    sizes = _target_sizes(lm, prompts, targets, batch_size)
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for i, target in enumerate(targets):
        # the LM ends a row at its first stop, so a target with a stop inside decodes on
        ends_early = target is None or inner_stops(target, protocol.stop) == 0
        groups[protocol.budget(sizes[i]), tuple(protocol.stop) if ends_early else ()].append(i)
    answers = [""] * len(prompts)
    lengths = [len(p) for p in prompts]
    for (budget, stop), members in sorted(groups.items()):
        for rows in _batches(members, lengths, batch_size):
            texts = lm.generate([prompts[i] for i in rows], max_new_tokens=budget, stop=stop)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
    return answers


def _target_sizes(
    lm: EditableLM, prompts: Sequence[str], targets: Sequence[str | None], batch_size: int
) -> list[int]:
    """Count each target's tokens; 0 where there is no target."""
    sizes = [0] * len(prompts)
    known = [(i, t) for i, t in enumerate(targets) if t is not None]
    asked, texts = [prompts[i] for i, _ in known], [t for _, t in known]
    for rows, tokens in forced_batches(lm, asked, texts, batch_size):
        for row, size in zip(rows, tokens.target_BT.sum(1).tolist(), strict=True):
            sizes[known[row][0]] = size
    return sizes


def _batches(
    members: Sequence[int], lengths: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Yield members in batches, longest first, so that too large a batch fails at once."""
    order = sorted(members, key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
