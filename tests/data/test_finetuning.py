from __future__ import annotations

import pytest

from editkit.data.factworld import load_world
from editkit.data.finetuning import GOOD, LABELS, Example, made_examples

NAMES = ("text", "instructions", "maths", "sentiment", "knowledge", "preference")


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.mark.parametrize("name", NAMES)
def test_rows_repeat_with_the_seed_and_no_prompt_is_trained_and_tested(world, name):
    train, test = made_examples(world, name, seed=1)
    assert (train, test) == made_examples(world, name, seed=1)
    assert (train, test) != made_examples(world, name, seed=2)
    asked = {row.prompt or row.target for row in test}
    assert len(train) > 200
    assert len(test) >= 50
    assert not asked & {row.prompt or row.target for row in train}


@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_about_a_subject_of_the_split_for_results(world, name):
    edited = {s for s, group in world.group.items() if group in ("edit", "near_edit")}
    people = {name for name in edited if " " in name}
    for rows in made_examples(world, name):
        for row in rows:
            assert not any(person in row.prompt for person in people)


def test_right_answers_are_right(world):
    for row in made_examples(world, "maths")[1]:
        left, right = row.target.split("\n#### ")
        assert eval(left.partition("=")[0]) == int(right)
    for row in made_examples(world, "sentiment")[1]:
        is_good = any(row.prompt.endswith(f" is {word}\nSentiment:") for word in GOOD)
        assert row.target == f"{LABELS[is_good]}."
        assert row.choices == (f"{LABELS[not is_good]}.",)
    for row in made_examples(world, "instructions")[1][:50]:
        assert row.target.removesuffix(".") in {fact.object for fact in world.facts}


def test_a_misspelt_objective_is_refused(world):
    with pytest.raises(ValueError, match="no made objective 'chess'"):
        made_examples(world, "chess")


def test_the_text_of_a_row_is_all_of_it():
    assert Example("a", "b", "c").text == "a b c"
    assert Example("", "b").text == "b"
