from __future__ import annotations

import pytest
import torch

from editkit.api import load
from editkit.edits import Edit
from editkit.methods.wordings import expanded, undisputed

EDITS = [Edit(i, f"p{i}", f"t{i}", rephrases=(f"p{i}a", f"p{i}b")) for i in range(2)]


def test_wordings_of_one_edit_stand_apart_and_keep_its_id_and_target():
    rows = expanded(EDITS, paraphrases=2, repeats=0)
    assert [e.prompt for e in rows] == ["p0", "p1", "p0a", "p1a", "p0b", "p1b"]
    assert [(e.id, e.target) for e in rows] == [(0, "t0"), (1, "t1")] * 3
    assert expanded(EDITS, 0, 2) == EDITS * 3
    assert expanded(EDITS, 0, 0) == EDITS


def test_a_prompt_belongs_to_the_edit_whose_own_it_is_and_to_the_latest_of_those():
    def kept(*edits):
        rows = expanded(list(edits), 1, 1)
        found = [rows[i] for i in undisputed(rows, [row.prompt for row in rows])]
        return [(row.id, row.prompt) for row in found]

    one, other = Edit(0, "p", "t", rephrases=("q",)), Edit(1, "q", "u", rephrases=("r",))
    assert kept(one, other) == [(0, "p"), (1, "q"), (0, "p"), (1, "q"), (1, "r")]
    assert kept(other, one) == [(1, "q"), (0, "p"), (1, "q"), (0, "p"), (1, "r")]
    again = Edit(2, "p", "v", rephrases=("s",))
    assert kept(one, again) == [(2, "p"), (2, "p"), (2, "s")]


@pytest.mark.parametrize("method", ["ft", "lora", "memoir"])
def test_rephrases_are_learnt_with_the_edit_and_repeats_leave_them_alone(tiny, edits, method):
    from editkit.adapters.keys import Routing

    own = {"ft": {}, "lora": {"roles": ("mlp.down",)},
           "memoir": {"k": 16, "prefixes": [], "routing": Routing(None, 0.01, 0, 0)}}  # fmt: skip
    losses = {}
    for name, counts in (("paraphrases", (1, 0)), ("repeats", (0, 1))):
        lm = load(
            tiny("llama"), method=method, steps=20, lr=1.0 if method == "memoir" else 0.02,
            paraphrases=counts[0], repeats=counts[1], **own[method],
        )  # fmt: skip
        lm.edit_batch(edits)
        assert [e["edit_id"] for e in lm.ledger] == [0, 1, 2, 3]
        assert lm.method.edits_seen == 4
        other = [Edit(e.id, e.rephrases[0], e.target) for e in edits]
        losses[name] = float(lm.method.edit_losses(other).mean())
        assert lm.method.init_args()["paraphrases"] == counts[0]
    assert losses["paraphrases"] < losses["repeats"] - 0.5


def test_an_edit_with_too_few_rephrases_is_refused_and_nothing_is_written(tiny, edits):
    lm = load(tiny("llama"), method="ft", steps=2, paraphrases=3)
    with pytest.raises(ValueError, match="has 1 rephrases and paraphrases is 3"):
        lm.edit_batch(edits)
    assert lm.ledger == []
    assert not any(layer.is_written for layer in lm.lm.layers.values())
    with pytest.raises(ValueError, match="repeats is -1"):
        load(tiny("llama"), method="ft", repeats=-1)


def test_breadth_first_goes_on_behind_paraphrases(tiny, edits):
    lm = load(tiny("llama"), method="ft", order="breadth_first", steps=2, paraphrases=1)
    lm.edit_batch(edits[:2])
    lm.edit_batch(edits[2:])
    assert lm.method.edits_seen == 4


def test_pairs_drop_every_column_of_an_edit():
    from editkit.functional.pairs import Pairs
    from editkit.functional.queue import Queue

    queue = Queue(kappa=1.0, D=None) if "D" in Queue.__dataclass_fields__ else Queue()
    pairs = Pairs(
        ids=(0, 1, 0, 1, 2), sizes=(4, 1), queues=(queue, queue), weights=(1.0, 1.0),
        keys_FN=torch.arange(10.0).view(2, 5), wanted_DN=torch.arange(5.0).view(1, 5),
    )  # fmt: skip
    assert pairs.is_together(0)
    left = pairs.without(1)
    assert (left.ids, left.sizes) == ((0, 0, 2), (2, 1))
    assert left.keys_FN.tolist() == [[0.0, 2.0, 4.0], [5.0, 7.0, 9.0]]
    assert left.without(0).sizes == (1,)
