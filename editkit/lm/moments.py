"""Second moments of what enters a site: how much a model uses each direction of its keys.

C0 = E[k kᵀ] over the tokens of a corpus, not centred (ROME, Meng et al. 2022, section 3.1), for all
sites in one pass. Sums are fp64: methods solve against C0, whose condition may be beyond fp32.
Measured on the base weights, with edits out of the way, and kept in the cache folder under the
identity of everything that decides them.

Legend: N tokens of some rows, F layer input.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from editkit.lm.blocks import tap
from editkit.lm.corpus import Corpus, cache_folder
from editkit.lm.editable import EditableLM
from editkit.lm.kept import KeptTensors, identity_of
from editkit.lm.sites import Site
from editkit.parallel import Ranks, from_all_ranks, ranks_of

log = logging.getLogger(__name__)

LONGEST = 8192  # tokens of a text, as in the published statistics of Llama-3
TEXTS = 1000  # texts that are encoded together
Ids: TypeAlias = "array[int]"


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of one site.

    Args:
        cov_FF: Mean of k kᵀ over tokens, fp64, symmetric, on the CPU.
        count: Tokens it is the mean of.
        condition: Largest eigenvalue over the smallest; infinite where they are singular in fp64.
    """

    cov_FF: Tensor
    count: int
    condition: float


def second_moments(
    lm: EditableLM,
    sites: Sequence[Site],
    corpus: Corpus,
    tokens: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Moments]:
    """Measure the second moments of the inputs of sites, or take them from the cache.

    Example:
        >>> lm = EditableLM.load(LMSpec("factworld"))
        >>> corpus = read_corpus(None, count=3000, lm_spec=lm.spec)
        >>> found = second_moments(lm, [lm.site(1), lm.site(2)], corpus)
        >>> found["model.layers.1.mlp.down_proj"].cov_FF.shape
        torch.Size([768, 768])

    Args:
        lm: Model; its edits are out of the way meanwhile.
        sites: Linear layers whose inputs are measured, all in one pass.
        corpus: Texts. Every token counts, BOS included, and no padding.
        tokens: Tokens to measure at most, in the corpus' order; None measures all.
        max_length: Tokens at which a text is cut off; None takes the model's positions, at most
            8192.
        batch_tokens: Tokens of a forward pass, padding included; a longer text runs alone. Moves
            time and memory, and results by no more than the rounding of a forward pass.
        cache: Cache folder; None is `$EDITKIT_CACHE` or ~/.cache/editkit.
        progress: Show a bar.

    Returns:
        Moments by the site's path.

    Raises:
        ValueError: If a number is below 1, the corpus has no tokens, what enters a site is not
            finite, or the cache folder cannot be written.
    """
    given = {"tokens": tokens, "max_length": max_length, "batch_tokens": batch_tokens}
    for name, number in given.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; give at least 1")
    length = min(max_length or LONGEST, lm.max_positions)
    identity = identity_of(lm)
    if identity is None:
        log.warning("%s has no weight files; its moments are not kept", lm.spec.id)
    else:
        identity |= {"corpus": corpus.sha256, "tokens": tokens, "max_length": length}
    kept = KeptTensors(cache_folder(cache) / "moments", identity)
    found = {site.path: moments for site in sites if (moments := _load(kept, site)) is not None}
    everywhere = set.intersection(*from_all_ranks(set(found)))  # machines may not share a cache
    found = {path: found[path] for path in everywhere}
    if missing := [site for site in sites if site.path not in found]:
        kept.check_writable()
        progress = progress and Ranks.present().rank == 0
        rows = _encode(lm, corpus, tokens, length, progress)
        found |= _measure(lm, missing, rows, batch_tokens, progress)
        for site in missing if Ranks.present().rank == 0 else ():
            _save(kept, site, found[site.path])
    _warn_of_few(sites, found, corpus)
    return {site.path: found[site.path] for site in sites}


def _encode(
    lm: EditableLM, corpus: Corpus, tokens: int | None, length: int, progress: bool
) -> list[Ids]:
    """Return the token ids of the texts, longest first, cut at `length` and in all at `tokens`."""
    rows: list[Ids] = []
    left = float("inf") if tokens is None else tokens
    with _bar("texts", len(corpus.texts), progress) as bar:
        for start in range(0, len(corpus.texts), TEXTS):
            texts = corpus.texts[start : start + TEXTS]
            for ids in lm.tokenizer(texts, verbose=False)["input_ids"]:
                row = array("i", ids[: int(min(length, left))])
                left -= len(row)
                rows += [row] if row else []
            bar.advance(bar.task_ids[0], len(texts))
            if left <= 0:
                break
    if not rows:
        raise ValueError(f"corpus {corpus.name!r} has no tokens; give longer texts")
    return sorted(rows, key=len, reverse=True)


