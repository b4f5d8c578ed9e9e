"""Each published schema, in rows of our own that hold its traps."""

import json

import pytest

from editkit.data.counterfact import CounterFact
from editkit.data.hallucination import Hallucination
from editkit.data.knowedit import KnowEdit
from editkit.data.mquake import MQuAKE
from editkit.data.qaedit import QAEdit
from editkit.data.rippleedits import RippleEdits
from editkit.data.rows import BadRowsError
from editkit.data.temporal import Temporal
from editkit.data.wikibigedit import WikiBigEdit
from editkit.data.zsre import ZsRE
from editkit.edits import Edit


def loaded(module, path, **kwargs):
    data = module(path, **kwargs)
    data.setup()
    return data


def asked(data, *fields, kind=None):
    return [
        tuple(getattr(probe, field) for field in fields)
        for probe in data.probes
        if kind in (None, probe.kind)
    ]


def refusal(module, path):
    with pytest.raises(BadRowsError) as caught:
        loaded(module, path)
    (row,) = caught.value.refused
    return row.reason, row.detail


# --- ZsRE

ZSRE = {
    "subject": "Alba",
    "src": "Alba's capital is what?",
    "pred": "Bern",
    "rephrase": "What is the capital of Alba?",
    "alt": "Oslo",
    "answers": ["Lima", "Limas"],
    "loc": "nq question: who sang it",
    "loc_ans": "Dora",
    "cond": "Bern >> Oslo || Alba's capital is what?",
    "portability": {
        "Recalled Relation": "(Oslo, river, Aker)",
        "New Question": "Which river runs through Alba's capital?",
        "New Answer": "Aker",
    },
}


def test_zsre_as_wise_reads_it(write):
    data = loaded(ZsRE, write(ZSRE))
    assert data.edits == [Edit(0, ZSRE["src"], "Oslo", "Alba")]
    assert asked(data, "id", "kind", "prompt", "target", "rival") == [
        ("row1.reliability", "reliability", ZSRE["src"], "Oslo", "Lima"),
        ("row1.generalization.0", "generalization", ZSRE["rephrase"], "Oslo", "Lima"),
        ("row1.portability.0", "portability", ZSRE["portability"]["New Question"], "Aker", None),
        ("row1.locality.0", "locality", "nq question: who sang it", "Dora", None),
    ]


def test_zsre_as_memit_reads_it(write):
    data = loaded(ZsRE, write({**ZSRE, "alt": ""}), reading="answers")
    assert data.edits[0].target == "Lima"
    assert {p.target for p in data.probes if p.kind in ("reliability", "generalization")} == {
        "Lima"
    }
    assert asked(data, "rival", "aliases", kind="reliability") == [(None, ("Limas",))]
    assert asked(data, "prompt", kind="locality") == [("nq question: who sang it?",)]
    reason, detail = refusal(
        lambda p: ZsRE(p, reading="answers"), write({**ZSRE, "answers": [" "]})
    )
    assert (reason, detail) == ("missing field", "field 'answers' holds no answer")


@pytest.mark.parametrize(("reading", "end"), [("alt", ""), ("answers", "?")])
def test_the_words_in_front_of_a_natural_question_can_be_left_out(write, reading, end):
    data = loaded(ZsRE, write(ZSRE), reading=reading, nq_prefix=False)
    assert asked(data, "prompt", kind="locality") == [(f"who sang it{end}",)]


def test_zsre_without_portability(write):
    row = {name: value for name, value in ZSRE.items() if name != "portability"}
    assert asked(loaded(ZsRE, write(row)), "kind", kind="portability") == []


# --- CounterFact

REWRITE = {
    "prompt": "In {}, {they} speak",
    "relation_id": "P37",
    "target_new": {"str": " Norse", "id": "Q1"},
    "target_true": {"str": "Latin", "id": "Q2"},
    "subject": "Alba {0}",
}
NESTED = {
    "case_id": 12,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["Long ago. Alba {0} spoke", "The tongue of Alba {0} is"],
    "neighborhood_prompts": ["In Bera, they speak", "In Cora, they speak"],
    "generation_prompts": ["Alba {0} is known for"],
}


