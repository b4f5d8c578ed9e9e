"""Ask an LM many questions: texts forced on it are scored and answers decoded from one reading.

Every question is asked once however often it comes. Rows go longest first in batches of like
length; results keep the order of the questions and depend neither on it nor on the batches.

Legend: B rows, T tokens, N forced tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from editkit.functional.scores import Scores, inner_stops, mean_by_row, row_scores, token_nll
from editkit.lm.decode import Ends
from editkit.lm.editable import EditableLM
from editkit.lm.reading import Reading
from editkit.metrics.protocol import BUDGET_SLACK, EvalProtocol

CONFIDENT = -math.log(0.8)  # nats: a token that the model gives more than 0.8 (WISE, Temporal)
LOGITS_HELD = 2**27  # logits of a batch, fp32: half a GiB
NEVER = 2**31


@dataclass(frozen=True, slots=True)
class Question:
    """One row to ask.

    Args:
        prompt: Text to go on from.
        draft: Text forced behind it; scored, and what the free answer is compared with first.
        compared: Tokens to score at the draft's places beside its own: the unedited model's.
        others: Further texts forced behind the prompt.
        accepted: Right answers, which set how long a free answer may be and what may be in it.
    """

    prompt: str
    draft: str | None = None
    compared: tuple[int, ...] | None = None
    others: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of a question.

    Args:
        scores: Of the draft's own tokens: `token_accuracy`, `sequence_accuracy`, `nll` (mean) and
            `nll_sum`.
        compared: The same of the compared tokens.
        argmax: The likeliest token at each place of the draft.
        others: Mean and sum of the negative log-likelihood of each other text's tokens.
        confident: Share of the tokens of prompt and draft, but the first, that are likelier
            than 0.8.
        answer: Free answer, uncut behind the stop that ends it; None where not asked for.
    """

    scores: Scores
    compared: Scores
    argmax: tuple[int, ...]
    others: tuple[tuple[float, float], ...]
    confident: float
    answer: str | None


@dataclass(frozen=True, slots=True)
class _Row:
    """A question in ids."""

    question: Question
    prompt: list[int]
    draft: list[int]
    others: list[list[int]]
    budget: int


def ask(
    lm: EditableLM,
    questions: Sequence[Question],
    protocol: EvalProtocol,
    batch_size: int,
    is_free: bool,
    is_whole: bool = False,
) -> list[Heard]:
    """Ask questions.

    Args:
        lm: Model to ask.
        questions: What to ask.
        protocol: Budget and stops of free answers.
        batch_size: Rows per forward pass; fewer where the logits would grow too large.
        is_free: Decode free answers.
        is_whole: Score the prompts' tokens, too (`Heard.confident`).

    Raises:
        ValueError: If a prompt or a forced text has no tokens, or a row is too long for the model.
    """
    rows = _encode(lm, list(dict.fromkeys(questions)), protocol)
    vocabulary = lm.vocabulary
    heard: dict[Question, Heard] = {}
    for batch in _batches(rows, batch_size, vocabulary, is_whole):
        found = _hear(lm, batch, protocol, is_free, is_whole)
        heard.update((row.question, one) for row, one in zip(batch, found, strict=True))
    return [heard[question] for question in questions]


def _encode(lm: EditableLM, questions: list[Question], protocol: EvalProtocol) -> list[_Row]:
    """Encode each prompt with each text behind it."""
    # an alias matters only where it might not fit; a token is a byte at least, of text or space
    room = protocol.max_new_tokens - BUDGET_SLACK - 1
    wide = {t for q in questions for t in q.accepted if len(t.encode()) > room}
    pairs = list(
        dict.fromkeys(
            (q.prompt, text)
            for q in questions
            for text in (q.draft, *q.others, *wide.intersection(q.accepted))
            if text is not None
        )
    )
    heads: dict[str, list[int]] = {}
    tails: dict[tuple[str, str], list[int]] = {}
    if pairs:
        prompts = [prompt for prompt, _ in pairs]
        ids, behind = lm.policy.pieces(prompts, [text for _, text in pairs])
        heads, tails = dict(zip(prompts, ids, strict=True)), dict(zip(pairs, behind, strict=True))
    if bare := list(dict.fromkeys(q.prompt for q in questions if q.prompt not in heads)):
        heads |= zip(bare, lm.policy.pieces(bare)[0], strict=True)
    rows = []
    for q in questions:
        sizes = [len(tails[q.prompt, t]) for t in q.accepted if (q.prompt, t) in tails]
        rows.append(
            _Row(
                question=q,
                prompt=heads[q.prompt],
                draft=[] if q.draft is None else tails[q.prompt, q.draft],
                others=[tails[q.prompt, text] for text in q.others],
                budget=protocol.budget(max(sizes)) if sizes else protocol.max_new_tokens,
            )
        )
    return rows


