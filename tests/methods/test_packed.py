"""A base model whose weights lie packed, as in 4 bits: what edits it, and what says it cannot.

Linear layers are replaced as Lightning's bitsandbytes plugin does it, after sites are wrapped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from editkit.edits import Probe
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method
from editkit.methods.lora import LoRA
from editkit.methods.memit import MEMIT
from editkit.methods.prune import PRUNE
from editkit.methods.rect import RECT
from editkit.metrics.protocol import EvalProtocol

METHODS = Path(__file__).parents[2] / "experiments" / "method"


class Packed(nn.Linear):
    """Two weights of 4 bits in a byte, in one column."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.bias = linear.bias
        self.unit = linear.weight.detach().abs().max() / 7
        flat = ((linear.weight.detach() / self.unit).round() + 8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((flat[::2] * 16 + flat[1::2])[:, None], requires_grad=False)

    def forward(self, x):
        pair = torch.stack([self.weight[:, 0] // 16, self.weight[:, 0] % 16], 1)
        weight = (pair.view(self.out_features, self.in_features).float() - 8) * self.unit
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def pack(module):
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, Packed(child))
        else:
            pack(child)


@pytest.fixture
def packed(tiny, located):
    def start(name, cls=None):
        config = yaml.safe_load((METHODS / f"{name}.yaml").read_text())
        arguments = {**config["init_args"], **(located(cls) if cls else {})}
        method = build_method(
            config["class_path"],
            lm=LMSpec(id=tiny("llama")),
            evaluation=EvalProtocol(),
            **arguments,
        )
        method.configure_model()
        pack(method.lm.model)
        return method

    return start


@pytest.mark.parametrize("name", ["memoir", "lora"])
def test_what_a_plugin_puts_in_the_place_of_linear_waits_until_weights_are_there(
    name, tiny, monkeypatch
):
    class TooEarly(nn.Linear):
        """Lightning's plugins stand in for `nn.Linear` while `configure_model` runs."""

    method = build_method(
        f"editkit.methods.{name}.{'LoRA' if name == 'lora' else 'MEMOIR'}",
        lm=LMSpec(id=tiny("llama")),
        evaluation=EvalProtocol(),
        **yaml.safe_load((METHODS / f"{name}.yaml").read_text())["init_args"],
    )
    monkeypatch.setattr(torch.nn, "Linear", TooEarly)
    method.configure_model()
    assert torch.nn.Linear is TooEarly
    assert not any(isinstance(module, TooEarly) for module in method.modules())


@pytest.mark.parametrize(("name", "cls"), [("memoir", None), ("wise", None), ("memit", MEMIT)])
def test_a_method_that_never_reads_the_weight_edits_a_packed_model(name, cls, packed, edits):
    method = packed(name, cls)
    found = method.apply_edits(edits[:1])
    assert found["loss_after"] < found["loss_before"]
    assert method.lm.vocabulary == 320
    asked = Probe("r", edits[0].id, "reliability", edits[0].prompt, edits[0].target)
    assert method.score([asked])[0]["scores"]["nll"] == pytest.approx(found["loss_after"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "cls"), [("rect", RECT), ("prune", PRUNE), ("wise_released", None)]
)
def test_a_method_that_computes_with_the_weight_says_so(name, cls, packed, edits):
    method = packed(name, cls)
    with pytest.raises(ValueError, match=r"a Packed is packed as torch.uint8, and this method"):
        method.apply_edits(edits[:1])
    assert not any(layer.is_active for layer in method.lm.layers.values())


def test_an_adapter_that_is_packed_itself_says_so(packed, edits):
    with pytest.raises(ValueError, match=r"lora_A.* is packed as torch.uint8"):
        packed("lora", LoRA).apply_edits(edits[:1])
