"""What a stream's moments were measured on: told in its summary, held fast when it goes on."""

from __future__ import annotations

import logging
from typing import Any

from editkit.lm.corpus import Corpus
from editkit.lm.moments import Moments

log = logging.getLogger(__name__)


def told_of(corpus: Corpus, found: dict[str, Moments], added: dict[str, float]) -> dict[str, Any]:
    """Return a corpus' identity, its tokens, and what was added to each site's diagonal."""
    for path, more in added.items():
        if more:
            log.warning("moments of %s are singular: %.2g on their diagonal", path, more)
    tokens = max(moments.count for moments in found.values())
    return {"name": corpus.name, "sha256": corpus.sha256, "tokens": tokens, "added": added}


def check_same(corpus: Corpus, told: dict[str, Any]) -> None:
    """Refuse a corpus other than the one that a stream was begun with.

    Args:
        corpus: Texts that were read now.
        told: What `told_of` returned when the stream began; empty where it begins now.

    Raises:
        ValueError: If the texts differ; names both hashes.
    """
    if told and told["sha256"] != corpus.sha256:
        raise ValueError(
            f"the stream was begun with the corpus {told['name']!r} (sha256 {told['sha256'][:12]}),"
            f" and {corpus.name!r} is another now (sha256 {corpus.sha256[:12]}): go on with the "
            "texts of then (--model.corpus; texts of the Hub are kept in the folder --model.cache),"
            " or begin a new run"
        )
