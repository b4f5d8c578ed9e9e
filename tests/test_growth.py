"""What a stream leaves in a memory, as it is forecast and as it comes."""

from __future__ import annotations

import pytest

from editkit.api import load
from editkit.edits import Edit
from editkit.growth import growth_of
from editkit.methods import side
from editkit.methods.grace import GRACE
from editkit.methods.memoir import MEMOIR
from editkit.methods.repair import REPAIR
from editkit.methods.shards import Fitting, Loop, Shards
from editkit.methods.wise import WISE

SUBJECTS = ["Alba", "Bera", "Cora", "Dora", "Elda"]
EDITS = [Edit(i, f"the capital of {s} is", "Oslo", s) for i, s in enumerate(SUBJECTS)]
SIDE = {"fitting": Fitting(steps=2, lr=0.1), "prefixes": []}


@pytest.fixture(autouse=True)
def few_unrelated(monkeypatch):
    monkeypatch.setattr(side, "HELD_OUT", 4)
    monkeypatch.setattr(side, "UNRELATED", 4)


def grown(lm, names):
    """Return the bytes of a memory's tables."""
    tables = lm.method.memory.state_dict()
    return sum(t.numel() * t.element_size() for n, t in tables.items() if n.endswith(names))


def written(tiny, cls, **arguments):
    lm = load(tiny("llama"), cls, layer=1, **arguments)
    for edit in EDITS:
        lm.edit_batch([edit])
    return lm


@pytest.mark.parametrize("mask", ["elementwise", "columns"])
@pytest.mark.parametrize(("retrieve", "pools"), [(True, 3), (False, 2)])
def test_pools_of_wise(tiny, mask, retrieve, pools):
    """Five edits: two merged pools of two, or one of four, and the open shard."""
    shards = Shards(density=0.5, mask=mask, save=1, merge=2, retrieve=retrieve)
    lm = written(tiny, WISE, shards=shards, **SIDE)
    assert len(lm.method.memory.pools) == pools
    found = growth_of(lm.method, len(EDITS))
    one = grown(lm, ("deltas", "columns_PC")) / pools
    within = 1e-9 if mask == "elementwise" else 0.2  # which columns shards share is drawn
    assert found.saved == pytest.approx(one * (pools + 1), rel=within)  # a shard more at a merge
    sketch = lm.method.memory.pools.sketch_PSC
    assert found.derived == pytest.approx(4 * sketch[0].numel() * (pools + 1), rel=within)
    assert found.setting.endswith("columns" if mask == "elementwise" else "density")


def test_pools_of_repair_are_at_most_as_many_as_edits(tiny):
    shards = Shards(density=0.5, save=2, merge=6)
    lm = written(tiny, REPAIR, shards=shards, loop=Loop(enabled=False), **SIDE)
    assert len(lm.method.memory.pools) == len(EDITS)
    assert growth_of(lm.method, len(EDITS)).saved == grown(lm, ("deltas", "columns_PC"))


def test_keys_and_values_of_grace(tiny):
    lm = written(tiny, GRACE, steps=2, eps=1e-4)
    assert growth_of(lm.method, len(EDITS)).saved == grown(lm, ("values", "key_KF"))


@pytest.mark.parametrize("shield", [0.0, 1.0])
def test_masks_of_memoir_and_its_shield(tiny, shield):
    lm = written(tiny, MEMOIR, steps=2, k=8, shield=shield, prefixes=[])
    own = grown(lm, ("bits_KW", "edit_K", "slot_K", "text_K", "gram_FF"))
    assert growth_of(lm.method, len(EDITS)).saved == own
