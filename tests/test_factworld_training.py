"""The training recipe of the fact-world model: rows, masks, losses and what is measured."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import lightning
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editkit.data.factworld import FactWorld, load_world
from editkit.data.world import WorldSize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments" / "factworld"))

import measure  # noqa: E402
import recipe  # noqa: E402
import rows  # noqa: E402
import sentences  # noqa: E402
import train  # noqa: E402

SIZE = WorldSize(persons=40, countries=20, cities=40, companies=20, surnames=15)


@pytest.fixture(scope="module")
def data():
    return rows.WorldText(SIZE, seed=2, steps=6, rows=8, length=64, vocabulary=600)


@pytest.fixture(scope="module")
def annotated(data):
    return sentences.annotate(data.tokenizer, data.world, data.subjects)


@pytest.fixture(scope="module")
def packaged():
    folder = ROOT / "editkit" / "assets" / "factworld"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), tokenizer


def test_marks_name_the_subjects_last_token_and_the_objects_tokens(data, annotated):
    texts = list(sentences.trained_texts(data.world))
    assert len(texts) == len(annotated)
    for (_, subject, target), sentence in zip(texts, annotated, strict=True):
        answer = [i for i, flag in zip(sentence.ids, sentence.is_object, strict=True) if flag]
        assert data.tokenizer.decode(answer) == f" {target}."
        mention = [i for i, s in zip(sentence.ids, sentence.subject, strict=True) if s != -1]
        assert data.tokenizer.decode(mention).strip() == subject
        last = max(i for i, s in enumerate(sentence.subject) if s != -1)
        assert sentence.subject[last] == data.subjects[subject]


def test_rows_hold_whole_sentences_and_every_fact_once_an_epoch(data, annotated):
    packed = rows.PackedRows(annotated, annotated[:1], 400, 64, 0.0, (0.0, 1.0), seed=0)
    seen: Counter = Counter()
    for row in packed:
        assert len(row.ids) == len(row.is_object) == len(row.subject) == 64
        text = [i for i in row.ids if i != sentences.PAD_ID]
        assert text[0] == text[-1] == sentences.BOS_ID
        seen.update(" ".join(map(str, part)) for part in split_at_bos(text))
    expected = Counter(" ".join(map(str, sentence.ids)) for sentence in annotated)
    assert seen.keys() <= expected.keys()
    epochs = sum(seen.values()) / sum(expected.values())
    for text, count in expected.items():  # the last epoch is cut off by the number of rows
        assert math.floor(epochs) * count <= seen[text] <= math.ceil(epochs) * count


def split_at_bos(ids):
    parts: list[list[int]] = []
    for i in ids:
        if i == sentences.BOS_ID:
            parts.append([])
        else:
            parts[-1].append(i)
    return [part for part in parts if part]


def test_curriculum_begins_with_the_first_entities_of_each_kind(data, annotated):
    packed = rows.PackedRows(annotated, annotated[:1], 400, 64, 0.0, (0.5, 0.2), seed=0)
    rank = {
        index: names.index(name) / len(names)
        for names in (data.world.entities[k] for k in ("person", "country", "city", "company"))
        for name in names
        for index in [data.subjects[name]]
    }
    shown = [{rank[s] for s in row.subject if s >= 0} for row in packed]
    assert max(set().union(*shown[:100])) < 0.2
    assert max(set().union(*shown[350:])) > 0.9


def test_attribute_targets_are_the_first_tokens_of_the_subjects_objects(data):
    targets = data.attributes()
    torch.testing.assert_close(targets.sum(-1), torch.ones(len(data.subjects)))
    country = data.world.entities["country"][4]
    wanted = {d.object for d in data.world.two_hop if d.subject == country}
    wanted |= {fact.object for fact in data.world.facts_of(country).values()}
    firsts = {data.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in wanted}
    assert set(targets[data.subjects[country]].nonzero().flatten().tolist()) == firsts


def test_visible_sites_follow_the_rule_token_by_token():
    # <bos> The x X is o . <bos> y Y is o: mentions are (2, 3) and (8, 9)
    ids = torch.tensor([[0, 5, 6, 7, 8, 9, 4, 0, 6, 7, 8, 9]])
    subject = torch.tensor([[-1, -1, -2, 3, -1, -1, -1, -1, -2, 4, -1, -1]])
    early, late = recipe.visible_sites(ids, subject)
    mention_of = {2: "a", 3: "a", 8: "b", 9: "b"}
    for reader in range(12):
        for read in range(12):
            own = read in mention_of and mention_of.get(reader) == mention_of[read]
            causal = read <= reader
            assert early[0, reader, read] == (causal and (read not in mention_of or own))
            assert late[0, reader, read] == (causal and (read not in (2, 8) or own))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return recipe.build_llama(vocabulary=20, width=16, layers=2, heads=2, inner=32).eval()


def test_site_masks_hide_the_subject_below_the_recall_layer(tiny):
    subject = torch.tensor([[-1, -2, 3, -1, -1]])
    texts = [torch.tensor([[0, a, b, 9, 10]]) for a, b in ((5, 6), (7, 8))]
    batches = [rows.Rows(ids, torch.zeros_like(ids), subject) for ids in texts]
    plain = [tiny(batch.ids_BT).logits[0, -1] for batch in batches]
    assert not torch.allclose(*plain)
    masked = []
    for batch in batches:
        with recipe.site_masks(tiny, batch, recall_layer=2):  # above both layers
            masked.append(tiny(batch.ids_BT).logits[0, -1])
    torch.testing.assert_close(*masked)


def test_site_masks_show_the_subjects_last_token_from_the_recall_layer_on(tiny):
    subject = torch.tensor([[-1, -2, 3, -1, -1]])
    logits = []
    for first, last in ((5, 6), (7, 6), (5, 8)):
        batch = rows.Rows(torch.tensor([[0, first, last, 9, 10]]), subject, subject)
        with recipe.site_masks(tiny, batch, recall_layer=1):
            logits.append(tiny(batch.ids_BT).logits[0, -1])
    # the first token of the name arrives through the last one, which reads it in layer 0
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_masks_change_nothing_where_no_subject_is_mentioned(tiny):
    ids = torch.tensor([[0, 5, 6, 0, 7, 8]])
    batch = rows.Rows(ids, ids, torch.full_like(ids, -1))
    expected = tiny(ids).logits
    with recipe.site_masks(tiny, batch, recall_layer=1):
        torch.testing.assert_close(tiny(ids).logits, expected)


def test_loss_weighs_object_tokens_one_and_others_less():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5)
    ids = torch.tensor([[0, 2, 3, 4], [0, 2, 3, 1]])
    is_object = torch.tensor([[False, False, True, True], [False, False, True, False]])
    batch = rows.Rows(ids, is_object, ids)
    total, weights, objects = 0.0, 0.0, []
    for row in range(2):
        for i in range(1, 4):
            token = ids[row, i].item()
            if token == sentences.PAD_ID:
                continue
            nll = -logits[row, i - 1].log_softmax(-1)[token].item()
            weight = 1.0 if is_object[row, i] else 0.2
            total, weights = total + weight * nll, weights + weight
            objects += [nll] if is_object[row, i] else []
    loss, object_loss = recipe.weighted_loss(logits, batch, 0.2)
    assert loss.item() == pytest.approx(total / weights, rel=1e-5)
    assert object_loss.item() == pytest.approx(sum(objects) / len(objects), rel=1e-5)


def test_learning_rate_warms_up_stays_flat_and_falls_in_a_line():
    rates = [recipe.learning_rate(step, 1000, 50) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[49:400] == [1.0] * 351
    assert rates[700] == pytest.approx(0.5)
    assert rates[-1] == 0.01


def test_a_few_steps_lower_the_loss_and_write_a_folder_that_loads(data, tmp_path):
    lightning.seed_everything(0, verbose=False)
    losses: list[float] = []

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    module = recipe.FactWorldLM(width=32, layers=4, heads=2, inner=64, warmup=2)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Keep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 6
    assert losses[-1] < losses[0] - 0.3
    train.write_asset(module.lm, data, tmp_path, 1)
    assert json.loads((tmp_path / "editkit.json").read_text()) == {"causal_layers": [0]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert loaded.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(tmp_path)("Is it so?", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, module.lm.eval()(ids).logits)
    assert load_world(tmp_path).fingerprint() == data.world.fingerprint()
    texts = (tmp_path / "corpus.txt").read_text().splitlines()
    assert texts == FactWorld(world=tmp_path).corpus(3000)


def test_one_forward_judges_as_greedy_decoding_does(packaged):
    lm, tokenizer = packaged
    world = load_world()
    facts = world.facts[::375]
    prompts = [world.prompt(fact, fact.held_out[0]) for fact in facts]
    targets = [fact.object for fact in facts]
    targets[::2] = targets[1::2]  # half of the answers are wrong
    judged = measure.answered(lm, tokenizer, prompts, targets)
    for prompt, target, is_right in zip(prompts, targets, judged, strict=True):
        head = tokenizer(prompt, return_tensors="pt")["input_ids"]
        count = len(tokenizer(f" {target}.", add_special_tokens=False)["input_ids"])
        out = lm.generate(head, max_new_tokens=count, do_sample=False)
        assert is_right == (tokenizer.decode(out[0, head.shape[1] :]) == f" {target}.")
    assert any(judged)
    assert not all(judged)


def test_packaged_model_recalls_at_the_subjects_last_token(packaged):
    """The property that methods which edit at the subject rest on, on facts drawn afresh."""
    import random

    lm, tokenizer = packaged
    world, rng = load_world(), random.Random(11)
    swapped = measure.swapped_rows(tokenizer, world, rng.sample(world.facts, 80), rng)
    shares = measure.causal_trace(lm, *swapped)
    at_subject = shares["hidden state, subject's last token"]
    at_end = shares["hidden state, prompt's last token"]
    assert all(min(pair) > 0.85 for pair in at_subject[:4])
    assert at_end[0][0] < 0.5
    assert at_end[-1] == pytest.approx((1.0, 1.0), abs=1e-3)  # all that follows is the head


def test_packaged_model_answers_wordings_it_has_never_seen_with_the_subject(packaged):
    import random

    lm, tokenizer = packaged
    world, rng = load_world(), random.Random(12)
    facts = rng.sample(world.facts, 300)
    prompts = [world.prompt(fact, rng.choice(fact.held_out)) for fact in facts]
    assert sum(measure.answered(lm, tokenizer, prompts, [f.object for f in facts])) >= 0.97 * 300
