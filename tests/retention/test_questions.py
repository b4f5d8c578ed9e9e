"""Questions of a fact-world run: no model is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from editkit.data.factworld import FactWorld
from editkit.data.finetuning import Example
from editkit.edits import Probe
from editkit.metrics.protocol import EvalProtocol
from editkit.retention import asking
from editkit.retention.asking import final_number
from editkit.retention.items import (
    Item,
    ProbeSets,
    facts_of,
    fingerprint,
    freeze,
    make_items,
    thaw,
)
from editkit.retention.outcome import against_control, lines, match_facts, rates
from editkit.retention.relearn import lost_pairs
from editkit.retention.source import EditedRun
from editkit.retention.tasks import Maths

EDITS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run of fact-world leaves, without its weights; edit 3 was taken back."""
    path = tmp_path_factory.mktemp("runs") / "fw"
    path.mkdir(exist_ok=True)
    options = {"limit": EDITS, "seed": 5}
    data = {"class_path": "editkit.data.factworld.FactWorld", "init_args": options}
    (path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    config = {"class_path": "editkit.methods.ft.FT", "base": {"id": "factworld", "hash": "x"}}
    config |= {"format": 1, "tensors_sha256": "", "init_args": {}, "lm": {}, "edits_seen": EDITS}
    (path / "adapter_config.json").write_text(json.dumps(config))
    stream = FactWorld(**options)
    stream.setup()
    rows = [
        {"edit_id": e.id, "prompt": e.prompt, "target": e.target, "subject": e.subject,
         "undone": e.id == 3}
        for e in stream.edits
    ]  # fmt: skip
    (path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(folder):
    return EditedRun(folder)


@pytest.fixture(scope="module")
def items(run):
    return make_items(run, ProbeSets(intrinsic_per_edit=3, unknown=5, rephrases=1, neighbours=1))


def of(items, letter, kind=None):
    return [i for i in items if i.set == letter and kind in (None, i.prompt_kind)]


def test_all_sets_are_asked_and_edits_that_were_taken_back_are_not(run, items):
    assert len(run.standing) == EDITS - 1
    assert len(of(items, "E", "rewrite")) == EDITS - 1
    assert len(of(items, "E", "old")) == EDITS - 1
    assert len(of(items, "E", "rephrase")) == EDITS - 1
    assert len(of(items, "N")) == EDITS - 1
    assert len(of(items, "K")) == 3 * (EDITS - 1)
    assert len(of(items, "U")) == 5
    assert not any(i.probe.edit_id == 3 for i in items)
    assert len({i.id for i in items}) == len(items)


def test_the_old_answer_of_an_edit_is_what_the_world_says(run, items):
    for item in of(items, "E", "rewrite"):
        edit = run.standing[item.probe.edit_id]
        assert item.old == run.world.answer(edit.subject, edit.relation) != item.probe.target
        assert item.probe.rival == item.old


def test_intrinsic_facts_are_true_untouched_and_of_the_relations_that_were_edited(run, items):
    subjects = {e.subject for e in run.data.edits}
    relations = {e.relation for e in run.standing.values()}
    for item in of(items, "K"):
        assert run.world.answer(item.subject, item.relation) == item.probe.target
        assert item.subject not in subjects
        assert item.relation in relations


def test_unknown_statements_are_about_nobody_of_this_world(run, items):
    assert not {i.subject for i in of(items, "U")} & {*run.world.group}


def test_training_texts_may_touch_neither_edits_nor_intrinsic_facts(run, items):
    facts = facts_of(run, items)
    assert len(facts) == EDITS - 1 + len(of(items, "K"))
    assert {run.standing[0].target, run.old_answers[0]} == {*facts[0].objects}


def test_frozen_questions_come_back_the_same_and_others_are_not_mixed_in(items, tmp_path):
    path = tmp_path / "probes.jsonl"
    sha = freeze(path, items)
    assert thaw(path) == items
    assert freeze(path, items) == sha == fingerprint(thaw(path))
    with pytest.raises(ValueError, match="holds other questions"):
        freeze(path, items[1:])


def test_a_stream_that_has_changed_is_refused(folder, tmp_path):
    (folder / "summary.json").write_text(json.dumps({"protocol": {"data_sha256": "0"}}))
    with pytest.raises(ValueError, match="no longer the one that was edited"):
        EditedRun(folder)
    (folder / "summary.json").unlink()


def test_edits_with_ids_of_their_own_are_all_asked(folder, tmp_path):
    shutil.copy(folder / "adapter_config.json", tmp_path)
    lines = (folder / "edits.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["edit_id"] += 1000

    def save():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "edits.jsonl").write_text(text)

    save()
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "Oslo lies in", "subject": "Oslo", "target": "Norway"}\n')
    run = EditedRun(tmp_path)
    asked = of(make_items(run, ProbeSets(facts=facts)), "E", "rewrite")
    assert {i.probe.edit_id: i.probe.prompt for i in asked} == {
        row["edit_id"]: row["prompt"] for row in rows if not row["undone"]
    }
    assert {*run.standing} == {i.probe.edit_id for i in asked}
    rows[0]["edit_id"] = 1001
    save()
    with pytest.raises(ValueError, match="has edit 1001 twice"):
        EditedRun(tmp_path)
    for row in rows:
        row["undone"] = True
    save()
    with pytest.raises(ValueError, match="holds no edit that stands"):
        EditedRun(tmp_path)
    for i, row in enumerate(rows):
        row |= {"undone": False, "edit_id": 1000 + i}
    save()
    shutil.copy(folder / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="is in the stream that its"):
        EditedRun(tmp_path)


def answer(item: Item, said: str, nll: float = 0.5) -> dict:
    right = float(said == item.probe.target)
    return {
        "answer": said, "counted": True, "probe_id": item.id,
        "scores": {"generation": right, "nll": nll},
    }  # fmt: skip


def test_rates_of_a_run_worked_by_hand(run, items):
    own, known = of(items, "E", "rewrite")[:4], of(items, "K")[:4]
    olds = {i.probe.edit_id: i for i in of(items, "E", "old")}
    asked = [*own, *(olds[i.probe.edit_id] for i in own), *known]
    base = {i.id: answer(i, i.old if i.set == "E" else i.probe.target, 4.0) for i in own + known}
    edited = {i.id: answer(i, i.probe.target, 0.25) for i in own + known}
    edited[own[3].id] = answer(own[3], "nothing like it")  # never took
    edited[known[3].id] = answer(known[3], "lost by editing")
    tuned = dict(edited)
    tuned[own[0].id] = answer(own[0], own[0].old, 2.25)  # back to the old answer
    tuned[own[1].id] = answer(own[1], "something else", 1.25)
    tuned[known[0].id] = answer(known[0], "")
    for item in own:
        old = olds[item.probe.edit_id]
        base[old.id], edited[old.id] = answer(old, old.probe.target, 0.1), answer(old, "x", 3.25)
        tuned[old.id] = answer(old, "x", 1.25)
    matched = frozenset(i.id for i in known[:2])
    told = [*lines("r", "edited", 9, asked, base, edited, tuned, matched)]
    found = rates(told)
    assert (found["ERR"]["value"], found["ERR"]["n"]) == (pytest.approx(1 / 3), 3)
    assert (found["IRR"]["value"], found["IRR"]["n"]) == (pytest.approx(2 / 3), 3)
    assert found["IRR_matched"]["value"] == 0.5
    assert found["gap"]["value"] == pytest.approx(1 / 3)
    assert found["ratio"]["value"] == pytest.approx(0.5)
    assert found["EFR"]["value"] == pytest.approx(2 / 3)
    assert found["emergence"]["value"] == 0.0
    assert found["relative_decrease"] == pytest.approx((3 / 4 - 1 / 4) / (3 / 4))
    assert found["fates"] == {"erased_true": 1, "erased_other": 1, "stable": 1, "impossible": 1}
    assert found["soft"]["edits"]["value"] == pytest.approx(-(2.0 + 1.0 + 0.0) / 3)
    # log p(new) - log p(old): -.25 + 3.25 before; -2.25, -1.25, -.25 and + 1.25 after
    assert found["soft"]["margin"]["before"]["value"] == pytest.approx(3.0)
    assert found["soft"]["margin"]["after"]["value"] == pytest.approx(0.0)
    assert {r["subset"] for r in told if r["set"] == "E"} == {"overwritten"}
    never = [*lines("r", "control", 9, known, base, None, edited, matched)]
    versus = against_control(told, never)
    assert versus["diff_in_diff"]["value"] == pytest.approx(3 / 4 - 1 / 3)
    assert (versus["facts_kept_by_control_alone"], versus["facts_kept_by_edited_alone"]) == (1, 0)


def test_facts_are_matched_by_relation_and_by_how_sure_the_model_is(items):
    edit = of(items, "E", "rewrite")[0]
    pool = [i for i in of(items, "K") if i.relation == edit.relation]
    others = [i for i in of(items, "K") if i.relation != edit.relation][:3]
    assert pool
    asked = [edit, *pool, *others]
    base = {i.id: answer(i, i.probe.target, 1.0 + n) for n, i in enumerate(asked)}
    edited = {i.id: answer(i, i.probe.target, 0.1) for i in asked}
    base[edit.id] = answer(edit, "old", 9.0)
    chosen = match_facts(asked, base, edited, 1)
    assert chosen == {pool[0].id}  # 2 nats is nearest to .1
    edited[pool[0].id] = answer(pool[0], "lost")
    assert pool[0].id not in match_facts(asked, base, edited, 1)


@pytest.mark.parametrize(("said", "partner"), [("old", "K"), ("something", "U")])
def test_lost_edits_are_paired_by_what_the_base_model_knew(said, partner):
    def item(letter, kind, name, target, old=None):
        return Item(letter, kind, Probe(name, 0, "intrinsic", name, target), "r", "s", old)

    own = item("E", "rewrite", "e", "new", old="old")
    items = [own, item("K", "intrinsic", "k", "x"), item("U", "unknown", "u", "y")]
    edited = {i.id: answer(i, i.probe.target) for i in items}
    base, tuned = edited | {"e": answer(own, said)}, edited | {"e": answer(own, "old")}
    ((lost, other),) = lost_pairs(items, base, edited, tuned)
    assert (lost, other.set) == (own, partner)


def test_final_numbers():
    assert final_number("2 + 3 = 5\n#### 1,005.") == 1005
    assert final_number("so five") is None
    assert final_number("so five\n#### five") is None
    assert final_number("#### -5") != final_number("#### 5")
    assert final_number("#### 3.5") != final_number("#### 35")
    assert final_number("#### $3.50") == final_number("#### 3.5") == final_number("####3.5 km")


def test_what_has_no_number_is_no_hit(monkeypatch):
    said = [("#### 3.0", "#### 3"), ("#### 35", "#### 3.5"), ("three", "three")]
    rows = [{"answer": answer, "target": target} for answer, target in said]
    monkeypatch.setattr(asking, "score_probes", lambda *_: rows)
    objective = Maths()
    objective.tests = [Example("q", target) for _, target in said]
    method = type("Method", (), {"lm": None})
    assert asking.ask_downstream(method, objective, EvalProtocol()) == pytest.approx(1 / 3)
