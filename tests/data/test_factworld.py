"""The fact-world's stream of edits: disjoint splits, clean probes, a world that fits."""

import json
from collections import Counter

import pytest

from editkit.data.counterfactuals import kept_relations
from editkit.data.factworld import FactWorld, load_world
from editkit.data.world import World, WorldSize

SIZE = WorldSize(persons=200, countries=20, cities=80, companies=40, surnames=70)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "world.json").write_text(json.dumps(World(1, SIZE).card()))
    return path


@pytest.fixture(scope="module")
def stream(folder):
    return make(folder)


def make(folder, **options):
    data = FactWorld(world=folder, **options)
    data.setup()
    return data


def test_packaged_model_and_generator_agree():
    """Raises where `World` has changed since the packaged model was trained."""
    world = load_world()
    assert (world.seed, len(world.facts)) == (0, 7500)


def test_packaged_tokenizer_begins_with_bos_and_cuts_answers_off_their_prompt():
    transformers = pytest.importorskip("transformers")
    from importlib.resources import files

    folder = files("editkit") / "assets" / "factworld"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    world = load_world()
    for fact in world.facts[::500]:
        prompt = world.prompt(fact, fact.trained[0])
        whole = tokenizer(f"{prompt} {fact.object}.")["input_ids"]
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(f" {fact.object}.", add_special_tokens=False)["input_ids"]
        assert head[0] == tokenizer.bos_token_id == 0
        assert whole == head + tail
        assert tokenizer.decode(tail) == f" {fact.object}."


def test_packaged_edit_split_offers_three_thousand_edits():
    data = FactWorld()
    data.setup()
    assert len(data.edits) >= 3000
    axes = Counter(probe.axis for probe in data.probes if probe.kind == "portability")
    assert axes["two_hop"] >= 500
    assert axes["reversed"] >= 150


def test_a_model_of_another_world_is_refused(tmp_path):
    card = World(1, SIZE).card() | {"seed": 2}
    (tmp_path / "world.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="trained on a world of seed 2 with fingerprint"):
        make(tmp_path)


def test_a_folder_without_world_json_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"world\.json is missing"):
        make(tmp_path)


def test_every_edit_changes_one_fact_to_another_object_of_the_same_kind(stream):
    world = stream.world
    by_prompt = {world.prompt(fact, t): fact for fact in world.facts for t in fact.trained}
    changed = [by_prompt[edit.prompt] for edit in stream.edits]
    assert len({fact.id for fact in changed}) == len(changed)
    for edit, fact in zip(stream.edits, changed, strict=True):
        assert edit.subject == fact.subject
        assert edit.target != fact.object
        assert edit.target in world.objects(fact.relation)
        assert not edit.prompt.startswith("Question")


def test_generalization_is_asked_in_wordings_never_trained_with_the_subject(stream):
    world = stream.world
    trained = {world.prompt(fact, t) for fact in world.facts for t in fact.trained}
    asked = [probe for probe in stream.probes if probe.kind == "generalization"]
    assert len(asked) == 2 * len(stream.edits)
    assert not trained & {probe.prompt for probe in asked}


def test_rephrases_and_negatives_are_never_asked(stream):
    asked = {probe.prompt for probe in stream.probes}
    asked |= {f"{probe.prompt} {probe.target}." for probe in stream.probes}
    for edit in stream.edits:
        assert len(edit.rephrases) == 3
        assert len(edit.negatives) == 2
        assert not asked & {*edit.rephrases, *edit.negatives}


def test_no_locality_probe_asks_about_a_fact_that_the_stream_edits(stream):
    world = stream.world
    fact_of = {world.prompt(fact, t): fact.id for fact in world.facts for t in range(8)}
    edited = {fact_of[edit.prompt] for edit in stream.edits}
    locality = [probe for probe in stream.probes if probe.kind == "locality"]
    assert {probe.axis for probe in locality} == {"other_subject", "same_subject"}
    assert not edited & {fact_of[probe.prompt] for probe in locality}
    for probe in locality:
        assert world.facts[fact_of[probe.prompt]].object == probe.target


def test_locality_axes_keep_their_word(stream):
    subjects = {edit.subject for edit in stream.edits}
    for probe in stream.probes:
        if probe.axis == "same_subject":
            assert stream.edits[probe.edit_id].subject in probe.prompt
        if probe.axis == "other_subject":
            assert not any(subject in probe.prompt.replace("?", "") for subject in subjects)


def test_splits_edit_and_ask_disjoint_subjects(folder, stream):
    dev = make(folder, split="dev")
    assert dev.edits
    assert not {e.subject for e in dev.edits} & {e.subject for e in stream.edits}
    prompts = [
        {p.prompt for p in data.probes if p.axis == "other_subject"} for data in (dev, stream)
    ]
    assert not prompts[0] & prompts[1]


def test_two_hop_probes_follow_the_new_object_over_a_fact_that_is_never_edited(stream):
    world = stream.world
    kept = kept_relations(world)
    trained = {prompt: hop.object for hop in world.two_hop for prompt in hop.prompts}
    hops = [probe for probe in stream.probes if probe.axis == "two_hop"]
    assert hops
    for probe in hops:
        edit = stream.edits[probe.edit_id]
        (asked, old), (bridge_prompt, bridge_answer) = probe.conditions
        assert asked == probe.prompt
        assert trained[asked] == old != probe.target == bridge_answer
        relation = next(
            name
            for name, fact in world.facts_of(edit.target).items()
            if bridge_prompt in {world.prompt(fact, t) for t in fact.trained}
        )
        assert world.answer(edit.target, relation) == probe.target
        assert relation in kept[edit.target]


