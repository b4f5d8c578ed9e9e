"""The contract every method keeps; a method joins by having a YAML in experiments/method."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import editkit
from editkit.api import EditedLM
from editkit.data.base import EditDataModule
from editkit.edits import Probe
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method
from editkit.methods.base import UndoError
from editkit.methods.snapshot import restore_snapshot, take_snapshot
from editkit.metrics.protocol import EvalProtocol

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "experiments" / "method").glob("*.yaml"))
# edits share weights, for good or until their window closes, or what is written is a part
MAY_REFUSE_UNDO = {"ft", "ft_breadth_first", "lora", "rect", "repair", "wise", "wise_released"}
PROMPTS = ["the capital of Alba is", "Question : where lives Elda ? Answer :", "a small town"]

pytestmark = pytest.mark.parametrize("path", YAMLS, ids=[p.stem for p in YAMLS])


@pytest.fixture(params=["llama", "gpt2"])
def make(request, tiny, located, path):
    """Build the YAML's method on a tiny model."""
    config = yaml.safe_load(path.read_text())
    folder = tiny(request.param)
    module, _, name = config["class_path"].rpartition(".")
    fitting = located(getattr(importlib.import_module(module), name))

    def build(**overrides):
        return build_method(
            config["class_path"],
            lm=LMSpec(id=folder),
            evaluation=EvalProtocol(),
            **{**config.get("init_args", {}), **fitting, **overrides},
        )

    return build


class Stream(EditDataModule):
    def __init__(self, stream, **kwargs):
        super().__init__(**kwargs)
        self.stream = stream

    def load(self):
        probes = [Probe(f"{e.id}", e.id, "reliability", e.prompt, e.target) for e in self.stream]
        return list(self.stream), probes


def test_edit_layers_stand_on_the_models_device_whatever_the_default(make, monkeypatch):
    method = make()
    lm = EditableLM.load(method.spec)
    monkeypatch.setattr(EditableLM, "load", lambda *_: lm)
    with torch.device("meta"):  # a Trainer makes its GPU the default
        method.configure_model()
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    assert lm.layers
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def logits(method, targets=None):
    with torch.no_grad():
        return method.lm.forward(method.lm.encode(PROMPTS, targets))


def edited(make, edits, **overrides):
    lm = EditedLM(make(**overrides))
    lm.edit_batch(edits[:2])
    lm.edit_batch(edits[2:3])
    return lm


def train(method, stream, folder, **kwargs):
    """Run a method under a Trainer as the command line does."""
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(
        folder, every_n_train_steps=1, save_last=True, save_top_k=-1
    )
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, num_sanity_val_steps=0,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpoint], use_distributed_sampler=False,
        **{k: v for k, v in kwargs.items() if k != "ckpt_path"},
    )  # fmt: skip
    trainer.fit(method, Stream(stream), ckpt_path=kwargs.get("ckpt_path"))
    return method


def state(method):
    return {
        f"{path}.{name}": tensor.clone()
        for path, layer in method.lm.layers.items()
        for name, tensor in layer.edit_state().items()
    }


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_binds_without_loading_weights(make):
    method = make()
    assert method.lm is None
    again = make(**method.init_args())
    assert again.init_args() == method.init_args()


def test_is_the_base_model_bit_for_bit_before_the_first_edit(make):
    lm = EditedLM(make())
    base = AutoModelForCausalLM.from_pretrained(lm.method.spec.id).eval()
    tokens = lm.lm.encode(PROMPTS)
    with torch.no_grad():
        expected = base(
            input_ids=tokens.ids_BT,
            attention_mask=tokens.mask_BT.long(),
            position_ids=tokens.positions_BT,
        ).logits
    assert lm.lm.layers
    assert torch.equal(lm.lm.forward(tokens), expected)


