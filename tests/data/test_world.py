"""The fact-world: what its facts and sentences must be, and that a seed decides them."""

from collections import Counter
from dataclasses import replace

import pytest

from editkit.data.relations import CHAINS, RELATIONS
from editkit.data.world import World, WorldSize

SMALL = WorldSize(persons=120, countries=20, cities=40, companies=20, surnames=40)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def small():
    return World(seed=3, size=SMALL)


def test_default_world_has_7500_facts_in_16_relations(world):
    counts = Counter(fact.relation for fact in world.facts)
    assert len(world.facts) == 7500
    assert len(counts) == len(RELATIONS) == 16
    assert counts["born_in"] == 1000
    assert counts["capital"] == 60


def test_same_seed_gives_the_same_world_and_another_seed_another(small):
    assert World(3, SMALL).fingerprint() == small.fingerprint()
    assert World(4, SMALL).fingerprint() != small.fingerprint()
    assert World(3, replace(SMALL, two_hop_share=0.2)).fingerprint() != small.fingerprint()


def test_packaged_world_does_not_drift(world):
    """The packaged model was trained on these facts: a change here needs a new model."""
    assert world.facts[0].relation == "born_in"
    assert world.fingerprint()[:16] == "c4f6439d40b2fce7"


def test_every_fact_splits_its_eight_wordings_in_two_halves(world):
    for fact in world.facts:
        assert len(fact.trained) == len(fact.held_out) == 4
        assert sorted(fact.trained + fact.held_out) == list(range(8))


def test_every_relation_has_five_statements_and_three_questions():
    for relation in RELATIONS:
        assert len(relation.statements) == 5
        assert len(relation.questions) == 3
        assert len(set(relation.templates)) == 8
        assert all("{s}" in template for template in relation.templates)
        assert all(template.endswith("Answer:") for template in relation.questions)


def test_names_are_unique_across_kinds_and_surnames_are_shared(world):
    named = [
        name
        for kind in ("person", "country", "city", "company", "language", "currency", "university")
        for name in world.entities[kind]
    ]
    assert len(named) == len(set(named))
    surnames = Counter(name.split()[1] for name in world.entities["person"])
    assert sum(surnames.values()) / len(surnames) > 2.5


def test_a_capital_lies_in_its_country(world):
    for country in world.entities["country"]:
        assert world.answer(world.answer(country, "capital"), "located_in") == country


def test_reversible_relations_are_one_to_one(world):
    for relation in RELATIONS:
        if relation.reverse:
            objects = [fact.object for fact in world.facts if fact.relation == relation.name]
            assert len(objects) == len(set(objects)), relation.name


def test_two_hop_sentences_end_where_walking_the_facts_ends(world):
    facts = {(fact.subject, fact.relation): fact.object for fact in world.facts}
    assert {hop.path for hop in world.two_hop} == set(CHAINS)
    for hop in world.two_hop:
        first, second = hop.path
        assert hop.object == facts[facts[hop.subject, first], second]
        assert all(hop.subject in prompt for prompt in hop.prompts)


def test_reversed_sentences_ask_for_the_subject_of_their_fact(world):
    for turned in world.reversed:
        assert world.answer(turned.object, turned.path[0]) == turned.subject


def test_groups_share_out_every_subject_of_every_kind(world):
    for kind in ("person", "country", "city", "company"):
        counts = Counter(world.group[name] for name in world.entities[kind])
        assert counts["edit"] == 0.65 * len(world.entities[kind])
        assert counts["dev"] == counts["background"] == 0.1 * len(world.entities[kind])


def test_filler_states_nothing_of_the_world_and_depends_on_its_seed(world):
    names = {word for names in world.entities.values() for name in names for word in name.split()}
    names -= {word for word in names if word.islower()}  # animals and trades are plain nouns
    filler = world.filler(300, seed=1)
    assert not names & {word.strip(".") for text in filler for word in text.split()}
    assert filler == world.filler(300, seed=1)
    assert filler != world.filler(300, seed=2)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="5000 persons need more than 10 surnames"):
        World(size=WorldSize(persons=5000, surnames=10))
    with pytest.raises(ValueError, match="30 cities for 60 capitals"):
        World(size=WorldSize(cities=30))
