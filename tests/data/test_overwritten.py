"""Which probes an edit of the same stream makes wrong, and from when."""

import random

import pytest

import editkit
from editkit.data.base import EditDataModule
from editkit.data.factworld import FactWorld
from editkit.data.source import plain, until_overwritten
from editkit.edits import Edit, Probe


def stream(*facts):
    return [Edit(i, prompt, target) for i, (prompt, target) in enumerate(facts)]


def until(edits, probe, **rests_on):
    (found,) = until_overwritten(edits, [probe], rests_on)
    return found.until


TWICE = stream(("a is", "x"), ("b is", "y"), (" A  is", "z"), ("a is", "w"))


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (Probe("p", 0, "reliability", "a is", "x"), 2),
        (Probe("p", 2, "reliability", "a is", "z"), 3),
        (Probe("p", 3, "reliability", "a is", "w"), None),
        (Probe("p", 1, "reliability", "b is", "y"), None),
        (Probe("p", 0, "generalization", "what is a?", "x"), 2),
        (Probe("p", 0, "portability", "the home of a is", "h"), 2),
        (Probe("p", 1, "generalization", "a is", "y"), 2),  # its own edit came after edit 0
        (Probe("p", None, "intrinsic", "a is", "x"), 2),
        (Probe("p", None, "intrinsic", "c is", "x"), None),
    ],
)
def test_an_edit_is_superseded_by_the_next_one_with_another_target(probe, expected):
    assert until(TWICE, probe) == expected


def test_the_same_target_again_or_in_other_case_is_no_update():
    edits = stream(("a is", "New York"), ("a is", "new  york"))
    assert until(edits, Probe("p", 0, "reliability", "a is", "New York")) is None


@pytest.mark.parametrize("own", [0, 2])
def test_a_locality_question_ends_with_any_edit_of_it_whenever_that_is(own):
    edits = stream(("a is", "x"), ("b is", "gold"), ("c is", "z"))
    assert until(edits, Probe("p", own, "locality", "b is", "gold")) == 1
    assert until(edits, Probe("p", own, "locality", "d is", "gold")) is None


def test_another_wording_of_an_edit_is_the_same_fact():
    edits = [Edit(0, "a is", "x"), Edit(1, "what is a?", "y", rephrases=("tell me a",))]
    asked = Probe("g", 0, "generalization", "What is a?", "x")
    first = Probe("r", 0, "reliability", "a is", "x")
    found = until_overwritten(edits, [first, asked], {})
    assert [probe.until for probe in found] == [1, 1]
    assert until(edits, first) is None  # nothing says that both are of one fact
    assert until(edits, Probe("l", 0, "locality", "tell me a", "n")) == 1


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([("a is", "x"), ("case", "t")], 0),  # made before, and stands
        ([("a is", "x"), ("a is", "true"), ("case", "t")], None),  # put right before
        ([("a is", "true"), ("case", "t")], None),
        ([("case", "t"), ("b is", "y"), ("a is", "x")], 2),
    ],
)
def test_a_probe_that_rests_on_a_fact_is_asked_while_the_fact_stands(facts, expected):
    edits = stream(*facts)
    own = [edit.prompt for edit in edits].index("case")
    probe = Probe("hop", own, "portability", "q", "answer")
    assert until(edits, probe, hop=(("a is", "true"),)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_against_a_simulation_of_the_stream(seed):
    """Replay the stream as a dictionary; a probe holds while its edit's answer is in it."""
    draw = random.Random(seed)
    names = [f"{chr(97 + i)} is" for i in range(6)]
    edits = stream(*((draw.choice(names), draw.choice("xyz")) for _ in range(15)))
    probes = [Probe(f"{e.id}", e.id, "reliability", e.prompt, e.target) for e in edits]
    probes += [
        Probe(f"l{e.id}", e.id, "locality", draw.choice([*names, "other"]), "g") for e in edits
    ]
    found = until_overwritten(edits, probes, {})
    for seen in range(1, len(edits) + 1):
        world, touched = {}, set()
        for edit in edits[:seen]:
            world[edit.prompt] = edit.target
            touched.add(edit.prompt)
        for probe in found:
            if probe.edit_id >= seen:
                assert not probe.is_due(seen)
                continue
            if probe.kind == "locality":
                assert probe.is_due(seen) == (probe.prompt not in touched)
            elif not probe.is_due(seen):
                # a fact that is put back later is not asked again
                after = [
                    e.target for e in edits[probe.edit_id + 1 : seen] if e.prompt == probe.prompt
                ]
                assert set(after) - {probe.target}
            else:
                assert world[probe.prompt] == probe.target


def test_order_and_slices_come_before(numbered):
    class Twice(EditDataModule):
        def load(self):
            edits = stream(("a is", "x"), ("b is", "y"), ("a is", "z"))
            probes = [Probe(f"{e.id}", e.id, "reliability", e.prompt, e.target) for e in edits]
            return edits, probes

    def ends(**kwargs):
        data = Twice(**kwargs)
        data.setup()
        return {probe.target: probe.until for probe in data.probes}

    assert ends() == {"x": 2, "y": None, "z": None}
    assert ends(limit=2) == {"x": None, "y": None}
    orders = {tuple(sorted(ends(order="shuffled", seed=s).items(), key=str)) for s in range(8)}
    assert len(orders) > 1
    for order in orders:
        overwritten = {target for target, end in order if end is not None}
        assert len(overwritten) == 1
        assert overwritten < {"x", "z"}


def test_the_invented_world_contradicts_none_of_its_probes():
    data = FactWorld(limit=400)
    data.setup()
    prompts = {plain(edit.prompt) for edit in data.edits}
    assert len(prompts) == 400
    assert all(probe.until is None for probe in data.probes)


@pytest.mark.filterwarnings("ignore:.*contradicts edit 0")
def test_the_evaluator_leaves_overwritten_probes_out(tiny):
    lm = editkit.load(tiny("gpt2"), method="ft", layer=2, steps=2, lr=1e-3)
    edits = stream(("the capital of Alba is", "Oslo"), ("the capital of Alba is", "Rome"))
    asked = [Probe(f"{e.id}", e.id, "reliability", e.prompt, e.target) for e in edits]
    asked = until_overwritten(edits, asked, {})
    lm.edit(edits[0].prompt, edits[0].target)
    assert [row["probe_id"] for row in lm.score(asked)] == ["0"]
    lm.edit(edits[1].prompt, edits[1].target)
    assert [row["probe_id"] for row in lm.score(asked)] == ["1"]