def test_never_writes_the_base_and_is_it_again_when_unedited(make, edits):
    lm = EditedLM(make())
    before = logits(lm.method)
    weights = {k: v.clone() for k, v in lm.lm.model.named_parameters() if "base_layer" in k}
    lm.edit_batch(edits)
    after = dict(lm.lm.model.named_parameters())
    assert weights
    assert all(torch.equal(w, after[k]) for k, w in weights.items())
    assert not torch.equal(logits(lm.method), before)
    with lm.unedited():
        assert torch.equal(logits(lm.method), before)


def test_an_edit_raises_its_targets_probability(make, edits):
    lm = edited(make, edits)
    assert [e["edit_id"] for e in lm.ledger] == [0, 1, 2]
    assert all(e["loss_after"] < e["loss_before"] for e in lm.ledger)
    assert all(e["change_norm"] > 0 for e in lm.ledger)


def test_saved_and_loaded_in_a_fresh_model_gives_equal_logits(make, edits, tmp_path):
    lm = edited(make, edits)
    lm.save(tmp_path / "run")
    again = editkit.load_edited(tmp_path / "run", trust=True)
    assert torch.equal(logits(again.method), logits(lm.method))
    assert again.method.edits_seen == 3
    assert again.ledger == lm.ledger


def test_a_loaded_run_goes_on_and_undoes_as_the_run_that_was_saved(make, edits, tmp_path):
    lm = edited(make, edits)
    lm.save(tmp_path / "run")
    again = editkit.load_edited(tmp_path / "run", trust=True)
    before = state(again.method)
    refused = ""
    try:
        again.edit_batch(edits[3:])
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "go on from its checkpoint" in refused
        assert same_bits(state(again.method), before)
        return
    lm.edit_batch(edits[3:])
    assert nearly_same(again, lm)
    assert is_undone(again, 3) == is_undone(lm, 3)
    assert nearly_same(again, lm)


def nearly_same(one, other):
    """Scores that are found again in another batch are not the same bits."""
    one, other = state(one.method), state(other.method)
    return one.keys() == other.keys() and all(
        one[k].shape == other[k].shape and torch.allclose(one[k].double(), other[k].double())
        for k in one
    )


def is_undone(lm, edit_id):
    try:
        lm.undo(edit_id)
    except UndoError:
        return False
    return lm.ledger[edit_id]["undone"]


def test_resumed_run_ends_where_a_straight_run_ends(make, edits, tmp_path):
    straight = train(make(), edits, tmp_path / "a")
    train(make(), edits, tmp_path / "b", max_steps=2)
    resumed = train(make(), edits, tmp_path / "b", ckpt_path=str(tmp_path / "b" / "last.ckpt"))
    assert resumed.edits_seen == straight.edits_seen == len(edits)
    assert same_bits(state(resumed), state(straight))
    timeless = [[{**e, "time": 0, "seconds": 0} for e in m.ledger] for m in (resumed, straight)]
    assert timeless[0] == timeless[1]


def test_merges_to_equal_logits_or_refuses(make, edits, tmp_path):
    lm = edited(make, edits)
    if any(layer.merged_delta() is None for layer in lm.lm.layers.values()):
        with pytest.raises(ValueError, match="cannot export"):
            lm.export(tmp_path / "out")
        return
    lm.export(tmp_path / "out")
    plain = editkit.load(str(tmp_path / "out"), method="ft").lm
    tokens = lm.lm.encode(PROMPTS)
    with torch.no_grad():
        difference = (plain.forward(tokens) - lm.lm.forward(tokens)).abs()[tokens.mask_BT]
    assert difference.max() < 1e-4 * lm.lm.forward(tokens).abs().max()


def test_generates_with_a_cache_what_it_generates_without(make, edits):
    lm = edited(make, edits)
    batched = lm.lm.generate(PROMPTS, max_new_tokens=8)
    right = lm.lm.generate(lm.lm.encode(PROMPTS, padding="right"), max_new_tokens=8)
    single = [lm.lm.generate([p], max_new_tokens=8)[0] for p in PROMPTS]
    assert batched == right == single == [_without_cache(lm.lm, p, 8) for p in PROMPTS]