def test_the_subject_takes_the_place_of_the_braces_and_of_nothing_else(write):
    data = loaded(CounterFact, write(NESTED))
    assert data.edits == [Edit(0, "In Alba {0}, {they} speak", "Norse", "Alba {0}")]


def test_nested_counterfact_asks_new_against_true_and_neighbours_true_against_new(write):
    data = loaded(CounterFact, write(NESTED))
    assert asked(data, "id", "kind", "prompt", "target", "rival") == [
        ("12.reliability", "reliability", "In Alba {0}, {they} speak", "Norse", "Latin"),
        ("12.generalization.0", "generalization", "Long ago. Alba {0} spoke", "Norse", "Latin"),
        ("12.generalization.1", "generalization", "The tongue of Alba {0} is", "Norse", "Latin"),
        ("12.locality.0", "locality", "In Bera, they speak", "Latin", "Norse"),
        ("12.locality.1", "locality", "In Cora, they speak", "Latin", "Norse"),
    ]


@pytest.mark.parametrize("prompt", ["Alba speaks", "{} and {} speak"])
def test_a_prompt_without_one_place_for_the_subject_is_a_bad_row(write, prompt):
    row = {**NESTED, "requested_rewrite": {**REWRITE, "prompt": prompt}}
    reason, detail = refusal(CounterFact, write(row))
    assert reason == "no place for the subject"
    assert f"{prompt!r} must hold '{{}}' once, it does {prompt.count('{}')} times" in detail


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"target_new": {"id": "Q1"}}, "'requested_rewrite.target_new' is missing"),
        ({"target_true": {"str": ""}}, "'requested_rewrite.target_true.str' is empty"),
        ({"target_true": "Latin"}, "'requested_rewrite.target_true' must be an object"),
        ({"subject": None}, "'requested_rewrite.subject' is missing"),
    ],
)
def test_bad_rewrites_are_told_by_field(write, change, detail):
    row = {**NESTED, "requested_rewrite": {**REWRITE, **change}}
    assert detail in refusal(CounterFact, write(row))[1]


FLAT = {
    "case_id": 3,
    "prompt": "Alba plays the",
    "target_new": "harp",
    "subject": "Alba",
    "ground_truth": "drum",
    "rephrase_prompt": "Alba is good at the",
    "locality_prompt": "Bera plays the",
    "locality_ground_truth": "drum",
}


def test_flat_counterfact_asks_the_same_as_nested(write):
    data = loaded(CounterFact, write(FLAT))
    assert asked(data, "id", "kind", "prompt", "target", "rival") == [
        ("3.reliability", "reliability", "Alba plays the", "harp", "drum"),
        ("3.generalization.0", "generalization", "Alba is good at the", "harp", "drum"),
        ("3.locality.0", "locality", "Bera plays the", "drum", "harp"),
    ]


def test_wrapped_rows_with_lists_and_neighbours_without_answers(tmp_path):
    row = {name: value for name, value in FLAT.items() if not name.startswith("locality")}
    row |= {
        "case_id": "counterfact_00003",
        "rephrase_prompt": ["r1", "r2"],
        "locality": [{"prompt": q, "ground_truth": None, "metric": "m"} for q in ("n1", "n2")],
        "portability": [],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"dataset": "counterfact", "num_records": 1, "records": [row]}))
    data = loaded(CounterFact, path)
    assert asked(data, "prompt", kind="generalization") == [("r1",), ("r2",)]
    assert asked(data, "prompt", "target", "rival", kind="locality") == [
        ("n1", "drum", "harp"),
        ("n2", "drum", "harp"),
    ]


# --- Hallucination and Temporal

PASSAGE = {
    "prompt": "This is a passage about alba. Alba is small. ",
    "target_new": "It lies by the sea and is known for its bread.",
    "subject": "alba",
    "locality_prompt": "Maps of hist",
    "locality_ground_truth": "ory are sold here. ",
}


def test_hallucination_writes_long_targets_and_keeps_web_text_as_gold(write):
    data = loaded(Hallucination, write(PASSAGE, {**PASSAGE, "prompt": "alba x", "subject": "alba"}))
    assert data.edits[0] == Edit(0, PASSAGE["prompt"], PASSAGE["target_new"], "alba")
    assert asked(data, "kind", "prompt", "target")[:2] == [
        ("reliability", PASSAGE["prompt"], PASSAGE["target_new"]),
        ("locality", "Maps of hist", "ory are sold here."),
    ]


