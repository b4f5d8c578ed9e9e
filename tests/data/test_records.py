"""What all data sets share: contradictions, texts for training, wrong files, the account."""

import hashlib
import io
import json
import logging

import pytest
from rich.console import Console

from editkit.data.counterfact import CounterFact
from editkit.data.hallucination import Hallucination
from editkit.data.jsonl import JSONL
from editkit.data.knowedit import KnowEdit
from editkit.data.mquake import MQuAKE
from editkit.data.qaedit import QAEdit
from editkit.data.records import RecordModule, modules
from editkit.data.rippleedits import RippleEdits
from editkit.data.rows import BadRowsError
from editkit.data.source import leaks
from editkit.data.temporal import Temporal
from editkit.data.wikibigedit import WikiBigEdit
from editkit.data.zsre import ZsRE


def zsre(n, alt="Oslo", **more):
    return {
        "subject": f"Alba {n}",
        "src": f"What is the capital of Alba {n}?",
        "alt": alt,
        "answers": ["Lima", "Limas"],
        "rephrase": f"Alba {n} is ruled from where?",
        "loc": f"nq question: who sang song {n}",
        "loc_ans": f"singer {n}",
        **more,
    }


def loaded(module, path, **kwargs):
    data = module(path, **kwargs)
    data.setup()
    return data


# --- contradictions


@pytest.fixture
def updated(write):
    return write(zsre(0), zsre(1), zsre(0, alt="Rome", rephrase="Where is Alba 0's seat?"))


def test_an_update_is_made_and_what_it_overwrites_is_asked_until_then(updated):
    data = loaded(ZsRE, updated)
    assert [edit.target for edit in data.edits] == ["Oslo", "Oslo", "Rome"]
    ends = {probe.id: probe.until for probe in data.probes}
    assert {name for name, end in ends.items() if end == 2} == {
        "row1.reliability",
        "row1.generalization.0",
    }
    assert {end for name, end in ends.items() if not name.startswith("row1.")} == {None}
    assert ends["row1.locality.0"] is None
    assert data.report.notes["probes asked until an edit overwrites them"] == 2
    assert data.report.notes["edits that update an earlier one"] == 1


def test_all_are_asked_to_the_end_where_told(updated):
    data = loaded(ZsRE, updated, contradictions="ask")
    assert len(data.edits) == 3
    assert {probe.until for probe in data.probes} == {None}


def test_an_update_is_a_bad_row_where_told(updated):
    with pytest.raises(BadRowsError, match="'Rome' here and 'Oslo' in line 1"):
        loaded(ZsRE, updated, contradictions="refuse")
    data = loaded(ZsRE, updated, contradictions="refuse", on_bad_row="skip")
    assert [edit.target for edit in data.edits] == ["Oslo", "Oslo"]
    assert data.report.reasons == {"contradiction": 1}


def test_updates_of_a_users_own_file_are_let_in_where_told(write):
    path = write({"prompt": "p", "target": "a"}, {"prompt": "p", "target": "b"})
    with pytest.raises(BadRowsError, match="contradiction"):
        loaded(JSONL, path)
    assert [p.until for p in loaded(JSONL, path, contradictions="update").probes] == [1, None]


def test_repeats_and_updates_are_counted_against_what_is_in_force(write):
    rows = [{"prompt": "p", "target": t} for t in "aabba"]
    data = loaded(JSONL, write(*rows), contradictions="update")
    assert data.report.notes["edits that repeat an earlier one"] == 2
    assert data.report.notes["edits that update an earlier one"] == 2


# --- texts for training


def test_rephrasings_for_training_are_no_longer_asked(write):
    path = write(zsre(0), zsre(1))
    data = loaded(ZsRE, path, train_rephrases=1)
    assert [edit.rephrases for edit in data.edits] == [
        ("Alba 0 is ruled from where?",),
        ("Alba 1 is ruled from where?",),
    ]
    assert {probe.kind for probe in data.probes} == {"reliability", "locality"}


def test_one_of_two_paraphrases_is_left_to_ask(write):
    rewrite = {
        "prompt": "{} is in",
        "subject": "Alba",
        "target_new": {"str": "Asia"},
        "target_true": {"str": "Europe"},
    }
    row = {
        "case_id": 1,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": ["first", "second"],
        "neighborhood_prompts": [],
    }
    data = loaded(CounterFact, write(row), train_rephrases=1)
    assert data.edits[0].rephrases == ("first",)
    assert [p.prompt for p in data.probes if p.kind == "generalization"] == ["second"]
    data = loaded(CounterFact, write(row), train_rephrases=5)
    assert data.edits[0].rephrases == ("first", "second")