@torch.no_grad()
def _measure(
    lm: EditableLM, sites: list[Site], rows: list[Ids], batch_tokens: int, progress: bool
) -> dict[str, Moments]:
    """Run the rows once, up to the block of the last site."""
    ranks, count, device = ranks_of(lm.model), sum(map(len, rows)), lm.device
    place = torch.device("cpu") if device.type == "mps" else device  # MPS has no fp64
    blank_F = torch.zeros(1, dtype=torch.float64, device=place)
    sums = {site.path: blank_F.new_zeros(site.in_features, site.in_features) for site in sites}
    with (
        lm.unedited(),
        torch.autocast(device.type, enabled=False),
        _bar("tokens", count, progress) as bar,
    ):
        for batch in islice(_batches(rows, batch_tokens), ranks.rank, None, ranks.size):
            _add(lm, sites, batch, sums)
            bar.advance(bar.task_ids[0], ranks.size * sum(map(len, batch)))
    ranks.add_up([*sums.values()])
    found = {}
    for site in sites:
        sum_FF = sums.pop(site.path)
        if not bool(sum_FF.isfinite().all()):
            raise ValueError(
                f"what enters {site.path} is not finite on the corpus; is the model damaged, or "
                "its dtype too narrow? try lm.dtype bfloat16 or float32"
            )
        cov_FF = (sum_FF + sum_FF.T) / (2 * count)
        found[site.path] = Moments(cov_FF.cpu(), count, condition(cov_FF))
        log.info(
            "moments of %s: %d tokens, condition %.3g", site.path, count, found[site.path].condition
        )
    return found


def _add(lm: EditableLM, sites: list[Site], batch: list[Ids], sums: dict[str, Tensor]) -> None:
    """Add the products of one forward pass to the sums."""
    tokens = lm.policy.pad([row.tolist() for row in batch], [[] for _ in batch], [-1] * len(batch))
    last = max(site.layer for site in sites)
    with tap(lm.blocks[last], stop=True), ExitStack() as stack:
        modules = [(site, lm.model.get_submodule(site.path)) for site in sites]
        taps = [(site, stack.enter_context(tap(m, inputs=True))) for site, m in modules]
        lm(tokens.to(lm.device))
    for site, (inputs_BTF,) in taps:
        keys_NF = inputs_BTF[tokens.mask_BT.to(inputs_BTF.device)]
        keys_NF = keys_NF.to(sums[site.path].device).double()
        sums[site.path].addmm_(keys_NF.T, keys_NF)


def _batches(rows: list[Ids], batch_tokens: int) -> Iterator[list[Ids]]:
    """Part rows, longest first, so that each part fits the budget when padded."""
    start = 0
    while start < len(rows):
        count = max(1, batch_tokens // len(rows[start]))
        yield rows[start : start + count]
        start += count


def condition(cov_FF: Tensor) -> float:
    """Return the condition number of a symmetric matrix; infinite where its rank is not full."""
    values_F = torch.linalg.eigvalsh(cov_FF)
    low, high = float(values_F[0]), float(values_F[-1])
    return high / low if low > len(values_F) * torch.finfo(values_F.dtype).eps * high else torch.inf


def _load(kept: KeptTensors, site: Site) -> Moments | None:
    if (found := kept.load(site.path)) is None:
        return None
    cov_FF, notes = found
    log.info("moments of %s: from the cache, %s tokens", site.path, notes["count"])
    return Moments(cov_FF, int(notes["count"]), float(notes["condition"]))


def _save(kept: KeptTensors, site: Site, moments: Moments) -> None:
    notes = {"count": str(moments.count), "condition": repr(moments.condition)}
    kept.save(site.path, moments.cov_FF, **notes)


def _warn_of_few(sites: Sequence[Site], found: dict[str, Moments], corpus: Corpus) -> None:
    """Say where there are fewer tokens than inputs, so that the moments must be singular."""
    few = [site for site in sites if found[site.path].count < site.in_features]
    for site in few[:1]:
        log.warning(
            "%d tokens of %s for %d inputs of %s%s: the moments are singular; give more text",
            found[site.path].count, corpus.name, site.in_features, site.path,
            f" and {len(few) - 1} further sites" if few[1:] else "",
        )  # fmt: skip


def _bar(unit: str, total: int, progress: bool) -> Progress:
    """Make a bar of the corpus' texts or tokens, with the time that is left."""
    columns = [
        TextColumn("moments"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.description}"),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    silent = not (progress and console.is_terminal)
    bar = Progress(*columns, console=console, disable=silent, transient=True)
    bar.add_task(unit, total=total)
    return bar