def test_a_blank_continuation_leaves_only_agreement(write):
    data = loaded(Hallucination, write({**PASSAGE, "locality_ground_truth": " \n"}))
    assert asked(data, "target", kind="locality") == [(None,)]


@pytest.mark.parametrize(
    ("other", "whole_text", "expected"),
    [
        ("Alba, Inc. makes bread daily", False, ("Alba, Inc.", "makes bread daily")),
        ("Alba, Inc. makes bread daily", True, ("Alba,", "Inc. makes bread daily")),
        ("Alba Incorporated makes bread", False, ("Alba", "Incorporated makes bread")),
        ("Alba, Inc.'s bread is old", False, ("Alba, Inc.'s", "bread is old")),  # within a word
    ],
)
def test_the_other_text_of_temporal_is_asked_from_behind_what_it_shares(
    write, other, whole_text, expected
):
    row = {**PASSAGE, "prompt": "Alba, Inc.", "subject": "Alba, Inc.", "ood_rephrase": other}
    data = loaded(Temporal, write(row), whole_text=whole_text)
    assert asked(data, "prompt", "target", kind="generalization") == [expected]
    assert asked(data, "axis", kind="generalization") == [("ood",)]
    assert " ".join(expected).split() == other.split()
    assert asked(data, "prompt", kind="locality") == [("Maps of hist",)]


def test_one_word_is_no_other_text(write):
    for other in ("Alba", f"{PASSAGE['prompt']}"):
        reason, detail = refusal(Temporal, write({**PASSAGE, "ood_rephrase": other}))
        assert reason == "empty field"
        assert detail == f"field 'ood_rephrase' says nothing behind the prompt: {other.strip()!r}"


def test_the_other_text_is_no_rephrasing_to_train_on(write):
    row = {**PASSAGE, "ood_rephrase": "Alba is old"}
    data = loaded(Temporal, write(row), train_rephrases=1)
    assert data.edits[0].rephrases == ()
    assert asked(data, "axis", kind="generalization") == [("ood",)]


# --- MQuAKE


def hop(cloze, answer, *aliases):
    return {"cloze": cloze, "question": f"{cloze}?", "answer": answer, "answer_alias": [*aliases]}


def rewrite(subject, new, old="old"):
    return {
        "prompt": "{} lives in",
        "relation_id": "P1",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "subject": subject,
        "question": f"{subject} lives in?",
    }


def case(number, rewrites, hops, answer="end", **more):
    return {
        "case_id": number,
        "requested_rewrite": rewrites,
        "questions": [f"q{number}{i}" for i in range(3)],
        "answer": "before",
        "answer_alias": ["b4"],
        "new_answer": answer,
        "new_answer_alias": ["fin", ""],
        "single_hops": [],
        "new_single_hops": hops,
        "orig": {},
        **more,
    }


ANN = hop("Ann lives in", "Oslo", "Kristiania")
RIVER = hop("The river of Oslo is", "Aker", "Akerselva")


def test_a_case_asks_its_edit_its_hops_and_its_question_in_three_wordings(write):
    data = loaded(MQuAKE, write(case(7, [rewrite("Ann", "Oslo")], [ANN, RIVER])))
    assert data.edits == [Edit(0, "Ann lives in", "Oslo", "Ann")]
    fields = ("id", "kind", "axis", "prompt", "target", "rival", "aliases", "group")
    assert asked(data, *fields) == [
        ("7.reliability", "reliability", "", "Ann lives in", "Oslo", "old", ("Kristiania",), ""),
        ("7.generalization.0", "generalization", "question", "Ann lives in?", "Oslo", "old",
         ("Kristiania",), ""),
        *(
            (f"7.multi_hop.{i}", "portability", "multi_hop", f"q7{i}", "end", "before", ("fin",),
             "7.multi_hop")
            for i in range(3)
        ),
        *(
            (f"7.single_hop.{i}", "intrinsic", "single_hop", prompt, "Aker", None, ("Akerselva",),
             "7.single_hop.1")
            for i, prompt in enumerate(("The river of Oslo is", "The river of Oslo is?"))
        ),
    ]  # fmt: skip


