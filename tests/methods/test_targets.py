"""Values, keys and states of a batch against one edit at a time, by whole passes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from editkit.adapters.delta import DeltaLayer
from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.lm.blocks import tap
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.methods.targets import SubjectRows
from editkit.methods.value_search import ValueSearch

PREFIXES = ["the town is. ", "a big city he works for Rome. "]
SEARCH = ValueSearch(steps=8, lr=0.2)


def load(folder) -> EditableLM:
    return EditableLM.load(LMSpec(id=str(folder)))


def batch(lm, edits, layers=(0, 1), **options) -> SubjectRows:
    return SubjectRows(lm, edits, PREFIXES, [lm.site(i) for i in layers], layers[-1], **options)


def attach(lm, layers=(0, 1)):
    return [lm.attach(lm.site(i).path, DeltaLayer) for i in layers]


def off(a, b):
    return float(((a - b).norm(dim=0) / b.norm(dim=0)).max())


def alone(lm, edit, search, layer=1):
    """Search for one value with whole passes, torch's Adam and a hook of the test's own."""
    texts = [prefix + edit.prompt for prefix in ["", *PREFIXES]]
    tokens = lm.encode(texts, [edit.target] * len(texts), [edit.subject] * len(texts))
    anchor = lm.encode([f"{edit.subject} is a"], subjects=[edit.subject])
    delta = torch.zeros(lm.site(layer).out_features, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=search.lr)
    init = start = None

    def run(rows):
        def add(module, args, out):
            moved = out.clone()
            moved[torch.arange(len(moved)), rows.subject_B] += delta
            return moved

        handle = lm.blocks[layer].register_forward_hook(add)
        try:
            return lm(rows).log_softmax(-1)
        finally:
            handle.remove()

    with torch.no_grad(), tap(lm.blocks[layer]) as seen:
        lm(tokens)
    init = seen[0][0, tokens.subject_B[0]]
    for passes in range(1, search.steps + 1):
        logp = run(tokens)[:, :-1].gather(-1, tokens.ids_BT[:, 1:, None])[..., 0]
        mask = tokens.target_BT[:, 1:]
        nll = (-(logp * mask).sum(1) / mask.sum(1)).mean()
        now = run(anchor)[0, anchor.subject_B[0]]
        start = now.detach() if start is None else start
        kl = search.kl * F.kl_div(start, now, log_target=True, reduction="sum")
        loss = nll + kl + search.weight_decay * delta.norm() / init.norm() ** 2
        if loss < search.stop_below or passes == search.steps:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        adam.step()
        with torch.no_grad():
            limit = search.clamp * init.norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    return (init + delta).detach(), passes, loss.detach()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_values_are_those_of_each_edit_alone(tiny, edits, architecture):
    lm = load(tiny(architecture))
    search = replace(SEARCH, steps=12, lr=0.5, clamp=3.0)
    _, _, losses = zip(*(alone(lm, edit, search) for edit in edits), strict=True)
    middle = float(torch.stack(losses).median()) * 1.02  # so that some edits stop early
    search = replace(search, stop_below=middle)
    z, passes, losses = zip(*(alone(lm, edit, search) for edit in edits), strict=True)
    values = batch(lm, edits).find_values(search)
    assert values.passes_E.tolist() == list(passes)
    assert any(1 < n < search.steps for n in passes)
    assert values.stopped_E.tolist() == [float(loss) < middle for loss in losses]
    assert off(values.z_DE, torch.stack(z, 1)) < 1e-5
    torch.testing.assert_close(values.loss_E, torch.stack(losses), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_no_value(tiny, edits, micro_batch):
    lm = load(tiny("llama"))
    search = replace(SEARCH, stop_below=5.0, clamp=3.0, lr=0.5)
    values = batch(lm, edits).find_values(search)
    others = batch(lm, edits, micro_batch=micro_batch).find_values(search)
    assert torch.equal(values.passes_E, others.passes_E)
    assert off(values.z_DE, others.z_DE) < 1e-5


def test_the_clamp_binds_each_value(tiny, edits):
    values = batch(load(tiny("llama")), edits).find_values(replace(SEARCH, lr=5.0, clamp=0.3))
    moved_E = (values.z_DE - values.init_DE).norm(dim=0) / values.init_DE.norm(dim=0)
    torch.testing.assert_close(moved_E, torch.full_like(moved_E, 0.3), rtol=1e-4, atol=0)


def test_one_pass_takes_no_step(tiny, edits):
    values = batch(load(tiny("llama")), edits).find_values(replace(SEARCH, steps=1))
    assert torch.equal(values.z_DE, values.init_DE)
    assert values.passes_E.tolist() == [1] * len(edits)


def leads_everywhere(lm, edit, prefixes, delta, layer):
    """Whether the target is the likeliest answer behind all prefixes, by whole passes."""
    texts, n = [prefix + edit.prompt for prefix in prefixes], len(prefixes)
    tokens = lm.encode(texts, [edit.target] * n, [edit.subject] * n)

    def add(module, args, out):
        moved = out.clone()
        moved[torch.arange(n), tokens.subject_B] += delta
        return moved

    handle = lm.blocks[layer].register_forward_hook(add)
    try:
        with torch.no_grad():
            best_N = lm(tokens)[tokens.predicts_BT].argmax(-1)
    finally:
        handle.remove()
    return bool((best_N == tokens.target_ids_N).all())


def test_rank_stop_ends_an_edit_whose_target_leads_behind_every_prefix():
    lm, data = EditableLM.load(LMSpec()), FactWorld(limit=3)
    data.setup()
    search = ValueSearch(steps=16, stop_below=-1.0)
    rows = SubjectRows(lm, data.edits, PREFIXES, [lm.site(1)], 1)
    once = rows.find_values(replace(search, rank_stop=1))
    thrice = rows.find_values(replace(search, rank_stop=3))
    assert bool(once.stopped_E.all())
    assert ((thrice.passes_E - once.passes_E) >= 2).all()
    for i, edit in enumerate(data.edits):
        n = int(once.passes_E[i])
        for passes in (n - 1, n):
            values = rows.find_values(replace(search, steps=passes))
            delta = (values.z_DE - values.init_DE)[:, i]
            assert leads_everywhere(lm, edit, PREFIXES, delta, 1) == (passes == n)


def test_rank_stop_without_prefixes_counts_the_bare_prompt():
    lm, data = EditableLM.load(LMSpec()), FactWorld(limit=3)
    data.setup()
    rows = SubjectRows(lm, data.edits, [], [lm.site(1)], 1)
    found = rows.find_values(ValueSearch(steps=16, stop_below=-1.0, rank_stop=1))
    for i, edit in enumerate(data.edits):
        delta = (found.z_DE - found.init_DE)[:, i]
        assert int(found.passes_E[i]) > 1
        assert leads_everywhere(lm, edit, [""], delta, 1)


def reference_keys(lm, edits, site):
    """Return keys [E, contexts, F] by one whole pass a context."""
    found = []
    for edit in edits:
        for prefix in ["", *PREFIXES]:
            tokens = lm.encode([prefix + edit.prompt], subjects=[edit.subject])
            with torch.no_grad(), tap(lm.model.get_submodule(site.path), inputs=True) as seen:
                lm(tokens)
            found.append(seen[0][0, tokens.subject_B[0]])
    return torch.stack(found).view(len(edits), 3, -1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "gpt_neox"])
def test_keys_and_states_follow_what_is_written(tiny, edits, architecture):
    lm = load(tiny(architecture))
    layers = (0, 1, 3)
    deltas = attach(lm, layers)
    rows = batch(lm, edits, layers, micro_batch=3)
    values = rows.find_values(replace(SEARCH, steps=2))
    torch.manual_seed(0)
    for i, (layer, delta) in enumerate(zip(layers, deltas, strict=True)):
        site, whole_ECF = lm.site(layer), reference_keys(lm, edits, lm.site(layer))
        halves_EF = whole_ECF[:, 0] / 2 + whole_ECF[:, 1:].mean(1) / 2
        assert off(rows.keys(site), halves_EF.T) < 1e-5
        assert off(rows.keys(site, "flat"), whole_ECF.mean(1).T) < 1e-5
        assert off(rows.keys(site, "bare"), whole_ECF[:, 0].T) < 1e-5
        if i == 0:
            assert torch.equal(rows.states(), values.init_DE)
        delta.add(0.1 * torch.randn(delta.shape_oi))
        tokens = lm.encode([e.prompt for e in edits], subjects=[e.subject for e in edits])
        with torch.no_grad(), tap(lm.blocks[3]) as seen:
            lm(tokens)
        state_ED = seen[0][torch.arange(len(edits)), tokens.subject_B]
        assert off(rows.states(), state_ED.T) < 1e-5
        assert off(state_ED.T, values.init_DE) > 1e-3


def test_values_at_the_mlp_are_the_outputs_of_the_site(tiny, edits):
    lm = load(tiny("gpt2"))
    rows = SubjectRows(lm, edits, PREFIXES, [lm.site(2)], 2, value_at="mlp", weights="flat")
    tokens = lm.encode([e.prompt for e in edits], subjects=[e.subject for e in edits])
    with torch.no_grad(), tap(lm.model.get_submodule(lm.site(2).path)) as seen:
        lm(tokens)
    outputs_ED = seen[0][torch.arange(len(edits)), tokens.subject_B]
    values = rows.find_values(SEARCH)
    assert off(values.init_DE, outputs_ED.T) < 1e-5
    assert off(values.z_DE, values.init_DE) > 1e-2
    assert off(rows.keys(lm.site(2)), reference_keys(lm, edits, lm.site(2)).mean(1).T) < 1e-5


def test_every_token_passes_a_block_once_on_the_way_up(tiny, edits):
    lm = load(tiny("llama"))
    deltas, tokens = attach(lm), [0] * len(lm.blocks)
    batch(lm, edits)  # finds out what the model can take
    for i, block in enumerate(lm.blocks):

        def count(module, args, out, i=i):
            tokens[i] += out.shape[0] * out.shape[1]

        block.register_forward_hook(count)
    rows = batch(lm, edits)
    first = list(tokens)
    rows.keys(lm.site(0))
    rows.states()
    assert tokens == first  # both were seen on the first pass
    deltas[0].add(torch.full(deltas[0].shape_oi, 1e-3))
    rows.keys(lm.site(1))
    assert 0 < tokens[0] - first[0] < first[0]  # the edited block again, without the targets
    assert tokens[1:] == first[1:]  # stopped inside the next one
    rows.keys(lm.site(1))
    rows.states()
    assert 0 < tokens[1] - first[1] < first[1] / 2  # the bare prompts alone
    assert tokens[2:] == first[2:]


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_bf16_keeps_values_in_fp32_and_close(tiny, edits, precision):
    search = replace(SEARCH, steps=15, lr=0.05)
    exact = batch(load(tiny("llama")), edits).find_values(search)
    if precision == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            values = batch(load(tiny("llama")), edits).find_values(search)
    else:
        lm = EditableLM.load(LMSpec(id=tiny("llama"), dtype="bfloat16"))
        values = batch(lm, edits).find_values(search)
    assert values.z_DE.dtype == values.nll_E.dtype == torch.float32
    assert F.cosine_similarity(values.z_DE, exact.z_DE, dim=0).min() > 0.99
    assert values.passes_E.tolist() == [15] * len(edits)


def test_mistakes_are_named(tiny, edits):
    lm = load(tiny("llama"))
    with pytest.raises(ValueError, match=r"edit 7 .* has no subject"):
        batch(lm, [Edit(7, "the town is", "Oslo")])
    with pytest.raises(ValueError, match=r"subject 'Lima' not found in prompt .* \(edit 7\)"):
        batch(lm, [Edit(7, "the town is", "Oslo", "Lima")])
    with pytest.raises(ValueError, match="exceeds the 128 positions"):
        batch(lm, [Edit(7, "the town " * 70 + "is", "Oslo", "town")])
    with pytest.raises(ValueError, match=r"blocks \[1, 0\]"):
        SubjectRows(lm, edits, PREFIXES, [lm.site(1), lm.site(0)], 1)
    with pytest.raises(ValueError, match="none above the value"):
        SubjectRows(lm, edits, PREFIXES, [lm.site(2)], 1)
    with pytest.raises(ValueError, match="0 edits"):
        batch(lm, [])
    with pytest.raises(ValueError, match=r"loss of edit 0 became nan at step 1 \(lr inf\)"):
        batch(lm, edits).find_values(replace(SEARCH, lr=float("inf")))
    with pytest.raises(ValueError, match="steps is 0"):
        ValueSearch(steps=0)


def parity_edit(request, target):
    prompt = request["prompt"].replace("{}", request["subject"])
    return Edit(request["case_id"], prompt, target.strip(), request["subject"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_equal_the_released_ones(shared, name):
    folder = shared(f"parity/02_compute_z_{name}")
    lm = load(shared(f"parity/models/tiny-{name}-p"))
    cases = json.loads((folder / "inputs.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())["runs"]
    tensors = load_file(folder / "expected.safetensors")
    kinds = dict.fromkeys(run["id"].split(".")[0] for run in cases["runs"])
    for kind in kinds:
        pairs = zip(cases["runs"], expected, strict=True)
        runs = [(r, e) for r, e in pairs if r["id"].startswith(kind + ".")]
        constants, layer = runs[0][0]["hparams"], runs[0][0]["layer"]
        search = ValueSearch(
            constants["v_num_grad_steps"], constants["v_lr"], constants["clamp_norm_factor"],
            constants["v_weight_decay"], constants["kl_factor"],
        )  # fmt: skip
        batch = [parity_edit(r["request"], r["request"]["target_new"]) for r, _ in runs]
        rows = SubjectRows(lm, batch, cases["context_templates"][1], [lm.site(layer)], layer)
        values = rows.find_values(search)
        for i, (run, want) in enumerate(runs):
            z, init = tensors[run["id"] + ".z"], tensors[run["id"] + ".target_init"]
            assert off(values.z_DE[:, i, None], z[:, None]) < 2e-6, run["id"]
            assert off(values.init_DE[:, i, None], init[:, None]) < 2e-6, run["id"]
            assert int(values.passes_E[i]) == want["n_forward"]
            assert bool(values.stopped_E[i]) == want["early_stopped"]
            got = [float(x[i]) for x in (values.loss_E, values.nll_E, values.kl_E, values.decay_E)]
            last = [want[k][-1] for k in ("loss", "nll", "kl", "weight_decay")]
            assert got == pytest.approx(last, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_keys_equal_the_released_ones(shared, name):
    folder = shared(f"parity/03_compute_ks_{name}")
    lm = load(shared(f"parity/models/tiny-{name}-p"))
    cases = json.loads((folder / "inputs.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    batch = [parity_edit(r, r["target_new"]["str"]) for r in cases["requests"]]
    for value_layer in cases["layers"]:
        sites = [lm.site(i) for i in cases["layers"] if i <= value_layer]
        rows = SubjectRows(lm, batch, cases["context_templates"][1], sites, value_layer)
        for site in sites:
            assert off(rows.keys(site), tensors[f"keys.layer{site.layer}"].T) < 2e-6
        assert off(rows.states(), tensors[f"block_out.layer{value_layer}"].T) < 2e-6