def test_each_edit_sees_an_unrelated_text_of_the_training_file_in_turn(write):
    train = write(zsre(7), {"src": "?", "alt": ""}, zsre(8), name="train.jsonl")
    data = loaded(ZsRE, write(zsre(0), zsre(1), zsre(2)), negatives=train)
    assert [edit.negatives for edit in data.edits] == [
        ("nq question: who sang song 7 singer 7",),
        ("nq question: who sang song 8 singer 8",),
        ("nq question: who sang song 7 singer 7",),
    ]


def test_the_training_file_may_be_of_another_data_set(write):
    wiki = {"update": "Who leads Alba?", "ans": "Dora", "subject": "Alba"}
    train = write(zsre(7), name="train.jsonl")
    data = loaded(WikiBigEdit, write(wiki), negatives=train)
    assert data.edits[0].negatives == ("nq question: who sang song 7 singer 7",)


def test_no_text_for_training_is_asked_by_any_edit(write):
    train = write(zsre(1), zsre(8), name="train.jsonl")  # row 1's question is asked below
    rows = [zsre(0), zsre(1, rephrase="  what IS the capital of Alba 0?")]
    data = loaded(ZsRE, write(*rows), negatives=train, train_rephrases=1)
    assert [edit.negatives for edit in data.edits] == [
        ("nq question: who sang song 8 singer 8",),
        ("nq question: who sang song 8 singer 8",),
    ]
    assert [edit.rephrases for edit in data.edits] == [("Alba 0 is ruled from where?",), ()]
    assert data.report.notes["texts for training left out, since asked"] == 2
    assert not list(leaks(data.edits, data.probes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([zsre(0)], "all 1 texts of `negatives` are asked as probes"),
        ([zsre(5, loc=None, loc_ans=None)], "no row holds a locality question with an answer"),
        ([{"x": 1}], "no row holds a locality question"),
    ],
)
def test_a_training_file_without_a_usable_text_is_refused(write, rows, message):
    train = write(*rows, name="train.jsonl")
    with pytest.raises(ValueError, match=message):
        loaded(ZsRE, write(zsre(0)), negatives=train)


# --- wrong files

FLAT = {"prompt": "a is", "target_new": "b", "subject": "a", "rephrase_prompt": "r"}
NESTED = {
    "prompt": "{} is",
    "subject": "a",
    "target_new": {"str": "b"},
    "target_true": {"str": "c"},
}
FOREIGN = {
    ZsRE: {"src": "q", "alt": "a"},
    CounterFact: {"case_id": 0, "requested_rewrite": NESTED, "neighborhood_prompts": []},
    Hallucination: {"prompt": "p", "target_new": "t", "locality_prompt": "l"},
    Temporal: {"prompt": "p", "target_new": "t", "ood_rephrase": "p o", "locality_prompt": "l"},
    MQuAKE: {"case_id": 1, "requested_rewrite": [NESTED], "questions": ["q"]},
    RippleEdits: {"edit": {"prompt": "a is b."}, "Compositionality_I": []},
    KnowEdit: {"prompt": "p", "target_new": "t", "portability": {}, "locality": {}},
    QAEdit: {"prompt": "p", "target": "t", "rephrase": "r", "locality": []},
    WikiBigEdit: {"update": "q", "ans": "a"},
    JSONL: {"prompt": "p", "target": "t"},
}


@pytest.mark.parametrize("owner", FOREIGN, ids=lambda m: m.__name__)
@pytest.mark.parametrize("module", FOREIGN, ids=lambda m: m.__name__)
def test_a_file_of_another_data_set_names_its_fields_and_who_reads_it(write, module, owner):
    record = FOREIGN[owner]
    assert owner.reads(record)
    if module is owner or module.reads(record):
        assert module in (owner, JSONL)
        return
    with pytest.raises(ValueError, match="holds records with the fields") as caught:
        loaded(module, write(record))
    message = str(caught.value)
    assert str(list(record)) in message
    assert f"not {module.__name__}'s" in message.replace("which are ", "")
    assert f"--data={owner.__module__}.{owner.__name__}" in message