def test_multi_hop_questions_wait_for_all_edits_of_their_case(write):
    two = case(
        1, [rewrite("Ann", "Bob"), rewrite("Bob", "Oslo")],
        [hop("Ann lives in", "Bob"), hop("Bob lives in", "Oslo")],
    )  # fmt: skip
    for seed in range(6):
        data = loaded(MQuAKE, write(two), order="shuffled", seed=seed)
        assert {p.edit_id for p in data.probes if p.axis == "multi_hop"} == {1}
        for probe in data.probes:
            if probe.kind == "reliability":
                assert data.edits[probe.edit_id].prompt == probe.prompt
    assert [p.id for p in data.probes if p.kind == "reliability"] == [
        "1.0.reliability",
        "1.1.reliability",
    ]
    assert asked(loaded(MQuAKE, write(two), limit=1), "axis", kind="portability") == []


SHARED = [
    case(1, [rewrite("Ann", "Oslo")], [ANN, RIVER]),
    case(2, [rewrite("Eve", "Rome"), rewrite("Ann", "Oslo")], [hop("Eve lives in", "Rome"), ANN]),
]


def test_an_edit_that_cases_share_is_made_once(write):
    data = loaded(MQuAKE, write(*SHARED))
    assert [edit.subject for edit in data.edits] == ["Ann", "Eve"]
    of_case_2 = {p.edit_id for p in data.probes if p.group == "2.multi_hop"}
    assert of_case_2 == {1}
    assert len(asked(data, "id", kind="reliability")) == 2
    data = loaded(MQuAKE, write(*SHARED), start=1)
    assert asked(data, "axis", kind="portability") == []  # case 2 needs Ann's edit too


def test_or_once_for_each_case(write):
    data = loaded(MQuAKE, write(*SHARED), stream="case_wise")
    assert [edit.subject for edit in data.edits] == ["Ann", "Eve", "Ann"]
    assert {p.edit_id for p in data.probes if p.group == "2.multi_hop"} == {2}


def test_a_fact_that_another_case_changed_is_made_again(write):
    cases = [
        case(n, [rewrite("Ann", town)], [hop("Ann lives in", town)])
        for n, town in enumerate(["Oslo", "Rome", "Oslo"])
    ]
    data = loaded(MQuAKE, write(*cases))
    assert [edit.target for edit in data.edits] == ["Oslo", "Rome", "Oslo"]
    assert {p.group: p.until for p in data.probes if p.axis == "multi_hop"} == {
        "0.multi_hop": 1,
        "1.multi_hop": 2,
        "2.multi_hop": None,
    }


@pytest.mark.parametrize("first", [True, False])
def test_a_chain_that_another_case_breaks_is_asked_while_it_holds(write, first):
    other = case(
        2,
        [{**rewrite("Oslo", "Glomma"), "prompt": "The river of {} is", "question": "river?"}],
        [hop("The river of Oslo is", "Glomma")],
    )
    cases = [other, SHARED[0]] if first else [SHARED[0], other]
    data = loaded(MQuAKE, write(*cases))
    ends = {p.id: (p.edit_id, p.until) for p in data.probes if p.id.startswith("1.")}
    own = 1 if first else 0
    broken = 0 if first else 1
    assert ends["1.reliability"] == (own, None)
    assert {ends[f"1.multi_hop.{i}"] for i in range(3)} == {(own, broken)}
    assert {ends[f"1.single_hop.{i}"] for i in range(2)} == {(own, broken)}
    never = sum(p.until is not None and p.until <= p.edit_id for p in data.probes)
    assert never == (5 if first else 0)
    assert data.report.notes["probes never asked, overwritten before"] == never
    data = loaded(MQuAKE, write(*cases), contradictions="ask")
    assert {p.until for p in data.probes} == {None}


