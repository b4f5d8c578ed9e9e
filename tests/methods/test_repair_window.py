"""A window that comes whole is trained once, and no edit of it is lost."""

import pytest

from editkit.api import EditedLM
from editkit.lm.spec import LMSpec
from editkit.methods.repair import REPAIR
from editkit.methods.shards import Fitting, Loop, Margins, Regroup, Shards
from editkit.metrics.protocol import EvalProtocol


@pytest.fixture
def make(tiny):
    def build(**kwargs):
        method = REPAIR(
            lm=LMSpec(id=tiny("llama")), evaluation=EvalProtocol(batch_size=8), layer=1,
            prefixes=["a small town"], shards=Shards(save=2, merge=4),
            margins=Margins(outside=0.1, inside=1.0, apart=0.5, relative=True),
            fitting=Fitting(steps=3, lr=0.5), **kwargs,
        )  # fmt: skip
        return EditedLM(method)

    return build


def test_a_whole_window_is_trained_once_and_its_parts_twice(make, edits):
    plain = {"regroup": Regroup(by_likeness=False), "loop": Loop(enabled=False)}
    whole, parts = make(**plain), make(**plain)
    whole.edit_batch(edits)
    for edit in edits:
        parts.edit_batch([edit])
    for lm, trained in ((whole, 4), (parts, 8)):
        assert lm.method.counts["trained"] == trained
        assert lm.method.memory.pools.homes == dict.fromkeys(range(4), 0)
        assert not lm.method.waiting


@pytest.mark.parametrize("consistency", [0.0, 2.0])
def test_every_edit_of_a_whole_window_has_a_home(make, edits, consistency):
    lm = make(regroup=Regroup(consistency=consistency), loop=Loop(correct=1.0, retries=0))
    lm.edit_batch(edits)
    assert sorted(lm.method.memory.pools.homes) == [0, 1, 2, 3]
    # three steps leave some wrong: those wait for the next window in shards of their own
    assert lm.method.waiting
    lm.edit_batch([edits[0]])
    assert sorted(lm.method.memory.pools.homes) == [0, 1, 2, 3]
