"""Keys of a memory are found again after the base has changed beneath it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.adapters.keys import Routing
from editkit.adapters.side import SideRouting
from editkit.api import EditedLM, load_edited
from editkit.lm.spec import LMSpec
from editkit.methods import side
from editkit.methods.grace import GRACE
from editkit.methods.memoir import MEMOIR
from editkit.methods.repair import REPAIR
from editkit.methods.shards import Fitting, Loop, Margins, Regroup, Shards
from editkit.methods.wise import WISE
from editkit.metrics.protocol import EvalProtocol

SIDE = {
    "routing": SideRouting(over="last", act_ratio=0.8),
    "fitting": Fitting(steps=20, lr=0.03, optimizer="adam"),
    "margins": Margins(0.1, 1.0, 0.5, relative=True),
    "prefixes": ["I lives in"],
}
METHODS = {
    GRACE: {"eps": 1e-3, "steps": 15, "lr": 0.3},
    MEMOIR: {"k": 16, "routing": Routing(tau=0.95), "prefixes": ["I lives in"]},
    WISE: {**SIDE, "shards": Shards(density=0.5, save=2, merge=4)},
    REPAIR: {
        **SIDE, "shards": Shards(density=0.5, save=1, merge=4), "loop": Loop(prune=0.2, errors=3),
        "regroup": Regroup(consistency=2.0),
        "routing": SideRouting(over="last", act_ratio=0.8, pick="typical"),  # as in its YAML
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_unrelated(monkeypatch):
    monkeypatch.setattr(side, "HELD_OUT", 8)
    monkeypatch.setattr(side, "UNRELATED", 8)


@pytest.fixture
def make(tiny):
    def build(cls, **kwargs):
        spec, protocol = LMSpec(id=tiny("llama")), EvalProtocol(batch_size=3)
        lm = EditedLM(cls(lm=spec, evaluation=protocol, layer=1, **{**METHODS[cls], **kwargs}))
        lm.method.start()
        return lm

    return build


def found(lm, edits) -> list[bool]:
    """Which edits answer their own prompts; a pool counts as each of those who live there."""
    owners = [who.edit_id for who in lm.method.routes([e.prompt for e in edits])]
    homes = getattr(lm.method.memory, "pools", None)
    place = (lambda i: i) if homes is None else homes.homes.get
    return [o is not None and place(o) == place(e.id) for o, e in zip(owners, edits, strict=True)]


@torch.no_grad()
def fine_tune(lm) -> None:
    """Move what is below the memory: all of it for keys, which are places; norms for thresholds."""
    is_norm = isinstance(lm.method, WISE)
    generator = torch.Generator().manual_seed(0)
    for weight in lm.lm.blocks[0].parameters():
        noise = torch.randn(weight.shape, generator=generator) * weight.std()
        weight.add_(noise * (0.02 if is_norm else 0.7))
    if is_norm:
        lm.lm.blocks[1].mlp.up_proj.weight.mul_(0.4)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_edits_are_found_again_and_answer_as_before(make, edits, cls, tmp_path):
    lm = make(cls)
    for edit in edits:
        lm.edit_batch([edit])
    assert all(found(lm, edits))
    lm.save(tmp_path / "run")
    again = load_edited(tmp_path / "run")  # as retention has it: no stream state
    values = {n: p.detach().clone() for n, p in again.method.memory.edit_parameters().items()}
    fine_tune(again)
    assert not all(found(again, edits))
    again.method.rekey(edits)
    assert all(found(again, edits))
    for name, parameter in again.method.memory.edit_parameters().items():
        assert torch.equal(parameter, values[name])


def test_repair_forgets_what_it_knew_of_its_edits_before(make, edits):
    lm = make(REPAIR)
    for edit in edits:
        lm.edit_batch([edit])
    health = lm.method.health
    before = {i: kept.inputs_TF.clone() for i, kept in health.kept.items()}
    fine_tune(lm)  # the very method that wrote them goes on, not one that was loaded
    assert not all(found(lm, edits))
    lm.method.rekey(edits)
    assert all(found(lm, edits))
    assert not any(torch.equal(health.kept[i].inputs_TF, x_TF) for i, x_TF in before.items())
    routes, homes = health.routes(), lm.method.memory.pools.homes
    assert routes == {i: homes[i] for i in routes}


def test_wordings_that_were_keys_are_found_again_and_others_are_not_added(make, edits):
    lm = make(MEMOIR, rephrase_keys=True)
    worded = [replace(e, rephrases=(f"Question : {e.prompt}",)) for e in edits]
    lm.edit_batch(worded[:2])
    keys = len(lm.method.memory.keys)
    fine_tune(lm)
    lm.method.rekey(worded)
    texts = [t for e in worded[:2] for t in (e.prompt, *e.rephrases)]
    assert [who.edit_id for who in lm.method.routes(texts)] == [0, 0, 1, 1]
    lm.method.rekey(worded)
    assert len(lm.method.memory.keys) == keys + 2  # the slots keep their own masks besides
