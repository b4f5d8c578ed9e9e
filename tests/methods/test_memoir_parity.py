"""MEMOIR as released, on the released code's own numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from editkit.adapters.keys import Routing
from editkit.edits import Edit
from editkit.functional.masks import unpack
from editkit.lm.spec import LMSpec
from editkit.methods.memoir import MEMOIR
from editkit.metrics.protocol import EvalProtocol


@pytest.fixture(scope="module")
def case(shared):
    folder = shared("parity/07_memoir")
    inputs = json.loads((folder / "inputs.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    return inputs, expected, tensors, load_file(folder / "inputs.safetensors")


@pytest.fixture(scope="module")
def method(case, shared):
    """The released settings; background and permutation are the case's."""
    inputs, _, _, given = case
    hparams = inputs["hparams"]
    method = MEMOIR(
        lm=LMSpec(id=str(shared("parity/models/tiny-llama-p"))),
        evaluation=EvalProtocol(),
        layer=4,
        k=hparams["top_k"],
        steps=hparams["n_iter"],
        lr=hparams["edit_lr"],
        prefixes=[t.removesuffix(" {}") for t in inputs["context_templates"] if t != "{}"],
        routing=Routing(tau=hparams["irr_threshold"], background=0, held_out=0),
        compat=True,
    )
    method.start()
    method.memory.permutation_F.copy_(given["permutation"])
    with torch.no_grad(), method.lm.unedited():
        method.centre_on(inputs["background_prompts"])
    return method


def apart(one, other):
    return float((one - other).norm() / other.norm())


def feature(method, prompt):
    with torch.no_grad(), method.lm.unedited():
        (pair,) = method.inputs([prompt])
    return method.memory.fingerprint(*pair)[0] - method.memory.mean_F, method.memory.masks(*pair)


def test_a_stream_of_edits_and_all_queries_are_as_released(case, method):
    inputs, expected, tensors, _ = case
    assert apart(method.memory.mean_F, tensors["background_mean"]) < 1e-5
    for i, (row, want) in enumerate(zip(inputs["edits"], expected["edits"], strict=True)):
        centred_F, mask_W = feature(method, row["prompt"])
        assert apart(centred_F, tensors[f"feature_centred.edit{i}"]) < 1e-5
        columns_F = method.memory.gates(mask_W)[0]
        assert torch.equal(columns_F, tensors[f"mask.edit{i}"].bool())
        numbers = method.apply_edits([Edit(i, row["prompt"], row["target_new"])])
        assert numbers["steps"] == want["n_sgd_steps"]
        assert numbers["loss"] == pytest.approx(want["loss"][-1], rel=1e-4)
        assert len(method.memory.keys) == want["n_stored_masks"]
        memory_DF = method.memory.memory.detach()
        assert apart(memory_DF, tensors[f"memory.after_edit{i}"]) < 1e-4
    stored_KF = method.memory.gates(method.memory.keys.bits_KW)
    assert torch.equal(stored_KF, tensors["stored_masks"].bool())
    for j, query in enumerate(expected["queries"]):
        check_query(method, j, query, tensors)


def check_query(method, j, query, tensors):
    appended = query["appended"]
    lm = method.lm
    tokens = lm.encode([query["prompt"]], None if appended is None else [appended])
    assert int(tokens.prompt_BT.sum()) == query["prompt_len"]
    (who,) = method.routes([query["prompt"]])
    assert who.match == pytest.approx(query["best_overlap"], abs=1e-6)
    if query["decision"] == "irrelevant":
        assert who.edit_id is None
    else:
        stored = method.memory.keys.edit_K.tolist()
        assert who.edit_id == stored[query["best_match"]]
    _, mask_W = feature(method, query["prompt"])
    shared = (unpack(mask_W, 128) & unpack(method.memory.keys.bits_KW, 128)).sum(1) / 32
    assert shared.tolist() == pytest.approx(query["overlap_ratios"], abs=1e-6)
    with torch.no_grad():
        logits_V = lm.forward(tokens)[0, -1]
    scale = tensors[f"logits_last.query{j}"].abs().max()
    assert (logits_V - tensors[f"logits_last.query{j}"]).abs().max() < 1e-4 * scale
