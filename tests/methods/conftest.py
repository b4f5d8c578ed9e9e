"""What the tests of the locate-then-edit family share: statistics on a tiny corpus."""

from __future__ import annotations

import inspect

import pytest

from editkit.methods.locate import LocateThenEdit

TEXT = (
    "the capital of Alba Bera Cora Dora Elda is Rome Paris Oslo Bern Lima city town big small "
    "where lives a he she works for and in was born . , St. Louis"
)


@pytest.fixture(scope="session")
def located(tmp_path_factory):
    """Return arguments that fit a class of the family to tiny models; none for other classes."""
    folder = tmp_path_factory.mktemp("corpus")
    words = TEXT.split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    (folder / "corpus.txt").write_text("\n".join(texts))
    own = {"ridge": 1.0, "nullspace_threshold": 5.0, "l2": 1.0, "norm_weight": 0.5}

    def arguments(cls) -> dict:
        if not issubclass(cls, LocateThenEdit):
            return {}
        takes = {name for base in cls.__mro__ for name in inspect.signature(base).parameters}
        return {
            "corpus": str(folder / "corpus.txt"),
            "cache": str(folder / "cache"),
            "layers": [1] if cls.one_by_one else [1, 2],
            "prefixes": [],  # keys of random models have little in common behind other texts
            "search": {"steps": 8, "lr": 0.5, "clamp": 2.0, "micro_batch": 3},
            **{name: value for name, value in own.items() if name in takes},
        }

    return arguments
