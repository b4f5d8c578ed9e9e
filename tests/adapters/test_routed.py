"""Routing: once per prompt, held while decoding, rows without a slot keep the base's bits."""

import pytest
import torch
from torch import nn

from editkit.adapters import routed
from editkit.adapters.base import Scope
from editkit.adapters.routed import Route, RoutedLayer, groups_of


class Positive(RoutedLayer):
    """Answers the rows whose prompt has a positive first feature; adds the slot's number."""

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.is_written = True
        self.looks = 0

    def route(self, x_BTF, prompt_BT):
        self.looks += 1
        mean_B = (x_BTF[..., 0] * prompt_BT).sum(1)
        slot_B = torch.arange(len(x_BTF)).where(mean_B > 0, -1)
        return Route.of(slot_B, mean_B, x_BTF[:, 0] > 0)

    def recall(self, x_RTF, route):
        return route.slot_B[:, None, None].float().expand(*x_RTF.shape[:2], 5) + 1


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Positive(nn.Linear(3, 5))


@pytest.fixture
def prompt():
    x_BTF = torch.randn(4, 6, 3)
    x_BTF[..., 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    return x_BTF


def everywhere(x_BTF):
    return torch.ones(x_BTF.shape[:2], dtype=torch.bool)


def test_only_rows_with_a_slot_change(layer, prompt):
    layer.scope.prompt_BT = everywhere(prompt)
    out, base = layer(prompt), layer.base_layer(prompt)
    assert torch.equal(out[[1, 3]], base[[1, 3]])
    assert torch.allclose(out[[0, 2]], base[[0, 2]] + torch.tensor([1.0, 3.0])[:, None, None])
    layer.scope.prompt_BT = everywhere(prompt)
    assert torch.equal(layer(-prompt)[[0, 2]], layer.base_layer(-prompt)[[0, 2]])
    nobody = prompt.clone()
    nobody[..., 0] = -1
    layer.scope.prompt_BT = everywhere(nobody)
    assert torch.equal(layer(nobody), layer.base_layer(nobody))


def test_the_route_is_held_while_decoding(layer, prompt):
    layer.scope.prompt_BT = everywhere(prompt)
    layer(prompt)
    layer.scope.prompt_BT = None
    for _ in range(3):
        token = -prompt[:, :1]  # would be routed the other way round
        changed = (layer(token) != layer.base_layer(token)).flatten(1).any(1)
        assert changed.tolist() == [True, False, True, False]
    assert layer.looks == 1


def test_rows_are_grouped_by_slot_in_order_and_once_a_prompt(monkeypatch):
    assert [(s, rows.tolist()) for s, rows in groups_of(torch.tensor([4, 0, 4, 4, 2]))] == [
        (0, [1]), (2, [4]), (4, [0, 2, 3]),
    ]  # fmt: skip
    calls = []
    monkeypatch.setattr(routed, "groups_of", lambda slot_R: calls.append(slot_R.tolist()))
    route = Route.of(torch.tensor([-1, 3, -1, 1]), torch.ones(4))
    for _ in range(3):
        assert route.answered.slot_B.tolist() == [3, 1]
        assert route.answered.groups is None
    assert calls == [[3, 1]]
    assert route.answered.answered is route.answered


def test_rows_that_leave_take_their_routes_along(layer, prompt):
    layer.scope.prompt_BT = everywhere(prompt)
    layer(prompt)
    layer.scope.prompt_BT = None
    layer.scope.keep(torch.tensor([3, 2]))
    token = prompt[[3, 2], :1]
    added = layer(token) - layer.base_layer(token)
    assert torch.allclose(added[:, 0, 0], torch.tensor([0.0, 3.0]))
    assert layer.looks == 1


def test_a_new_prompt_is_routed_anew_whatever_its_length(layer, prompt):
    layer.scope.prompt_BT = everywhere(prompt)
    layer(prompt)
    layer.scope.prompt_BT = everywhere(prompt[:, :1])
    assert layer.scope.routes == {}
    layer(-prompt[:, :1])
    assert layer.looks == 2
    assert layer.scope.routes[layer].slot_B.tolist() == [-1, 1, -1, 3]


def test_without_a_scope_several_tokens_are_a_prompt_and_one_continues_it(layer, prompt):
    out = layer(prompt)
    assert (out != layer.base_layer(prompt)).flatten(1).any(1).tolist() == [True, False] * 2
    layer(-prompt[:, :1])
    assert layer.looks == 1
    layer(prompt[:2, :1])  # other rows: a prompt of its own
    layer(prompt)
    assert layer.looks == 3


def test_layers_of_one_scope_hold_routes_of_their_own(prompt):
    scope, layers = Scope(), [Positive(nn.Linear(3, 5)) for _ in range(2)]
    for layer in layers:
        layer.scope = scope
    scope.prompt_BT = everywhere(prompt)
    layers[0](prompt)
    layers[1](-prompt)
    assert [scope.routes[layer].slot_B.tolist() for layer in layers] == [
        [0, -1, 2, -1],
        [-1, 1, -1, 3],
    ]


def test_inputs_without_rows_of_tokens_are_refused(layer):
    with pytest.raises(ValueError, match=r"Positive got an input of shape \(4, 3\)"):
        layer(torch.randn(4, 3))