def test_the_number_of_cases_is_the_papers_k(write):
    data = loaded(MQuAKE, write(*SHARED), cases=1)
    assert {p.group for p in data.probes if p.axis == "multi_hop"} == {"1.multi_hop"}
    assert data.report.used == 1


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"requested_rewrite": []}, "field 'requested_rewrite' holds nothing"),
        ({"new_single_hops": []}, "field 'new_single_hops' holds nothing"),
        ({"new_answer": ""}, "field 'new_answer' is empty"),
        ({"requested_rewrite": [{**rewrite("Ann", "x"), "prompt": "no"}]}, "must hold '{}' once"),
        ({"new_single_hops": [{"cloze": "c"}]}, "'new_single_hops[0].question' is missing"),
    ],
)
def test_bad_cases_are_told_by_field(write, change, detail):
    assert detail in refusal(MQuAKE, write({**SHARED[0], **change}))[1]


def test_a_case_is_refused_as_a_whole(write):
    bad = case(3, [rewrite("Ann", "Oslo"), rewrite("Bob", "")], [ANN])
    data = loaded(MQuAKE, write(SHARED[0], bad), on_bad_row="skip")
    assert (len(data.edits), data.report.reasons) == (1, {"empty field": 1})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"stream": "x"}, "'x'; use 'deduplicated'"), ({"cases": 0}, "cases is 0")],
)
def test_wrong_arguments_of_mquake_are_quoted(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MQuAKE("x", **kwargs)


# --- RippleEdits


def query(prompt, *answers, kind="regular", targets=("Q7",)):
    return {
        "prompt": prompt,
        "answers": [{"value": value, "aliases": list(aliases)} for value, *aliases in answers],
        "query_type": kind,
        "subject_id": "Q1",
        "relation": "X",
        "target_ids": [*targets],
        "phrase": None,
    }


def ripples(*queries, conditions=(), condition="OR"):
    return {
        "test_queries": [*queries],
        "test_condition": condition,
        "condition_queries": [*conditions],
    }


def ripple(new, old=None, relation="SPOUSE", **criteria):
    edit = {"prompt": new, "subject_id": "Q1", "relation": relation, "target_id": "Q9"}
    if old is not None:
        edit["original_fact"] = {**edit, "prompt": old, "target_id": "Q8"}
    return {"example_type": "popular", "edit": edit, "Relation_Specificity": [], **criteria}


@pytest.mark.parametrize(
    ("new", "old", "relation", "prompt", "target", "subject", "rival"),
    [
        ("The name of the spouse of Ann is Bob.", "The name of the spouse of Ann is Bo.", "SPOUSE",
         "The name of the spouse of Ann is", "Bob", "Ann", "Bo"),
        # what both answers begin with is no part of the prompt
        ("The place of birth of Ann is New York.", "The place of birth of Ann is New Jersey.", "",
         "The place of birth of Ann is", "New York", "Ann", "New Jersey"),
        # "is" within the subject's frame, within the subject, and within a target
        ("The name of the country which This is It is associated with is Alba.", None, "COUNTRY",
         "The name of the country which This is It is associated with is", "Alba", "This is It",
         None),
        ("The occupation of Ann is who is who.", "The occupation of Ann is cook.", "OCCUPATION",
         "The occupation of Ann is", "who is who", "Ann", "cook"),
        ("The names of the siblings of Ann of Alba are Bob.", None, "SIBLING",
         "The names of the siblings of Ann of Alba are", "Bob", "Ann of Alba", None),
        ("The name of the country of citizenship of Ann is Alba.", None, "",
         "The name of the country of citizenship of Ann is", "Alba", "Ann", None),
        ("The name of the award Ann won is Gold.", None, "", "The name of the award Ann won is",
         "Gold", "Ann", None),
        ("Season 5 is followed by Season 6.", None, "FOLLOWED_BY", "Season 5 is followed by",
         "Season 6", "Season 5", None),
        ("What is new follows Old.", None, "FOLLOWS", "What is new follows", "Old", "What is new",
         None),
        ("All of it is odd.", None, "", "All of it is", "odd", None, None),
    ],
)  # fmt: skip
def test_a_sentence_is_cut_into_prompt_and_target(
    write, new, old, relation, prompt, target, subject, rival
):
    data = loaded(RippleEdits, write(ripple(new, old, relation)))
    assert data.edits == [Edit(0, prompt, target, subject)]
    assert asked(data, "rival", kind="reliability") == [(rival,)]


def test_the_target_is_what_a_query_of_its_id_names(write):
    aliasing = ripples(query("Annie is", ("Who is it", "Whoever"), targets=["Q9"]))
    row = ripple("The occupation of Ann is Who is it.", Subject_Aliasing=[aliasing])
    data = loaded(RippleEdits, write(row))
    assert data.edits[0] == Edit(0, "The occupation of Ann is", "Who is it", "Ann")
    assert asked(data, "aliases", kind="reliability") == [(("Whoever",),)]


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("The occupation of Ann is .", "empty field"),
        ("The occupation of Ann.", "no target"),
        (None, "missing field"),
    ],
)
def test_sentences_without_a_target_are_bad_rows(write, sentence, reason):
    assert refusal(RippleEdits, write(ripple(sentence)))[0] == reason


