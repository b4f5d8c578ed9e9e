"""EditableLM on every architecture, against plain transformers."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from editkit.adapters.delta import DeltaLayer
from editkit.lm.editable import EditableLM
from editkit.lm.sites import propose_causal_layers, propose_memory_layer
from editkit.lm.spec import LMSpec

DOWN = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma", *DOWN]
PROMPTS = ["the capital of Alba is", "Question : where lives Elda ? Answer :", "a small town"]
TARGETS = ["Rome", "St. Louis", "big city in Oslo"]


@pytest.fixture(params=ARCHITECTURES)
def lm(request, tiny):
    if request.param not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {request.param}")
    lm = EditableLM.load(LMSpec(id=tiny(request.param)))
    lm.name = request.param
    return lm


def written(lm, layer=1, scale=0.05):
    site = lm.attach(lm.site(layer).path, DeltaLayer)
    noise = torch.randn(site.delta.shape, generator=torch.Generator().manual_seed(1))
    site.add(noise * scale)
    return site


def test_finds_one_down_projection_a_block(lm):
    template = DOWN.get(lm.name, "model.layers.{}.mlp.down_proj")
    sites = [s for s in lm.sites if s.role == "mlp.down"]
    assert [s.path for s in sites] == [template.format(i) for i in range(4)]
    inner = lm.model.config.to_dict().get("intermediate_size") or 128
    assert all((s.out_features, s.in_features) == (32, inner) for s in sites)
    roles = {s.role for s in lm.sites}
    assert "attn.out" in roles
    assert roles & {"attn.qkv", "attn.q"}


def test_equals_plain_transformers_and_is_bit_exact_unedited(lm):
    base = AutoModelForCausalLM.from_pretrained(lm.spec.id).eval()
    tokens = lm.encode(PROMPTS, TARGETS)
    with torch.no_grad():
        plain = base(tokens.ids_BT, attention_mask=tokens.mask_BT.long()).logits
        ours = lm.forward(tokens)
        assert torch.allclose(ours[tokens.mask_BT], plain[tokens.mask_BT], atol=1e-5)
        written(lm)
        assert not torch.equal(lm.forward(tokens), ours)
        with lm.unedited():
            assert torch.equal(lm.forward(tokens), ours)


def test_an_edited_layer_equals_a_changed_weight(lm):
    site = written(lm)
    base = AutoModelForCausalLM.from_pretrained(lm.spec.id).eval()
    tokens = lm.encode(PROMPTS, TARGETS)
    with torch.no_grad():
        weight = base.get_submodule(lm.site(1).path).weight
        weight += site.delta.T if site.is_transposed else site.delta
        plain = base(tokens.ids_BT, attention_mask=tokens.mask_BT.long()).logits
        difference = (lm.forward(tokens) - plain)[tokens.mask_BT].abs().max()
    assert difference < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_batched_generation_equals_single_rows_and_transformers(lm, padding):
    written(lm)
    batched = lm.generate(lm.encode(PROMPTS, padding=padding), max_new_tokens=10)
    assert batched == [lm.generate([p], max_new_tokens=10)[0] for p in PROMPTS]
    for prompt, text in zip(PROMPTS, batched, strict=True):
        tokens = lm.encode([prompt])
        out = lm.model.generate(
            tokens.ids_BT, attention_mask=tokens.mask_BT.long(), max_new_tokens=10, do_sample=False
        )
        new = out[0, tokens.ids_BT.shape[1] :]
        expected = lm.tokenizer.decode(new, skip_special_tokens=True).removeprefix(" ")
        assert text == expected


def test_target_logits_are_those_of_the_whole_pass(lm):
    tokens = lm.encode(PROMPTS, TARGETS)
    with torch.no_grad():
        whole = lm.forward(tokens)[tokens.predicts_BT]
        assert torch.allclose(lm.target_logits(tokens), whole, atol=1e-5)
        for layer in (1, 3):
            hidden = lm.hidden_before(layer, tokens)
            assert torch.allclose(lm.target_logits(tokens, layer, hidden), whole, atol=1e-5)
        assert torch.allclose(lm.forward(tokens)[tokens.predicts_BT], whole, atol=1e-6)


def test_skipped_blocks_do_not_run_and_gradients_still_flow(lm):
    site = lm.attach(lm.site(2).path, DeltaLayer)
    tokens = lm.encode(PROMPTS, TARGETS)
    hidden = lm.hidden_before(2, tokens)
    calls = []
    lm.target_logits(tokens, 2, hidden)  # learns once what this version's blocks return
    mlp = lm.model.get_submodule(lm.site(0).path)
    handle = mlp.register_forward_hook(lambda *a: calls.append(1))
    leaf = site.open()["delta"]
    lm.target_logits(tokens, 2, hidden).sum().backward()
    assert not calls
    assert leaf.grad.abs().sum() > 0
    handle.remove()
    whole = site.open()["delta"]
    lm.target_logits(tokens).sum().backward()
    assert torch.allclose(leaf.grad, whole.grad, atol=1e-3 * float(whole.grad.abs().max()))


def test_stop_strings_end_a_row_early_without_cutting(tiny):
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    free = lm.generate(PROMPTS, max_new_tokens=24)
    mark = free[0][10]
    stopped = lm.generate(PROMPTS, max_new_tokens=24, stop=(mark,))
    for prompt, text, whole in zip(PROMPTS, stopped, free, strict=True):
        assert whole.startswith(text)
        assert mark in text or text == whole
        assert lm.generate([prompt], max_new_tokens=24, stop=(mark,)) == [text]


def test_bf16_edits_stay_fp32_when_the_model_moves(tiny):
    lm = EditableLM.load(LMSpec(id=tiny("llama"), dtype="bfloat16"))
    site = written(lm)
    before = site.delta.detach().clone()
    lm.to(torch.float16).to(torch.bfloat16)
    assert site.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(site.delta, before)
    tokens = lm.encode(PROMPTS)
    assert lm.forward(tokens).dtype == torch.bfloat16


def test_layers_are_proposed_by_depth_as_the_papers_chose():
    assert propose_causal_layers(32) == [4, 5, 6, 7, 8]
    assert propose_memory_layer(32) == 27
    assert propose_causal_layers(1) == [0]
    assert propose_memory_layer(1) == 0


def test_a_model_folder_may_say_where_it_recalls(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    facts = folder / "editkit.json"
    facts.write_text('{"causal_layers": [1, 3]}')
    lm = EditableLM.load(LMSpec(id=str(folder)))
    assert (lm.causal_layers, lm.memory_layer) == ([1, 3], propose_memory_layer(4))
    assert EditableLM.load(LMSpec(id=str(folder), causal_layers=[0])).causal_layers == [0]
    for text, error in (
        ('{"layers": [1]}', "may hold causal_layers"), ("{", "is not JSON"),
        ('{"causal_layers": [7]}', r"layer 7 is not in 0\.\.3"),
    ):  # fmt: skip
        facts.write_text(text)
        with pytest.raises(ValueError, match=error):
            EditableLM.load(LMSpec(id=str(folder)))


def test_wrong_layers_and_sites_are_refused_in_words(tiny):
    folder = tiny("llama")
    with pytest.raises(ValueError, match=r"layer 9 is not in 0\.\.3"):
        EditableLM.load(LMSpec(id=folder, memory_layer=9))
    lm = EditableLM.load(LMSpec(id=folder))
    with pytest.raises(ValueError, match=r"0 sites of role 'attn\.qkv'"):
        lm.site(0, "attn.qkv")
    with pytest.raises(ValueError, match=r"no module 'model\.nowhere'"):
        lm.attach("model.nowhere", DeltaLayer)
    with pytest.raises(ValueError, match="not a linear layer"):
        lm.attach("model.norm", DeltaLayer)
    lm.attach(lm.site(0).path, DeltaLayer)
    with pytest.raises(ValueError, match="already carries a DeltaLayer"):
        lm.attach(lm.site(0).path, DeltaLayer)
    with pytest.raises(ValueError, match="exceeds the 128"):
        lm.encode(["town " * 200])


def test_a_row_ends_at_the_models_last_position_whatever_its_batch_mates(tiny):
    """GPT-2's positions are a table of 128: one more would be an index error."""
    lm = EditableLM.load(LMSpec(id=tiny("gpt2")))
    prompts = ["the town is", "a " * 40 + "city"]
    together = lm.generate(prompts, max_new_tokens=500)
    assert together == [lm.generate([p], max_new_tokens=500)[0] for p in prompts]
    for prompt, text in zip(prompts, together, strict=True):
        assert len(lm.policy.ids([prompt])[0]) < 128
        assert text