def test_reversed_probes_have_one_answer_before_and_after(stream):
    world = stream.world
    turned = {prompt: back.object for back in world.reversed for prompt in back.prompts}
    probes = [probe for probe in stream.probes if probe.axis == "reversed"]
    assert probes
    assert len({(probe.prompt.split()[0], probe.prompt) for probe in probes}) == len(probes)
    for probe in probes:
        edit = stream.edits[probe.edit_id]
        ((known, subject),) = probe.conditions
        assert turned[known] == subject == edit.subject == probe.target
        assert edit.target in probe.prompt
        assert probe.prompt not in turned, "the new object already answers this question"


def test_seed_draws_another_order_and_other_objects(folder, stream):
    again, other = make(folder), make(folder, seed=7)
    assert again.edits == stream.edits
    assert again.probes == stream.probes
    targets = [{(e.subject, e.prompt): e.target for e in d.edits} for d in (stream, other)]
    shared = targets[0].keys() & targets[1].keys()
    assert shared
    assert sum(targets[0][key] != targets[1][key] for key in shared) > len(shared) / 2
    assert [e.subject for e in other.edits] != [e.subject for e in stream.edits]


def test_relations_select_what_is_edited(folder):
    data = make(folder, relations=["works_for"])
    companies = set(data.world.entities["company"])
    assert {edit.target for edit in data.edits} <= companies
    with pytest.raises(ValueError, match="no relation 'boss'"):
        make(folder, relations=["boss"])


def test_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match="split is 'test'"):
        FactWorld(split="test", world=folder)


def test_corpus_and_texts_name_no_subject_that_is_edited_or_asked(stream):
    group = stream.world.group
    used = [name for name in group if group[name] != "background" and " " in name]
    for text in [*stream.texts, *stream.corpus(500)]:
        subjects = [name for name in used if name in text]
        # persons also answer questions: a mayor or a founder is an object there
        assert all(text.endswith(f"{name}.") for name in subjects), text


def test_held_out_texts_are_not_in_the_corpus(stream):
    facts = set(stream.texts[100:])
    assert facts
    assert not facts & set(stream.corpus(5000))


def test_pets_are_tested_in_a_wording_that_was_not_trained(stream):
    task = stream.downstream("pets", seed=2)
    train, test = dict(task.train), dict(task.test)
    assert not train.keys() & test.keys()
    assert len(task.train) == 2 * len(task.test)
    for prompt, pet in test.items():
        owner = next(n for n in stream.world.entities["person"] if n in prompt)
        assert {p for q, p in task.train if owner in q} == {pet}


@pytest.mark.parametrize("name", ["reversal", "sorting", "addition"])
def test_symbolic_tasks_are_right_and_tested_on_unseen_inputs(stream, name):
    task = stream.downstream(name)
    assert len(task.test) == 200
    assert not dict(task.train).keys() & dict(task.test).keys()
    for prompt, target in task.train[:50]:
        if name == "addition":
            words = prompt.replace("?", "").split()
            assert int(words[3]) + int(words[5]) == int(target)
        else:
            given = prompt.split(", ")[1].removesuffix(" is").split()
            wanted = given[::-1] if name == "reversal" else sorted(given)
            assert target.split() == wanted


def test_unknown_task_is_refused(stream):
    with pytest.raises(ValueError, match="no downstream task 'chess'"):
        stream.downstream("chess")


@pytest.mark.parametrize("split", ["edit", "dev"])
def test_intrinsic_facts_are_true_and_nobody_elses(folder, split):
    """No edit, no other probe and no text that a method may see is about their subjects."""
    data = make(folder, split=split, intrinsic=6)
    world = data.world
    fact_of = {world.prompt(fact, t): fact for fact in world.facts for t in fact.trained}
    asked = [probe for probe in data.probes if probe.kind == "intrinsic"]
    assert len({p.id for p in asked}) == 6
    assert all(p.edit_id is None and p.target == fact_of[p.prompt].object for p in asked)
    texts = [*data.texts, *data.corpus(500)]
    texts += [text for edit in data.edits for text in (edit.prompt, *edit.negatives)]
    texts += [probe.prompt for probe in data.probes if probe.kind != "intrinsic"]
    for subject in {fact_of[p.prompt].subject for p in asked}:
        assert not [text for text in texts if f" {subject} " in f" {text} "]


def test_intrinsic_facts_leave_the_stream_as_it_is(folder):
    plain, more = make(folder), make(folder, intrinsic=5)
    assert plain.edits == more.edits
    assert plain.probes == [p for p in more.probes if p.kind != "intrinsic"]
    assert plain.texts == more.texts


def test_more_intrinsic_facts_than_there_are_is_refused(folder):
    with pytest.raises(ValueError, match="intrinsic is 9999; this world has 0 to"):
        make(folder, intrinsic=9999)


def test_inserted_facts_are_about_nobody_the_model_knows_and_overwrite_nothing(folder, stream):
    data = make(folder, inserted=0.25)
    world = data.world
    new = [e for e in data.edits if e.subject not in world.group]
    assert len(new) == round(0.25 * len(data.edits))
    assert {e.target for e in new} <= {o for r in world.relations for o in world.objects(r)}
    assert all(e.subject in e.prompt and e.relation for e in new)
    ids = {e.id for e in new}
    asked = Counter(p.kind for p in data.probes if p.edit_id in ids)
    assert set(asked) == {"reliability", "generalization", "locality"}
    assert {p.axis for p in data.probes if p.edit_id in ids and p.kind == "locality"} == {
        "other_subject"
    }
    same = [e.subject for e in data.edits if e.id not in ids]
    assert same == [e.subject for e in stream.edits if e.id not in ids]
    with pytest.raises(ValueError, match="inserted is 2"):
        FactWorld(inserted=2)