def test_flat_rows_of_easyedit_are_told_apart():
    flat = {**FLAT, "locality_prompt": "l"}
    listed = {**FLAT, "locality": [{"prompt": "l", "ground_truth": None}]}
    readers = [m for m in modules() if m.reads(flat) or m.reads(listed)]
    assert readers == [CounterFact, JSONL]


def test_fields_that_nobody_reads_are_a_bad_row_with_what_is_needed(write):
    with pytest.raises(BadRowsError, match=r"fields \['q'\] .* no form that ZsRE reads; .* 'src'"):
        loaded(ZsRE, write({"q": 1}))


def test_one_odd_row_is_a_bad_row(write):
    path = write(zsre(0), FOREIGN[KnowEdit], zsre(1))
    data = loaded(ZsRE, path, on_bad_row="skip")
    assert [(row.line, row.reason) for row in data.refused] == [(2, "unknown form")]
    assert len(data.edits) == 2


def test_every_data_set_says_what_a_row_needs_and_has_a_card():
    assert {m.__name__ for m in modules()} >= {m.__name__ for m in FOREIGN}
    for module in FOREIGN:
        assert module.wants
        if module is not JSONL:
            for word in ("*Source*", "*Licence*", "*Row*", "*Probes*", "*In papers*"):
                assert word in module.__doc__, (module, word)


# --- the account


def test_the_account_adds_up(write, caplog):
    caplog.set_level(logging.INFO, "editkit")
    rows = [zsre(0), zsre(1, alt=" "), "{", zsre(3), zsre(4)]
    data = loaded(ZsRE, write(*rows), on_bad_row="skip", limit=2)
    report = data.report
    assert (report.rows, report.used, report.edits) == (5, 3, 2)
    assert report.reasons == {"empty field": 1, "malformed JSON": 1}
    assert report.rows == report.used + sum(report.reasons.values())
    assert report.probes == {
        ("reliability", ""): 2,
        ("generalization", ""): 2,
        ("locality", ""): 2,
    }
    for text in ("rows in 5", "rows used 3", "rows refused 2", "1 empty field"):
        assert text in str(report)
        assert text in caplog.text


def test_the_account_prints_as_a_table(write):
    path = write(zsre(0), zsre(0, alt="Rome"))
    data = loaded(ZsRE, path)
    console = Console(width=80, file=io.StringIO())
    console.print(data.report)
    text = console.file.getvalue()
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in text
    assert "none that is known here" in text
    for name, number in (("rows in", 2), ("edits that update an earlier one", 1)):
        (line,) = (line for line in text.splitlines() if name in line)
        assert line.split("│")[2].strip() == str(number)


def test_a_published_file_is_recognised_by_its_hash(write, monkeypatch):
    path = write(zsre(0))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(ZsRE, "known", {digest: "our release"})
    assert loaded(ZsRE, path).report.version == "our release"


def test_a_second_setup_reads_and_logs_no_second_time(write, caplog):
    caplog.set_level(logging.INFO, "editkit")
    data = loaded(ZsRE, write(zsre(0)))
    data.setup("fit")
    assert caplog.text.count("rows in 1") == 1
    assert data.report.rows == 1


# --- wrong arguments, other modules


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_bad_row": "raise"}, "'raise'; use 'error' or 'skip'"),
        ({"contradictions": "keep"}, "'keep'; use 'update', 'ask' or 'refuse'"),
        ({"train_rephrases": -1}, "train_rephrases is -1"),
        ({"reading": "mend"}, "'mend'; use 'alt' or 'answers'"),
    ],
)
def test_wrong_arguments_are_quoted(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ZsRE("x", **kwargs)


def test_a_data_set_of_ones_own_needs_two_methods(write):
    class Mine(RecordModule):
        wants = "'q' and 'a'"

        @classmethod
        def reads(cls, record):
            return {"q", "a"} <= record.keys()

        def parse(self, record):
            from editkit.data.drafts import Draft
            from editkit.data.fields import make_edit

            return [Draft(make_edit(record["q"], record["a"], None, names=("q", "a")), [], None)]

    data = loaded(Mine, write({"q": "p", "a": "t"}, {"q": "p2", "a": ""}), on_bad_row="skip")
    assert [(e.prompt, e.target) for e in data.edits] == [("p", "t")]
    assert data.refused[0].detail == "field 'a' is empty: ''"
    with pytest.raises(ValueError, match=r"not ZsRE's.*Mine"):
        loaded(ZsRE, write(json.dumps({"q": "p", "a": "t"})))