def _batches(
    rows: list[_Row], batch_size: int, vocabulary: int, is_whole: bool
) -> Iterator[list[_Row]]:
    """Yield rows in batches, longest first, so that too large a batch fails at once."""
    batch: list[_Row] = []
    held = 0
    for row in sorted(rows, key=lambda r: -len(r.prompt) - len(r.draft)):
        places = len(row.draft) + (len(row.prompt) if is_whole else 1)
        if batch and (len(batch) == batch_size or (held + places) * vocabulary > LOGITS_HELD):
            yield batch
            batch, held = [], 0
        batch.append(row)
        held += places
    if batch:
        yield batch


@torch.no_grad()
def _hear(
    lm: EditableLM, batch: list[_Row], protocol: EvalProtocol, is_free: bool, is_whole: bool
) -> list[Heard]:
    """Read one batch of rows and note what is asked of it."""
    drafts = [row.draft for row in batch]
    tokens = lm.policy.pad([r.prompt for r in batch], drafts, [-1] * len(batch), "left")
    reading = Reading(lm, tokens.to(lm.device), is_whole)
    tokens = reading.tokens
    logits_NV = reading.logits(tokens.predicts_BT)
    row_N = tokens.target_rows_N.cpu()
    own = row_scores(logits_NV, tokens.target_ids_N, row_N, len(batch))
    compared: list[Scores] = [{}] * len(batch)
    if any(row.question.compared for row in batch):
        ids = [i for r in batch for i in (r.question.compared or r.draft)]
        compared = row_scores(logits_NV, tokens.target_ids_N.new_tensor(ids), row_N, len(batch))
    argmax = logits_NV.argmax(-1).split([len(draft) for draft in drafts])
    confident = _confident(reading) if is_whole else [0.0] * len(batch)
    others = _others(reading, batch)
    answers: list[str | None] = [None] * len(batch)
    if is_free:
        room = tokens.ids_BT.new_tensor([row.budget for row in batch])
        stops = tokens.ids_BT.new_tensor([_stops(row.question, protocol.stop) for row in batch])
        ends = Ends.of(lm, tokens, room, stops, protocol.stop)
        answers = [*lm.texts(reading.decode(ends))]
    return [
        Heard(own[b], compared[b], tuple(argmax[b].tolist()), others[b], confident[b], answers[b])
        for b in range(len(batch))
    ]


def _confident(reading: Reading) -> list[float]:
    """Return the share of each row's tokens, but the first, that are likelier than 0.8."""
    tokens = reading.tokens
    predicts_BT = tokens.mask_BT.clone()
    predicts_BT[:, -1] = False
    ids_N = tokens.ids_BT[:, 1:][predicts_BT[:, :-1]]
    is_sure_N = token_nll(reading.logits(predicts_BT), ids_N) < CONFIDENT
    row_N = predicts_BT.nonzero()[:, 0]
    share_B: list[float] = mean_by_row(is_sure_N.double(), row_N, len(predicts_BT)).tolist()
    return share_B


def _others(reading: Reading, batch: list[_Row]) -> list[tuple[tuple[float, float], ...]]:
    """Return (mean, sum) of the negative log-likelihoods of each row's other texts."""
    found: list[tuple[tuple[float, float], ...]] = [()] * len(batch)
    for k in range(max(len(row.others) for row in batch)):
        texts = [row.others[k] if k < len(row.others) else [] for row in batch]
        width = max(len(text) for text in texts)
        ids_BN = reading.tokens.ids_BT.new_tensor([t + [0] * (width - len(t)) for t in texts])
        count_B = ids_BN.new_tensor([len(text) for text in texts])
        is_given_BN = torch.arange(width, device=ids_BN.device) < count_B[:, None]
        nll_M = token_nll(reading.other_logits(ids_BN, is_given_BN), ids_BN[is_given_BN])
        rows_M = is_given_BN.nonzero()[:, 0].cpu()
        mean_B = mean_by_row(nll_M.cpu().double(), rows_M, len(batch))
        pairs = zip(mean_B.tolist(), (mean_B * count_B.cpu()).tolist(), strict=True)
        for b, (row, pair) in enumerate(zip(batch, pairs, strict=True)):
            if k < len(row.others):
                found[b] += (pair,)
    return found


def _stops(question: Question, stop: tuple[str, ...]) -> int:
    """Return the stop tokens that may be taken, the last of which ends the answer."""
    inner = max((inner_stops(text, stop) for text in question.accepted), default=0)
    if inner and any(a != b and a in b for a in stop for b in stop):
        return NEVER  # tokens cannot tell one long stop from several short ones
    return inner + 1