@torch.no_grad()
def _without_cache(lm, prompt, budget):
    """Decode greedily by whole passes; what decodes is scored as target text, the prompt stays."""
    tokens = lm.encode([prompt])
    ids = tokens.ids_BT[0].tolist()
    start = len(ids)
    for _ in range(budget):
        whole = lm.policy.pad([ids[:start]], [ids[start:]], [-1])
        ids.append(int(lm.forward(whole)[0, -1].argmax()))
        if ids[-1] in lm.eos_ids:
            ids.pop()
            break
    return lm.tokenizer.decode(ids[start:], skip_special_tokens=True).removeprefix(" ")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch_mates_or_padding(make, edits, padding):
    lm = edited(make, edits).lm
    targets = ["Rome", "St. Louis", "big city in Oslo"]
    tokens = lm.encode(PROMPTS, targets, padding=padding)
    together = lm.forward(tokens)
    for row, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        alone = lm.forward(lm.encode([prompt], [target]))[0]
        difference = (together[row][tokens.mask_BT[row]] - alone).abs().max()
        assert difference < 1e-4 * alone.abs().max()


def test_what_the_prompt_gives_does_not_depend_on_the_answer(make, edits):
    lm = edited(make, edits).lm
    one, other = (lm.encode(PROMPTS, [t] * 3) for t in ("Rome", "a big city"))
    width = int(one.prompt_BT.sum(1).min())
    difference = lm.forward(one)[:, :width] - lm.forward(other)[:, :width]
    assert difference.abs().max() < 1e-4


def test_same_seed_gives_the_same_bits(make, edits):
    one, other = edited(make, edits, seed=3), edited(make, edits, seed=3)
    assert same_bits(state(one.method), state(other.method))


def test_leaves_the_model_in_eval_mode_without_base_gradients(make, edits):
    lm = edited(make, edits)
    lm.method.train()
    assert not any(m.training for m in lm.lm.modules())
    grads = {k: p for k, p in lm.lm.model.named_parameters() if p.grad is not None}
    assert not grads
    trained = [k for k, p in lm.lm.model.named_parameters() if p.requires_grad]
    owned = [f"{s}.{n}" for s, la in lm.lm.layers.items() for n in la.edit_parameters()]
    assert sorted(trained) == sorted(owned)


def test_undo_is_exact_or_refused_with_a_reason(make, edits, path):
    lm = EditedLM(make())
    lm.edit_batch(edits[:1])
    before = copy.deepcopy(state(lm.method))
    lm.edit_batch(edits[1:2])
    refused = False
    try:
        lm.undo(1)
    except UndoError:
        refused = True
    if refused:
        assert path.stem in MAY_REFUSE_UNDO
        with pytest.raises(UndoError, match="cannot undo edit 1: "):
            lm.undo(1)
        assert not any(e["undone"] for e in lm.ledger)
        return
    assert lm.ledger[1]["undone"]
    fresh = EditedLM(make())
    fresh.edit_batch(edits[:1])
    assert same_bits(state(lm.method), before) or torch.allclose(
        logits(lm.method), logits(fresh.method), atol=1e-5
    )


def test_restored_to_a_commit_it_goes_on_as_if_nothing_had_been(make, edits):
    one, other = edited(make, edits).method, edited(make, edits).method
    kept = take_snapshot(one)
    one.apply_edits(edits[3:])
    restore_snapshot(one, kept)
    assert same_bits(state(one), state(other))
    for method in (one, other):
        method.apply_edits(edits[3:])
    assert same_bits(state(one), state(other))
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    timeless = [[{**e, "time": 0, "seconds": 0} for e in m.ledger] for m in (one, other)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_edits_are_fp32_in_every_precision(make, edits, tmp_path, precision):
    method = train(make(), edits[:1], tmp_path, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert method.lm.model.get_input_embeddings().weight.dtype == dtype
    assert {v.dtype for v in state(method).values() if v.is_floating_point()} == {torch.float32}
    assert method.ledger[0]["loss_after"] < method.ledger[0]["loss_before"]