def test_criteria_are_axes_with_conditions_aliases_and_groups(write):
    known = query("The child of Ann is", ("Cid", "C."), ("Dan",))
    row = ripple(
        "The name of the spouse of Ann is Bob.",
        Logical_Generalization=[ripples(query("The spouse of Bob is", ("Ann",)))],
        Compositionality_I=[
            ripples(
                query("a1", ("x", "X."), kind="two_hop"), query("a2", ("y",)), conditions=[known]
            )
        ],
        Compositionality_II=[
            ripples(query("b1", ("x",)), query("b2", ("y",)), condition="AND"),
            ripples(query("b3", ("", "named"), ("y", "Y", ""))),
        ],
        Forgetfulness=[ripples(query("who is not Bob is", ("Bo",)))],
        Relation_Specificity=[ripples(known, conditions=[known, query("void")])],
    )
    data = loaded(RippleEdits, write(row))
    fields = ("kind", "axis", "prompt", "target", "aliases", "conditions", "group")
    condition = (("The child of Ann is", "Cid"),)
    assert asked(data, *fields)[1:] == [
        ("portability", "Logical_Generalization", "The spouse of Bob is", "Ann", (), (), ""),
        ("portability", "Compositionality_I", "a1", "x", ("X.",), condition,
         "row1.Compositionality_I.0"),
        ("portability", "Compositionality_I", "a2", "y", (), condition,
         "row1.Compositionality_I.0"),
        ("portability", "Compositionality_II", "b1", "x", (), (), ""),
        ("portability", "Compositionality_II", "b2", "y", (), (), ""),
        ("portability", "Compositionality_II", "b3", "y", ("named", "Y"), (), ""),
        ("locality", "Forgetfulness", "who is not Bob is", "Bo", (), (), ""),
        ("locality", "Relation_Specificity", "The child of Ann is", "Cid", ("Dan", "C."), condition,
         ""),
    ]  # fmt: skip


# --- KnowEdit

KNOW = {"prompt": "Ann is a citizen of", "target_new": "Alba", "subject": "Ann"}


@pytest.mark.parametrize(
    ("answer", "target", "aliases"),
    [
        ("Oslo", "Oslo", ()),
        (["Oslo"], "Oslo", ()),
        ([["Oslo", "Kristiania"], ["Rome", "Oslo"]], "Oslo", ("Kristiania", "Rome")),
        ([[], ["Rome"]], "Rome", ()),
        ([[" "], [""]], None, ()),
        ([[]], None, ()),
        ("", None, ()),
    ],
)
def test_answers_of_any_shape_give_a_target_and_its_aliases(write, answer, target, aliases):
    group = [{"prompt": "q", "ground_truth": answer}]
    data = loaded(
        KnowEdit, write({**KNOW, "locality": {"Forgetfulness": group}, "portability": {}})
    )
    assert asked(data, "target", "aliases", "axis", kind="locality") == [
        (target, aliases, "Forgetfulness")
    ]


def test_empty_locality_and_portability_and_the_old_answer(write):
    row = {**KNOW, "ground_truth": ["Bera"], "locality": {}, "portability": {}}
    data = loaded(KnowEdit, write({**row, "rephrase_prompt": "Ann's land is"}))
    assert asked(data, "kind", "prompt", "rival") == [
        ("reliability", "Ann is a citizen of", "Bera"),
        ("generalization", "Ann's land is", "Bera"),
    ]
    assert asked(loaded(KnowEdit, write({**row, "ground_truth": ""})), "rival") == [(None,)]


