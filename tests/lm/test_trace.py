"""Contexts that read and write activations, on blocks that return tensors or tuples."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from editkit.lm import trace


class TupleBlock(nn.Module):
    """A block as transformers 4 has it: the hidden state leads a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return (x + self.linear(x), "cache")


class TupleModel(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(TupleBlock(width) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x, cache = block(x)
            assert cache == "cache"
        return x


def llama():
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval(), "model.layers.{}", "model.layers.{}.mlp.down_proj"


def gpt2():
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2)
    return GPT2LMHeadModel(config).eval(), "transformer.h.{}", "transformer.h.{}.mlp.c_proj"


def tuples():
    return TupleModel().eval(), "blocks.{}", "blocks.{}.linear"


def output(model, ids):
    result = model(ids)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.fixture(params=[llama, gpt2, tuples])
def case(request):
    torch.manual_seed(0)
    model, block, linear = request.param()
    return model, block.format, linear.format, torch.randint(20, (2, 5))


def test_read_block_output_is_the_next_blocks_input(case):
    model, block, _, ids = case
    with trace.read(model, [block(0), block(1)]) as outputs:
        output(model, ids)
    with trace.read(model, [block(1), block(2)], inputs=True) as inputs:
        output(model, ids)
    assert outputs[block(0)].shape == (2, 5, 8)
    torch.testing.assert_close(outputs[block(0)], inputs[block(1)])
    torch.testing.assert_close(outputs[block(1)], inputs[block(2)])


def test_read_input_of_a_linear_layer_gives_its_output(case):
    model, _, linear, ids = case
    with trace.read(model, [linear(1)], inputs=True) as keys, trace.read(model, [linear(1)]) as out:
        output(model, ids)
    layer = model.get_submodule(linear(1))
    torch.testing.assert_close(layer(keys[linear(1)]), out[linear(1)])


def test_replacing_every_clean_state_restores_the_clean_output(case):
    """Writing the clean block output into another input's run gives the clean run from there."""
    model, block, _, ids = case
    with trace.read(model, [block(1)]) as clean:
        expected = output(model, ids)
    with trace.change(model, {block(1): lambda _: clean[block(1)]}):
        torch.testing.assert_close(output(model, (ids + 3) % 20), expected)


def test_replace_touches_one_token_a_row_and_skips_negative_positions(case):
    model, block, _, ids = case
    values, at = torch.randn(2, 8), torch.tensor([3, -1])
    with trace.read(model, [block(1)]) as before:
        output(model, ids)
    with trace.replace(model, block(1), values, at), trace.read(model, [block(1)]) as after:
        output(model, ids)
    expected = before[block(1)].clone()
    expected[0, 3] = values[0]
    torch.testing.assert_close(after[block(1)], expected)


def test_add_shifts_the_state_and_passes_the_gradient_to_the_shift(case):
    model, block, _, ids = case
    delta, at = torch.randn(2, 8, requires_grad=True), torch.tensor([1, 4])
    with trace.read(model, [block(1)]) as before:
        output(model, ids)
    with trace.add(model, block(1), delta, at), trace.read(model, [block(1)]) as after:
        loss = output(model, ids).square().sum()
    expected = before[block(1)].clone()
    for row in range(2):
        expected[row, at[row]] += delta[row]
    torch.testing.assert_close(after[block(1)], expected)
    loss.backward()
    assert delta.grad is not None
    assert bool(delta.grad.abs().sum(-1).gt(0).all())


def test_contexts_leave_no_hook_behind_even_after_an_error(case):
    model, block, linear, ids = case
    expected = output(model, ids)
    with (
        pytest.raises(RuntimeError, match="stop"),
        trace.read(model, [linear(0)]),
        trace.add(model, block(0), torch.ones(2, 8), torch.tensor([0, 0])),
    ):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(output(model, ids), expected)


def test_bf16_states_take_fp32_values(case):
    model, block, _, ids = case
    model = model.bfloat16()
    with trace.add(model, block(0), torch.ones(2, 8), torch.tensor([0, 0])):
        assert output(model, ids).dtype == torch.bfloat16


def test_unknown_module_is_an_error_that_lists_what_is_there(case):
    model, _, _, _ = case
    name = next(name for name, _ in model.named_children())
    with (
        pytest.raises(ValueError, match=rf"no module '{name}.nothing'.* has \["),
        trace.read(model, [f"{name}.nothing"]),
    ):
        pass


def test_positions_that_do_not_fit_are_refused(case):
    model, block, _, ids = case
    with (
        trace.replace(model, block(0), torch.ones(2, 8), torch.tensor([0, 9])),
        pytest.raises(ValueError, match=r"positions \[0, 9\] do not fit .* 2 rows and 5 tokens"),
    ):
        output(model, ids)
