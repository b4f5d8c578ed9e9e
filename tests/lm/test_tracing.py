"""Causal tracing: effects against plain forward passes, alignment of tokens, what is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from editkit.data.facts import known_facts
from editkit.data.factworld import load_world
from editkit.edits import Edit
from editkit.lm.editable import EditableLM
from editkit.lm.restoring import GROUPS, KINDS, FactRow, Restoring, TraceSettings
from editkit.lm.spec import LMSpec
from editkit.lm.tracing import Trace, trace_facts

FACTS = [
    Edit(0, "the capital of St. Louis Alba is", "", "St. Louis Alba"),
    Edit(1, "he works for Bera and she lives in", "", "Bera"),
    Edit(2, "Cora is a town", "", "Cora"),
]


@pytest.fixture(params=["llama", "gpt2", "gptj"])
def lm(request, tiny):
    return EditableLM.load(LMSpec(id=tiny(request.param)))


@pytest.fixture
def llama(tiny):
    return EditableLM.load(LMSpec(id=tiny("llama")))


def row_of(lm, fact, number=0):
    """Encode a fact by hand: the tokens before the subject, up to its end, and of the prompt."""
    start = fact.prompt.index(fact.subject)
    cuts = (fact.prompt[:start].rstrip(), fact.prompt[: start + len(fact.subject)], fact.prompt)
    ids = [lm.tokenizer(text)["input_ids"] for text in cuts]
    with torch.no_grad():
        said = int(lm.model(torch.tensor([ids[2]])).logits[0, -1].argmax())
    return FactRow(number, ids[2], len(ids[0]), len(ids[1]) - 1, said)


def modules(model, kind, layers):
    """What gives the states of a kind in a plain transformers model."""
    gpt = hasattr(model, "transformer")
    blocks = model.transformer.h if gpt else model.model.layers
    part = {"block": lambda b: b, "mlp": lambda b: b.mlp}
    part["attn"] = lambda b: b.attn if gpt else b.self_attn
    return [part[kind](blocks[layer]) for layer in layers]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def by_hand(lm, row, noise_STD, kind, layers, token):
    """Average over noise samples, one forward pass each, of what one restored state brings back."""
    model = AutoModelForCausalLM.from_pretrained(lm.spec.id).eval()
    ids = torch.tensor([row.ids])

    def probability():
        with torch.no_grad():
            return float(model(ids).logits[0, -1].softmax(-1)[row.target])

    clean, hooks = [], []
    for module in modules(model, kind, layers):
        hooks.append(module.register_forward_hook(lambda m, a, o: clean.append(first(o).clone())))
    probability()
    for hook in hooks:
        hook.remove()
    gains = []
    for noise_TD in noise_STD:
        corrupt = model.get_input_embeddings().register_forward_hook(
            lambda m, a, o, noise_TD=noise_TD: o + noise_TD[None, : o.shape[1]]
        )
        under_noise = probability()
        hooks = []
        for module, state in zip(modules(model, kind, layers), clean, strict=True):

            def restore(m, a, o, state=state):
                first(o)[0, token] = state[0, token]
                return o

            hooks.append(module.register_forward_hook(restore))
        gains.append(probability() - under_noise)
        for hook in [*hooks, corrupt]:
            hook.remove()
    return sum(gains) / len(gains)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "window"), [(0, 1), (1, 3), (3, 2)])
def test_a_cell_is_what_plain_forward_passes_give(lm, kind, layer, window):
    settings = TraceSettings(samples=3, window=window)
    rows = [row_of(lm, fact, i) for i, fact in enumerate(FACTS[:2])]
    batch = Restoring(lm, rows, settings, sigma=0.5)
    noise_ESTD = batch.noise_BTD.view(2, 3, *batch.noise_BTD.shape[1:])
    found_EG = batch._effects(kind, layer)
    width = 1 if kind == "block" else window
    layers = range(max(0, layer - width // 2), min(4, layer - (-width // 2)))
    for e, row in enumerate(rows):
        cells = {"last subject token": row.last, "last token": len(row.ids) - 1}
        for group, token in cells.items():
            expected = by_hand(lm, row, noise_ESTD[e], kind, layers, token)
            assert float(found_EG[e, GROUPS.index(group)]) == pytest.approx(expected, abs=2e-6)


def test_the_last_state_at_the_last_token_brings_everything_back(lm):
    found = trace_facts(lm, FACTS, TraceSettings(samples=2))
    everything = found.clean - found.corrupted
    last = found.effects_KLG[KINDS.index("block"), -1, GROUPS.index("last token")]
    assert float(last) == pytest.approx(everything, abs=1e-6)
    assert abs(everything) > 1e-3


def test_without_noise_there_is_nothing_to_bring_back(llama):
    found = trace_facts(llama, FACTS, TraceSettings(noise=0, samples=2))
    assert found.sigma == 0
    assert found.clean == pytest.approx(found.corrupted, abs=1e-6)
    assert float(found.effects_KLG.nan_to_num(0).abs().max()) < 1e-6


def test_noise_is_three_standard_deviations_of_the_subjects_embeddings_and_only_there(lm):
    rows = [row_of(lm, fact, i) for i, fact in enumerate(FACTS)]
    ids = [i for row in rows for i in row.ids[row.first : row.last + 1]]
    with torch.no_grad():
        spread = float(lm.model.get_input_embeddings()(torch.tensor(ids)).std())
    found = trace_facts(lm, FACTS, TraceSettings(samples=2))
    assert found.sigma == pytest.approx(3 * spread, rel=1e-5)
    batch = Restoring(lm, rows, TraceSettings(samples=200), found.sigma)
    for row, noise_STD in zip(rows, batch.noise_BTD.view(3, 200, -1, 32), strict=True):
        inside = noise_STD[:, row.first : row.last + 1]
        assert float(inside.std()) == pytest.approx(found.sigma, rel=0.03)
        assert not noise_STD[:, : row.first].any()
        assert not noise_STD[:, row.last + 1 :].any()
        assert len(inside.flatten(1).unique(dim=0)) == 200


def test_batching_moves_only_rounding(llama):
    one = trace_facts(llama, FACTS, TraceSettings(samples=3))
    for batch_tokens in (70, 200):
        other = trace_facts(llama, FACTS, TraceSettings(samples=3, batch_tokens=batch_tokens))
        torch.testing.assert_close(
            other.effects_KLG, one.effects_KLG, atol=2e-6, rtol=0, equal_nan=True
        )
        assert other.corrupted == pytest.approx(one.corrupted, abs=1e-6)


def test_a_seed_decides_the_noise(llama):
    def effects(seed):
        return trace_facts(llama, FACTS, TraceSettings(samples=2, seed=seed)).effects_KLG

    assert torch.equal(effects(1).nan_to_num(9), effects(1).nan_to_num(9))
    assert not torch.allclose(effects(1).nan_to_num(9), effects(2).nan_to_num(9), atol=1e-4)


def test_averages_and_errors_are_over_facts(llama):
    settings = TraceSettings(samples=2)
    found = trace_facts(llama, FACTS, settings)
    rows = [row_of(llama, fact, i) for i, fact in enumerate(FACTS)]
    effects = [Restoring(llama, [r], settings, found.sigma)._effects("mlp", 1)[0] for r in rows]
    last = torch.stack(effects)[:, GROUPS.index("last subject token")]
    k = (KINDS.index("mlp"), 1, GROUPS.index("last subject token"))
    assert float(found.effects_KLG[k]) == pytest.approx(float(last.mean()), abs=1e-6)
    assert float(found.errors_KLG[k]) == pytest.approx(float(last.std()) / 3**0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("prompt", "subject", "groups"),
    [
        ("the capital of Alba Bera Cora Dora is Rome a town", "Alba Bera Cora Dora", "012-3445"),
        ("the capital of Alba Bera is", "Alba Bera", "025"),
        ("the capital of Alba is in", "Alba", "235"),
        ("the capital of Alba", "Alba", "2"),
        ("Alba Bera is in Rome", "Alba Bera", "02345"),
    ],
)
def test_tokens_are_aligned_as_in_the_paper(llama, tokenizers, prompt, subject, groups):
    lm = EditableLM(llama.model, tokenizers("word_level"), llama.spec)  # a token a word
    fact = Edit(0, prompt, "", subject)
    batch = Restoring(lm, [row_of(lm, fact)], TraceSettings(samples=1), 1.0)
    start = prompt.split().index(subject.split()[0])
    assert batch.token_P.tolist() == list(range(start, len(prompt.split())))
    expected = {"012-3445": [0, 1, 1, 2, 3, 4, 4, 5]}.get(groups) or [int(g) for g in groups]
    assert (batch.cell_P % len(GROUPS)).tolist() == expected
    found = trace_facts(lm, [fact], TraceSettings(samples=1))
    assert found.facts_G.tolist() == [int(g in expected) for g in range(len(GROUPS))]


def test_facts_that_the_model_does_not_know_are_left_out():
    lm = EditableLM.load(LMSpec())
    known, other = known_facts(load_world(), 2, seed=3)
    unknown = replace(other, target="Nobody")
    found = trace_facts(lm, [unknown, known], TraceSettings(samples=1))
    assert found.skipped == 1
    assert int(found.facts_G.max()) == 1
    alone = trace_facts(lm, [replace(known, target="")], TraceSettings(samples=1))
    assert alone.clean == pytest.approx(found.clean, abs=1e-6)
    with pytest.raises(ValueError, match=r"none of the 1 targets.* leave `target` out"):
        trace_facts(lm, [unknown])


def test_facts_without_a_subject_to_trace_are_refused(llama):
    with pytest.raises(ValueError, match="no facts to trace"):
        trace_facts(llama, [])
    with pytest.raises(ValueError, match=r"prompt 'Cora is' .* needs its subject"):
        trace_facts(llama, [Edit(0, "Cora is", "", None)])
    with pytest.raises(ValueError, match="subject 'Dora' not found in prompt 'Cora is'"):
        trace_facts(llama, [Edit(0, "Cora is", "", "Dora")])


@pytest.mark.parametrize("name", ["samples", "window", "batch_tokens"])
def test_settings_that_make_no_sense_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
        TraceSettings(**{name: 0})
    for noise in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="give a number of standard deviations"):
            TraceSettings(noise=noise)


def test_a_window_is_laid_around_its_layer_as_released():
    for window, layer, depth in [(1, 0, 6), (10, 0, 48), (10, 20, 48), (10, 47, 48), (3, 5, 6)]:
        expected = range(max(0, layer - window // 2), min(depth, layer - (-window // 2)))
        assert TraceSettings(window=window).layers("mlp", layer, depth) == expected
        assert list(TraceSettings(window=window).layers("block", layer, depth)) == [layer]
    assert [TraceSettings().width(depth) for depth in (6, 12, 24, 48)] == [1, 1, 10, 10]


def trace_of(mlp_effects):
    effects_KLG = torch.zeros(len(KINDS), len(mlp_effects), len(GROUPS))
    effects_KLG[0] = 1
    effects_KLG[KINDS.index("mlp"), :, GROUPS.index("last subject token")] = mlp_effects
    return Trace(effects_KLG, effects_KLG, torch.ones(len(GROUPS)), 1.0, 0.0, 1.0, 0)


def test_proposed_layers_are_the_neighbours_that_bring_back_most():
    bump_L = torch.exp(-(((torch.arange(32) - 6.0) / 3) ** 2))
    assert trace_of(bump_L).causal_layers == [4, 5, 6, 7, 8]
    assert trace_of(torch.tensor([0.9, 0.1, 0.1, 0.0, 0.0, 0.2])).causal_layers == [0, 1, 2]
    assert trace_of(torch.tensor([0.0, 0.0, 0.1, 0.9, 0.1, 0.0])).causal_layers == [2, 3, 4]
    assert trace_of(torch.tensor([0.1, 0.2])).causal_layers == [0, 1]
    assert trace_of(torch.tensor([-0.1, 0.0, 0.0, -0.2])).causal_layers == []


def test_the_fact_world_recalls_at_the_subjects_last_token_in_its_lower_blocks():
    lm = EditableLM.load(LMSpec())
    world = load_world()
    facts = known_facts(world, 8, seed=11)
    assert all(world.group[fact.subject] == "dev" for fact in facts)
    found = trace_facts(lm, facts, TraceSettings(samples=2))
    assert found.skipped == 0
    drop = found.clean - found.corrupted
    assert drop > 0.5
    states = dict(
        zip(KINDS, found.effects_KLG[:, :, GROUPS.index("last subject token")], strict=True)
    )
    assert bool((states["block"][:4] > 0.7 * drop).all())
    assert bool((states["block"][4:] < 0.5 * drop).all())
    assert float(states["mlp"][0]) > 0.7 * drop
    assert found.causal_layers == lm.causal_layers  # as the model's folder says