def test_all_questions_of_an_axis_are_asked(write):
    group = [{"prompt": f"q{i}", "ground_truth": "a"} for i in range(3)]
    row = {
        **KNOW,
        "locality": {},
        "portability": {"Reasoning": group, "Logical_Generalization": []},
    }
    data = loaded(KnowEdit, write(row))
    assert asked(data, "prompt", "axis", kind="portability") == [
        (f"q{i}", "Reasoning") for i in range(3)
    ]


def test_wikibio_goes_by_its_own_names(write):
    locality = {"Relation_Specificity": [{"prompt": "q", "ground_truth": ["a"]}]}
    row = {
        "text": "A passage about ann.",
        "labels": "She is.",
        "concept": "ann",
        "locality": locality,
    }
    assert loaded(KnowEdit, write(row)).edits == [Edit(0, "A passage about ann.", "She is.", "ann")]


@pytest.mark.parametrize(("forget", "keep"), [("K_F", "K_R"), ("success", "locality")])
def test_sanitation_has_its_roles_under_two_names(write, forget, keep):
    rows = [
        {"question": f"f{i}", "target_new": "I don't know.", "ground_truth": "cheese"}
        for i in range(2)
    ]
    if forget == "K_F":
        rows = [{**row, "subject": row["question"]} for row in rows]
    kept = [{"question": f"k{i}", "ground_truth": f"a{i}"} for i in range(3)]
    data = loaded(KnowEdit, write({forget: rows, keep: kept}))
    subjects = ["f0", "f1"] if forget == "K_F" else [None, None]
    assert [(e.prompt, e.target, e.subject) for e in data.edits] == [
        (f"f{i}", "I don't know.", subjects[i]) for i in range(2)
    ]
    assert asked(data, "rival", kind="reliability") == [("cheese",), ("cheese",)]
    assert asked(data, "edit_id", "prompt", "target", "axis", kind="locality") == [
        (0, "k0", "a0", "retain"),
        (0, "k2", "a2", "retain"),
        (1, "k1", "a1", "retain"),
    ]


def test_a_bad_sanitation_object_is_told_by_field(write):
    reason, detail = refusal(KnowEdit, write({"K_F": "x", "K_R": []}))
    assert (reason, detail) == ("wrong type", "field 'K_F' must be a list, found 'x'")


# --- QAEdit


def test_ids_of_qaedit_count_within_their_source(write):
    row = {
        "id": 5,
        "source": "NQ",
        "prompt": "who won",
        "target": "Wilt *",
        "subject": "who",
        "rephrase": "which one won",
        "locality": [{"loc": "a", "loc_ans": "b"}, {"loc": "c", "loc_ans": ["d", "e"]}],
    }
    data = loaded(QAEdit, write(row, {**row, "source": "SQA", "prompt": "who lost"}))
    assert asked(data, "id", kind="reliability") == [("NQ-5.reliability",), ("SQA-5.reliability",)]
    assert asked(data, "prompt", "target", "aliases", kind="locality")[:2] == [
        ("a", "b", ()),
        ("c", "d", ("e",)),
    ]
    assert refusal(QAEdit, write(row, {**row, "prompt": "who lost"}))[0] == "duplicate id"


# --- WikiBigEdit


def wiki(n, ans="Dora", **more):
    return {
        "tag": "update",
        "subject": f"Alba {n}",
        "update": f"Who leads Alba {n}?",
        "rephrase": f"Alba {n} is led by whom?",
        "personas": f"Arr, who be leadin' Alba {n}?",
        "ans": ans,
        "loc": f"Who leads Bera {n}?",
        "loc_ans": "Elda",
        "mhop": f"Who is the leader of Alba {n} married to?",
        "mhop_ans": "Carl",
        **more,
    }


def test_wikibigedit_asks_five_kinds_of_question(write):
    data = loaded(WikiBigEdit, write(wiki(1)))
    assert data.edits == [Edit(0, "Who leads Alba 1?", "Dora", "Alba 1")]
    assert asked(data, "kind", "axis", "prompt", "target")[1:] == [
        ("generalization", "rephrase", "Alba 1 is led by whom?", "Dora"),
        ("generalization", "personas", "Arr, who be leadin' Alba 1?", "Dora"),
        ("portability", "multi_hop", "Who is the leader of Alba 1 married to?", "Carl"),
        ("locality", "", "Who leads Bera 1?", "Elda"),
    ]


