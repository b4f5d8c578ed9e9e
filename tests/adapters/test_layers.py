"""Edit layers: written through one door, exact when off, fp32 whatever the base."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editkit.adapters.base import attach, disabled, edit_layers
from editkit.adapters.delta import DeltaLayer


@pytest.fixture(params=[lambda: nn.Linear(3, 5), lambda: Conv1D(5, 3)], ids=["Linear", "Conv1D"])
def base(request):
    torch.manual_seed(0)
    return request.param()


def test_weight_is_always_out_by_in(base):
    layer = DeltaLayer(base)
    assert layer.weight_oi.shape == layer.delta.shape == (5, 3)
    x = torch.randn(2, 3)
    assert torch.allclose(x @ layer.weight_oi.T + base.bias, base(x), atol=1e-6)


def test_delta_adds_its_product(base):
    layer, x = DeltaLayer(base), torch.randn(2, 4, 3)
    assert torch.equal(layer(x), base(x))
    delta = torch.randn(5, 3)
    layer.add(delta)
    layer.add(delta)
    assert torch.allclose(layer(x), base(x) + x @ (2 * delta).T, atol=1e-5)
    assert torch.equal(layer.merged_delta(), 2 * delta)
    assert layer.moved == pytest.approx(float(delta.norm()) * 2**0.5)
    with disabled([layer]):
        assert torch.equal(layer(x), base(x))


def test_scratch_is_seen_while_open_and_kept_only_by_commit(base):
    layer, x = DeltaLayer(base), torch.randn(2, 3)
    leaf = layer.open()["delta"]
    leaf.data.fill_(1.0)
    assert torch.allclose(layer(x), base(x) + x.sum(-1, keepdim=True), atol=1e-5)
    layer(x).sum().backward()
    assert leaf.grad is not None
    assert layer.delta.grad is None
    layer.discard()
    assert torch.equal(layer(x), base(x))
    layer.open()["delta"].data.fill_(2.0)
    layer.commit()
    assert float(layer.delta.detach().mean()) == 2.0
    assert layer.is_written


def test_a_wrong_or_diverged_change_is_refused(base):
    layer = DeltaLayer(base)
    with pytest.raises(ValueError, match=r"shape \(3, 5\) does not fit a weight of \(5, 3\)"):
        layer.add(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="norm nan"):
        layer.add(torch.full((5, 3), float("nan")))
    assert not layer.is_written


def test_bf16_forward_follows_every_change():
    layer = DeltaLayer(nn.Linear(3, 5, bias=False).bfloat16())
    x = torch.randn(2, 3).bfloat16()
    for _ in range(2):
        layer.add(torch.ones(5, 3))
        expected = layer.base_layer(x) + x @ layer.delta.detach().bfloat16().T
        assert torch.equal(layer(x), expected)


def test_state_holds_the_edit_alone_and_loads_into_grown_buffers():
    class Growing(DeltaLayer):
        def __init__(self, base_layer):
            super().__init__(base_layer)
            self.register_buffer("keys", torch.zeros(0, 3))

    one, other = Growing(nn.Linear(3, 5)), Growing(nn.Linear(3, 5))
    one.keys = torch.ones(4, 3)
    one.add(torch.ones(5, 3))
    assert sorted(one.edit_state()) == ["delta", "keys"]
    other.load_state_dict(one.edit_state(), strict=False)
    assert torch.equal(other.keys, one.keys)
    assert other.is_written


def test_attach_names_what_is_wrong():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Embedding(2, 3))
    layer = attach(model, "0", DeltaLayer)
    assert edit_layers(model) == {"0": layer}
    with pytest.raises(ValueError, match="no module '7' in Sequential"):
        attach(model, "7", DeltaLayer)
    with pytest.raises(ValueError, match="'1' is a ReLU, not a linear layer"):
        attach(model, "1", DeltaLayer)
    with pytest.raises(ValueError, match="'2' is a Embedding, not a linear layer"):
        attach(model, "2", DeltaLayer)
    with pytest.raises(ValueError, match="already carries"):
        attach(model, "0", DeltaLayer)
