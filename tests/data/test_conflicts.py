"""Conflicts: found by what edits say, exactly, in seconds, and named with the earlier edit."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest

from editkit.data.conflicts import ConflictIndex, bare, find_conflicts
from editkit.edits import Edit


def stream(*rows):
    return [Edit(i, *row) for i, row in enumerate(rows)]


def found(*rows, **options):
    return [(c.kind, c.edit.id, c.earlier.id) for c in find_conflicts(stream(*rows), **options)]


def test_the_same_question_is_a_duplicate_or_a_contradiction():
    rows = [
        ("The capital of Alba is", "Oslo"),
        ("the  capital of Alba is:", "oslo."),
        ("The capital of Alba is", "Lima"),
        ("The capital of Bera is", "Lima"),
    ]
    assert found(*rows) == [("duplicate", 1, 0), ("contradiction", 2, 1)]


def test_the_earlier_edit_is_the_one_in_force():
    """Going back to the first answer contradicts the second one."""
    rows = [("who leads Alba", "Ann"), ("who leads Alba", "Bob"), ("who leads Alba", "Ann")]
    assert found(*rows) == [("contradiction", 1, 0), ("contradiction", 2, 1)]


def test_rephrases_are_wordings_of_the_same_question():
    rows = [
        ("Alba is led by", "Ann", "Alba", (), ("The head of Alba is",)),
        ("The head of Alba is", "Bob", "Alba"),
        ("Who heads Alba?", "Cid", "Alba", (), ("Alba is led by",)),
    ]
    assert found(*rows) == [("contradiction", 1, 0), ("contradiction", 2, 0)]


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("What is the capital of Alba?", "The capital of Alba is what", True),
        ("The publisher of Old History is", "The publisher of the Old History is", True),
        ("On what team is Andrew Toney?", "What team is Andrew Toney on?", True),
        ("The capital of Alba is", "The capital of Bera is", False),
        ("The name of the city in which the late Ann was born is",
         "The name of the city in which the late Bob was born is", False),
        ("Ann Cole was born in", "Ann Cole was born in the year", False),
        ("The creator of C++ is", "The creator of C is", False),
    ],
)  # fmt: skip
def test_near_is_most_of_the_words_and_most_of_the_rare_ones(one, other, near):
    others = [(f"The {w} of {n} is what", "x") for w in ("capital", "name", "creator")
              for n in ("Cora", "Dora", "Elda", "Fora")]  # fmt: skip
    hits = [f for f in found(*others, (one, "a"), (other, "b")) if f[1] == len(others) + 1]
    assert hits == ([("near", len(others) + 1, len(others))] if near else [])


def test_near_prompts_about_different_subjects_are_no_conflict():
    rows = [
        ("Argentine Football Association belongs to the organization of", "NATO"),
        ("The Football Association belongs to the organization of", "FIFA"),
    ]
    assert found(*rows) == [("near", 1, 0)]
    subjects = ["Argentine Football Association", "The Football Association"]
    assert found(*((*row, s) for row, s in zip(rows, subjects, strict=True))) == []


def brute_force(edits, similarity):
    """The definition, word for word: every pair, weights of what was there by then."""
    for i, edit in enumerate(edits):
        earlier = edits[:i]
        same = [e for e in earlier if bare(e.prompt) == bare(edit.prompt)]
        if same:
            is_same = bare(same[-1].target) == bare(edit.target)
            yield "duplicate" if is_same else "contradiction", edit.id, same[-1].id, 1.0
            continue
        different = {bare(e.prompt) for e in earlier}
        sets = [frozenset(text.split()) for text in different]
        words = frozenset(bare(edit.prompt).split())
        weight = {
            w: math.log(1 + (len(sets) + 1) / (1 + sum(w in s for s in sets)))
            for w in set().union(words, *sets)
        }
        best = None
        for other in earlier:
            theirs = frozenset(bare(other.prompt).split())
            both, either = words & theirs, words | theirs
            value = min(
                len(both) / len(either),
                math.fsum(weight[w] for w in both) / math.fsum(weight[w] for w in either),
            )
            if value >= similarity and (best is None or value >= best[0] - 1e-12):
                best = (value, other.id)
        if best:
            yield "near", edit.id, best[1], best[0]


@pytest.mark.parametrize("similarity", [0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("vocabulary", [8, 40, 400])
def test_equal_to_comparing_every_pair(vocabulary, similarity):
    draw = random.Random(vocabulary)
    words = [f"w{n}" for n in range(vocabulary)]
    weights = [1 / (n + 1) for n in range(vocabulary)]
    edits = [
        Edit(i, " ".join(draw.choices(words, weights, k=draw.randint(2, 7))), draw.choice("ab"))
        for i in range(200)
    ]
    expected = list(brute_force(edits, similarity))
    conflicts = find_conflicts(edits, similarity)
    assert [(c.kind, c.edit.id, c.similarity) for c in conflicts] == [
        (kind, edit_id, pytest.approx(value)) for kind, edit_id, _, value in expected
    ]
    exact = [(c.kind, c.edit.id, c.earlier.id) for c in conflicts if c.kind != "near"]
    assert exact == [e[:3] for e in expected if e[0] != "near"]
    assert {"near", "contradiction"} <= {c.kind for c in conflicts} or vocabulary == 400


def test_ten_thousand_edits_take_seconds_also_where_words_are_few():
    draw = random.Random(0)
    words = [f"w{n}" for n in range(30)]
    few = [Edit(i, " ".join(draw.choices(words, k=8)), "x") for i in range(10_000)]
    facts = [
        Edit(i, f"The {attribute} of {name} Lane in the old town of {name} is", "x")
        for i, (attribute, name) in enumerate(
            itertools.product(words[:10], (f"n{k}" for k in range(1000)))
        )
    ]
    for edits in (few, facts, [Edit(i, "one and the same", "x") for i in range(10_000)]):
        start = time.process_time()
        find_conflicts(edits)
        assert time.process_time() - start < 5


def test_marks_within_words_mean_something():
    assert bare("  What is  Alba's “capital”? ") == "what is alba capital"
    assert bare("C++ and 3.5, and St. Louis!") == "c++ and 3.5 and st louis"
    assert bare("?!") == "?!"


def test_a_similarity_out_of_range_is_refused():
    for wrong in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="must be above 0"):
            ConflictIndex(wrong)


def test_a_conflict_names_both_edits():
    (conflict,) = find_conflicts(stream(("who leads Alba", "Ann"), ("Who leads Alba?", "Bob")))
    assert str(conflict) == (
        "edit 1 contradicts edit 0: 'Who leads Alba?' -> 'Bob', before 'who leads Alba' -> 'Ann'"
    )
    assert conflict.row() == {
        "kind": "contradiction", "edit_id": 1, "prompt": "Who leads Alba?", "target": "Bob",
        "earlier_id": 0, "earlier_prompt": "who leads Alba", "earlier_target": "Ann",
        "similarity": 1.0,
    }  # fmt: skip