def test_what_a_row_lacks_is_not_asked(write):
    lacking = wiki(1, mhop=float("nan"), mhop_ans=None, personas="", subject=float("nan"))
    unanswered = wiki(2, mhop_ans=float("nan"), loc_ans=None)
    data = loaded(WikiBigEdit, write(lacking, unanswered))
    assert data.edits[0].subject is None
    by_edit = [[p.axis or p.kind for p in data.probes if p.edit_id == i] for i in range(2)]
    assert by_edit == [
        ["reliability", "rephrase", "locality"],
        ["reliability", "rephrase", "personas", "locality"],
    ]
    assert data.report.notes["questions without an answer left out"] == 1
    assert refusal(WikiBigEdit, write(wiki(1, ans=float("nan"))))[0] == "wrong type"
    assert refusal(WikiBigEdit, write(wiki(1, subject="Cora")))[0] == "subject not in prompt"


@pytest.fixture
def steps(tmp_path):
    """Three files of one, two and three rows, written in another order than their dates'."""
    folder = tmp_path / "wiki"
    folder.mkdir()
    spans = [("20240301_20240320", 3), ("20240201_20240220", 1), ("20240220_20240301", 2)]
    for span, count in spans:
        rows = [wiki(f"{span[4:8]} {i}") for i in range(count)]
        (folder / f"wiki_big_edit_{span}.json").write_text(json.dumps(rows))
    return folder


def test_files_are_increments_in_the_order_of_their_dates(steps):
    data = loaded(WikiBigEdit, steps, edits_per_step=2)
    assert data.boundaries == [1, 3, 6]
    assert [edit.subject[5:9] for edit in data.edits] == ["0201", "0220", "0220"] + ["0301"] * 3
    assert [len(batch) for batch in data.train_dataloader()] == [1, 2, 2, 1]
    assert len(data.sources) == 3


@pytest.mark.parametrize(
    ("kwargs", "boundaries"),
    [
        ({"start": 2}, [1, 4]),
        ({"limit": 2}, [1, 2]),
        ({"increments": [4, 2]}, [4, 6]),
        ({"order": "shuffled"}, [6]),
    ],
)
def test_slices_of_a_stream_keep_its_time_steps(steps, kwargs, boundaries):
    assert loaded(WikiBigEdit, steps, **kwargs).boundaries == boundaries


def test_rows_of_one_file_are_put_in_the_order_of_their_dates(write):
    dates = ["2024-03-01", "2024-02-01", "2024-03-01", "2024-02-20"]
    rows = [wiki(i, when=date) for i, date in enumerate(dates)]
    data = loaded(WikiBigEdit, write(*rows), time_field="when")
    assert [edit.subject for edit in data.edits] == ["Alba 1", "Alba 3", "Alba 0", "Alba 2"]
    assert data.boundaries == [1, 2, 4]


def test_a_later_answer_is_an_update_of_the_world(write):
    rows = [wiki(1, date="2024-02-01"), wiki(1, ans="Flora", date="2024-03-01")]
    data = loaded(WikiBigEdit, write(*rows))
    assert {p.axis or p.kind: p.until for p in data.probes if p.edit_id == 0} == {
        "reliability": 1,
        "rephrase": 1,
        "personas": 1,
        "multi_hop": 1,
        "locality": None,
    }


def test_some_edits_of_each_step_are_asked_and_all_are_made(steps):
    def edits_asked(seed):
        data = loaded(WikiBigEdit, steps, asked_per_step=2, seed=seed)
        assert len(data.edits) == 6
        found = sorted({probe.edit_id for probe in data.probes})
        assert [sum(b <= i < e for i in found) for b, e in ((0, 1), (1, 3), (3, 6))] == [1, 2, 2]
        assert len(data.probes) == 5 * len(found)
        return found

    assert edits_asked(0) == edits_asked(0)
    assert len({tuple(edits_asked(seed)) for seed in range(8)}) > 1
    assert loaded(WikiBigEdit, steps, asked_per_step=1, limit=2).report.edits == 2
    with pytest.raises(ValueError, match="asked_per_step is 0"):
        WikiBigEdit("x", asked_per_step=0)
