"""What a single answer is worth: teacher-forced scores of tokens, and the match of free answers.

Legend: N target tokens of all rows, V vocabulary, B rows.
"""

from __future__ import annotations

import re
import string
import unicodedata

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

Scores = dict[str, float]

WORST_NLL = 1e4  # nats; keeps means of a diverged model finite (its logits are inf or nan)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_nll(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Negative log-likelihood of each token, in nats, fp32, at most `WORST_NLL`.

    Args:
        logits_NV: Logits that predict the tokens; cast to fp32 before the softmax.
        ids_N: The tokens.

    Returns:
        One value per token, finite even where the logits are not.
    """
    nll_N = -log_softmax(logits_NV.float(), dim=-1).gather(1, ids_N[:, None])[:, 0]
    return nll_N.nan_to_num(nan=WORST_NLL, posinf=WORST_NLL).clamp_max(WORST_NLL)


def token_hits(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Whether each token is the most likely one; among equals the lowest id is.

    Logits that are nan hit nothing.
    """
    own_N = logits_NV.gather(1, ids_N[:, None])[:, 0]
    return (logits_NV.argmax(-1) == ids_N) & ~own_N.isnan()


def mean_by_row(values_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """Mean of the values of each row [B].

    Over hits this is `token_accuracy`, over negative log-likelihoods it is `nll`.

    Args:
        values_N: One value per token.
        row_N: Row of each token.
        rows: Number of rows, each with at least one token.
    """
    sum_B = torch.zeros(rows, dtype=values_N.dtype, device=values_N.device)
    count_B = torch.bincount(row_N, minlength=rows)
    return sum_B.index_add(0, row_N, values_N) / count_B


def all_by_row(hits_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """Whether every token of a row is a hit [B]: `sequence_accuracy`."""
    return torch.bincount(row_N[~hits_N], minlength=rows) == 0


def row_scores(logits_NV: Tensor, ids_N: Tensor, row_N: Tensor, rows: int) -> list[Scores]:
    """Return the teacher-forced scores of each row; sums run on CPU in fp64.

    Args:
        logits_NV: Logits that predict the tokens.
        ids_N: The tokens.
        row_N: Row of each token, ascending, on CPU.
        rows: Number of rows; the scores of one without tokens are nan.

    Returns:
        Of each row `token_accuracy`, `sequence_accuracy`, `first_token`, `nll` (mean), `nll_sum`.
    """
    hits_N = token_hits(logits_NV, ids_N).cpu()
    is_first_N = row_N.diff(prepend=row_N.new_tensor([-1])) != 0
    nll_N = token_nll(logits_NV, ids_N).cpu().double()
    nll_B = mean_by_row(nll_N, row_N, rows)
    columns = (
        mean_by_row(hits_N.double(), row_N, rows).tolist(),
        all_by_row(hits_N, row_N, rows).double().tolist(),
        mean_by_row(hits_N[is_first_N].double(), row_N[is_first_N], rows).tolist(),
        nll_B.tolist(),
        (nll_B * torch.bincount(row_N, minlength=rows)).tolist(),
    )
    names = ("token_accuracy", "sequence_accuracy", "first_token", "nll", "nll_sum")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def inner_stops(target: str, stop: tuple[str, ...]) -> int:
    r"""Count the stop strings inside a target, those at its end aside.

    >>> inner_stops("St. Louis.", ("\n", "."))
    1
    """
    return len(_places(_strip_stops(target, stop), stop))


def cut_answer(text: str, stop: tuple[str, ...], target: str | None = None) -> str:
    r"""Cut a free answer at the first stop that is not part of the target.

    A target with s stops inside it ends the answer at the answer's stop number s + 1, so that
    "St. Louis" can be met while "St. Louis and more" cannot.

    >>> cut_answer("St. Louis. It lies on a river.", ("\n", "."), target="St. Louis")
    'St. Louis'

    Args:
        text: Generated text.
        stop: Strings that end an answer.
        target: Expected answer; None cuts at the first stop.
    """
    places = _places(text, stop)
    allowed = 0 if target is None else inner_stops(target, stop)
    return (text[: places[allowed]] if len(places) > allowed else text).strip()


def normalise_answer(text: str) -> str:
    """Reduce an answer to what a match compares: SQuAD's normalisation, on NFC text.

    Lower-cases, drops ASCII punctuation and the articles a, an, the, and collapses white space.
    A text of which nothing is left (`+`, `A`) stands for itself, stripped.

    >>> normalise_answer("The  Eiffel Tower!"), normalise_answer("C'est là"), normalise_answer("+")
    ('eiffel tower', 'cest là', '+')
    """
    text = unicodedata.normalize("NFC", text)
    bare = _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION))
    return " ".join(bare.split()) or text.strip()


def answers_match(first: str, second: str) -> bool:
    """Whether two answers are equal once normalised."""
    return normalise_answer(first) == normalise_answer(second)


def _strip_stops(target: str, stop: tuple[str, ...]) -> str:
    """Drop the stop strings and white space at a target's end, unless nothing else is in it."""
    text = target.strip()
    while ending := next((s for s in stop if text.endswith(s)), None):
        text = text[: -len(ending)].rstrip()
    return text or target.strip()


def _places(text: str, stop: tuple[str, ...]) -> list[int]:
    """Return where stop strings begin in a text, the longest one first where two begin alike."""
    if not stop:
        return []
    longest_first = "|".join(re.escape(s) for s in sorted(stop, key=len, reverse=True))
    return [found.start() for found in re.finditer(longest_first, text)]
