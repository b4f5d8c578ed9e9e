"""LoRA: PEFT's own arithmetic, trained on the stream."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from editkit.api import load


def test_edited_logits_are_pefts_own(tiny):
    folder = tiny("llama")
    lm = load(folder, "lora", r=4, alpha=8, steps=5)
    lm.edit("the capital of Alba is", "Rome")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    values = {
        f"base_model.model.{site}.{name.removeprefix('peft_layer.')}": tensor
        for site, layer in lm.lm.layers.items()
        for name, tensor in layer.edit_state().items()
    }
    missing = peft.load_state_dict(values, strict=False)
    assert not missing.unexpected_keys
    tokens = lm.lm.encode(["the capital of Alba is"])
    assert torch.allclose(lm.lm.forward(tokens), peft(tokens.ids_BT).logits, atol=1e-5)


def test_adapts_the_roles_and_layers_it_is_given(tiny):
    lm = load(tiny("llama"), "lora", roles=("mlp.down",), layers=[1, 3])
    assert list(lm.lm.layers) == [f"model.layers.{i}.mlp.down_proj" for i in (1, 3)]
    assert lm.method.lowest == 1


def test_no_matching_site_is_an_error_that_lists_the_roles(tiny):
    with pytest.raises(ValueError, match=r"no site with role in \['attn.q'\].*attn.qkv"):
        load(tiny("gpt2"), "lora", roles=("attn.q",))


def test_pefts_random_start_follows_the_seed_and_leaves_the_global_state(tiny):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    starts = []
    for seed in (0, 0, 1):
        layer = next(iter(load(tiny("llama"), "lora", seed=seed).lm.layers.values()))
        starts.append(layer.edit_state()["peft_layer.lora_A.default.weight"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
