"""A user's file: what is read from it, and how its bad rows are reported."""

import json
import logging

import pytest

from editkit.data.files import read_records
from editkit.data.jsonl import JSONL
from editkit.data.rows import SHOWN, BadRowsError
from editkit.edits import Edit, Probe

GOOD = {"prompt": "The capital of Australia is", "target": "Melbourne", "subject": "Australia"}
BERLIN = {"prompt": "The capital of Germany is", "target": "Bonn"}


def loaded(path, **kwargs):
    data = JSONL(path, **kwargs)
    data.setup()
    return data


def refusals(path):
    """(line, reason) of each bad row, and the message that a user sees."""
    with pytest.raises(BadRowsError) as caught:
        loaded(path)
    return [(row.line, row.reason) for row in caught.value.refused], str(caught.value)


def asked(data, kind):
    return [(p.prompt, p.target, p.axis) for p in data.probes if p.kind == kind]


# --- the line format


def test_a_full_line_becomes_an_edit_and_its_probes(write):
    row = {
        **GOOD,
        "id": "aus",
        "rephrases": ["Australia's seat of government is"],
        "negatives": ["Bread is baked"],
        "probes": {
            "generalization": ["Australia's capital city is", {"prompt": "A", "target": "B"}],
            "locality": ["The capital of France is", {"prompt": "C", "target": "D", "axis": "x"}],
            "portability": [
                {
                    "prompt": "E",
                    "target": " F",
                    "conditions": [{"prompt": "G", "target": "H"}],
                }
            ],
        },
    }
    data = loaded(write(row))
    assert data.edits == [
        Edit(
            0,
            "The capital of Australia is",
            "Melbourne",
            "Australia",
            negatives=("Bread is baked",),
            rephrases=("Australia's seat of government is",),
        )
    ]
    assert data.probes == [
        Probe("aus.reliability", 0, "reliability", "The capital of Australia is", "Melbourne"),
        Probe(
            "aus.generalization.0", 0, "generalization", "Australia's capital city is", "Melbourne"
        ),
        Probe("aus.generalization.1", 0, "generalization", "A", "B"),
        Probe("aus.locality.0", 0, "locality", "The capital of France is", None),
        Probe("aus.locality.1", 0, "locality", "C", "D", axis="x"),
        Probe("aus.portability.0", 0, "portability", "E", "F", conditions=(("G", "H"),)),
    ]


def test_a_line_may_name_further_answers_the_old_one_and_wordings_of_one_question(write):
    one = {"prompt": "A", "target": "B", "aliases": ["b"], "rival": "C", "group": "g"}
    probes = {"generalization": ["R"], "portability": [one, {**one, "prompt": "A2"}]}
    data = loaded(
        write({**GOOD, "id": 1, "rival": "Canberra", "aliases": ["M."], "probes": probes})
    )
    fields = [(p.prompt, p.rival, p.aliases, p.group) for p in data.probes]
    assert fields == [
        (GOOD["prompt"], "Canberra", ("M.",), ""),
        ("R", "Canberra", ("M.",), ""),
        ("A", "C", ("b",), "1.g"),
        ("A2", "C", ("b",), "1.g"),
    ]


def test_space_around_targets_and_subjects_is_removed_and_prompts_are_kept(write):
    data = loaded(write({"prompt": "A: q?\nB:\n ", "target": " x y \n", "subject": " q"}))
    assert data.edits == [Edit(0, "A: q?\nB:\n ", "x y", "q")]


def test_rows_without_an_id_are_named_by_their_place(write):
    data = loaded(write(GOOD, {**BERLIN, "id": 7}, {"prompt": "p", "target": "t"}))
    assert [probe.id for probe in data.probes] == [
        "row1.reliability",
        "7.reliability",
        "row3.reliability",
    ]


def test_the_example_in_the_documentation_loads(write):
    from editkit.data import lineformat

    example = lineformat.__doc__.split("```json\n")[1].split("```")[0]
    data = loaded(write(json.dumps(json.loads(example))))
    assert {probe.kind for probe in data.probes} == {
        "reliability",
        "generalization",
        "locality",
        "portability",
    }
    assert data.probes[-1].conditions == (("The land of kangaroos is", "Australia"),)


def test_slices_and_steps_of_the_stream_are_options_of_the_file(write):
    path = write(*({"prompt": f"p{i}", "target": "t"} for i in range(6)))
    data = loaded(path, start=1, limit=4, edits_per_step=3)
    assert [[edit.prompt for edit in batch] for batch in data.train_dataloader()] == [
        ["p1", "p2", "p3"],
        ["p4"],
    ]


# --- what a file may look like


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a"])
@pytest.mark.parametrize(
    "content",
    [
        f"{json.dumps(GOOD)}\n{json.dumps(BERLIN)}",
        f"\n\n{json.dumps(GOOD)}\n\n{json.dumps(BERLIN)}\n\n",
        f"\ufeff{json.dumps(GOOD)}\r\n{json.dumps(BERLIN)}\r\n",
        json.dumps([GOOD, BERLIN]),
        json.dumps([GOOD, BERLIN], indent=2),
        "\ufeff  [ " + json.dumps(GOOD) + "\n,\n" + json.dumps(BERLIN) + " ]  \n",
    ],
)
def test_form_is_told_by_content_not_by_name(write, name, content):
    assert [edit.target for edit in loaded(write(content, name=name)).edits] == [
        "Melbourne",
        "Bonn",
    ]


def test_a_single_record_over_several_lines_is_one_edit(write):
    assert len(loaded(write(json.dumps(GOOD, indent=1))).edits) == 1


def test_only_a_line_feed_ends_a_row(write):
    odd = {"prompt": "one\u2028two\x0b is", "target": "t\u0085u"}
    path = write(json.dumps(odd, ensure_ascii=False), GOOD)
    assert loaded(path).edits[0] == Edit(0, "one\u2028two\x0b is", "t\u0085u")


def test_records_of_a_pretty_array_know_their_lines(write):
    path = write(json.dumps([GOOD, BERLIN, {"prompt": "x"}], indent=2))
    expected = [n for n, line in enumerate(path.read_text().split("\n"), 1) if line == "  {"]
    assert [line for line, _ in read_records(path)] == expected
    assert refusals(path)[0] == [(expected[2], "missing field")]


def test_recognised_forms_are_logged(write, caplog):
    caplog.set_level(logging.INFO, "editkit")
    loaded(write(GOOD, {"prompt": "p", "target_new": "t"}))
    assert "2 edits (1 as line format, 1 as EasyEdit records)" in caplog.text


def test_repeated_edits_are_kept_and_logged(write, caplog):
    assert len(loaded(write(GOOD, GOOD)).edits) == 2
    assert "1 rows repeat an earlier edit" in caplog.text


def test_passages_of_the_text_file_are_offered_for_perplexity(write):
    text = write("\ufeffFirst passage.", "", "  Second. ", name="held_out.txt")
    assert loaded(write(GOOD), text=text).texts == ["First passage.", "Second."]
    assert loaded(write(GOOD)).texts == []


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "held_out.txt: there is no such file"),
        (b" \n ", ValueError, "held_out.txt: the file is empty"),
        (b"ab\xff", ValueError, "held_out.txt: not UTF-8 at byte 2"),
    ],
)
def test_an_unusable_text_file_is_named(write, tmp_path, content, error, message):
    text = tmp_path / "held_out.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(error, match=message):
        loaded(write(GOOD), text=text)


# --- bad rows


BAD = [
    ({"target": "t"}, "missing field", "field 'prompt' is missing"),
    ({"prompt": "p"}, "missing field", "field 'target' is missing"),
    ({"prompt": "p", "target": None}, "missing field", "field 'target' is missing"),
    ({"prompt": " ", "target": "t"}, "empty field", "field 'prompt' is empty: ' '"),
    ({"prompt": "p", "target": "\n"}, "empty field", "field 'target' is empty"),
    ({"prompt": "p", "target": 7}, "wrong type", "field 'target' must be text, found 7"),
    ({"prompt": ["p"], "target": "t"}, "wrong type", r"'prompt' must be text, found ['p']"),
    ({**GOOD, "id": True}, "wrong type", "field 'id' must be text, found True"),
    ({**GOOD, "id": 1.5}, "wrong type", "field 'id' must be text, found 1.5"),
    ({**GOOD, "rephrases": "r"}, "wrong type", "field 'rephrases' must be a list, found 'r'"),
    ({**GOOD, "negatives": ["", 1]}, "empty field", "field 'negatives[0]' is empty"),
    ({**GOOD, "probes": ["p"]}, "wrong type", "field 'probes' must be an object"),
    ({**GOOD, "aliases": "M."}, "wrong type", "field 'aliases' must be a list, found 'M.'"),
    ({**GOOD, "rival": ""}, "empty field", "field 'rival' is empty"),
    ({**GOOD, "subject": "Austria"}, "subject not in prompt", "subject 'Austria' is not in prompt"),
    ({**GOOD, "subject": "australia"}, "subject not in prompt", "(but is in other case)"),
    ({**GOOD, "rephrase": ["r"]}, "unknown field", "'rephrase'; did you mean 'rephrases'?"),
    ({**GOOD, "zzz": 1}, "unknown field", "unknown field 'zzz'; known are prompt, target"),
    (
        {**GOOD, "probes": {"generalisation": []}},
        "unknown field",
        "'probes.generalisation'; did you mean 'generalization'?",
    ),
    (
        {**GOOD, "probes": {"locality": [{"promt": "p"}]}},
        "unknown field",
        "'probes.locality[0].promt'; did you mean 'prompt'?",
    ),
    (
        {**GOOD, "probes": {"portability": ["p"]}},
        "missing field",
        "field 'probes.portability[0].target' is missing",
    ),
    (
        {**GOOD, "probes": {"locality": [3]}},
        "wrong type",
        "field 'probes.locality[0]' must be an object, found 3",
    ),
    (
        {**GOOD, "probes": {"locality": [{"prompt": "p", "conditions": [{"prompt": "c"}]}]}},
        "missing field",
        "field 'probes.locality[0].conditions[0].target' is missing",
    ),
    ({"question": "p", "answer": "t"}, "unknown form", "fields ['question', 'answer'] are those"),
    ("[1, 2]", "not an object", "expected an object {...}, found [1, 2]"),
    ('{"prompt": "p" "target": "t"}', "malformed JSON", "Expecting ',' delimiter at column 16"),
    ('{"prompt": "p", "target": "t"},', "malformed JSON", "Extra data at column 31"),
    ('{"prompt": "p", "target": "\\ud800"}', "broken character", "'target' holds half a character"),
    (
        {**GOOD, "rephrases": ["The Capital of  Australia is"]},
        "probe among training texts",
        "'The Capital of  Australia is' is given for editing",
    ),
    (
        {**GOOD, "negatives": ["q a"], "probes": {"locality": [{"prompt": "q", "target": "a"}]}},
        "probe among training texts",
        "but is also asked as probe row2.locality.0",
    ),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD, ids=[detail for *_, detail in BAD])
def test_each_kind_of_bad_row_is_refused_with_its_line(write, row, reason, detail):
    path = write(BERLIN, row)
    found, message = refusals(path)
    assert found == [(2, reason)]
    assert f"{path}:2: " in message
    assert detail in message


def test_all_bad_rows_are_reported_together_and_good_ones_pass_with_skip(write, caplog):
    rows = [BERLIN, *(row for row, *_ in BAD)]
    found, message = refusals(write(*rows))
    assert [line for line, _ in found] == list(range(2, len(rows) + 1))
    assert message.splitlines()[0].startswith(f"{len(BAD)} of {len(rows)} rows cannot be used (")
    assert "5 missing field" in message.splitlines()[0]
    assert message.count("edits.jsonl:") == SHOWN
    assert f"and {len(BAD) - SHOWN} more" in message

    data = loaded(write(*rows), on_bad_row="skip")
    assert data.edits == [Edit(0, "The capital of Germany is", "Bonn")]
    assert [(row.line, row.reason) for row in data.refused] == found
    assert f"{len(BAD)} of {len(rows)} rows cannot be used" in caplog.text


def test_an_id_used_twice_names_both_lines(write):
    found, message = refusals(write({**GOOD, "id": "a"}, "", {**BERLIN, "id": "a"}))
    assert found == [(3, "duplicate id")]
    assert "id 'a' is that of line 1 too" in message


def test_contradicting_edits_name_both_lines_and_skip_keeps_the_earlier(write):
    path = write(GOOD, BERLIN, {**GOOD, "target": "Sydney"})
    found, message = refusals(path)
    assert found == [(3, "contradiction")]
    assert "'Sydney' here and 'Melbourne' in line 1" in message
    assert [e.target for e in loaded(path, on_bad_row="skip").edits] == ["Melbourne", "Bonn"]


def test_a_probe_of_one_edit_among_the_training_texts_of_another_is_refused(write):
    path = write({**GOOD, "rephrases": [BERLIN["prompt"]]}, BERLIN)
    found, message = refusals(path)
    assert found == [(1, "probe among training texts")]
    assert "row2.reliability" in message


def test_bytes_that_are_not_utf8_are_named_by_offset_and_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    first = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(first + '{"prompt": "Où", "target": "t"}'.encode("latin-1") + b"\n" + first)
    found, message = refusals(path)
    assert found == [(2, "not UTF-8")]
    assert f"byte 0xf9 at offset {len(first) + 13} of the file" in message
    assert len(loaded(path, on_bad_row="skip").edits) == 2

    path.write_bytes(b"\xef\xbb\xbf[\n" + b'{"prompt": "O\xf9"}]')
    found, message = refusals(path)
    assert found == [(2, "not UTF-8")]
    assert f"byte 0xf9 at offset {path.read_bytes().index(0xF9)} of the file" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[", [(1, "malformed JSON")]),
        ("[]", None),
        ('[\n{"prompt": "p", "target": "t"}\n{"a"', [(3, "malformed JSON")]),
        ('[\n{"prompt": "p", "target": "t"},\n]', [(3, "malformed JSON")]),
        ('[\n{"prompt": "p", "target": "t"},\n3,\n{"prompt":\n 1}\n]', None),
        ('[\n{"prompt": "p", "target": "t"}]\n\n{}', [(4, "malformed JSON")]),
        ('{"prompt": "p",\n"target": "t"\n}\n{"prompt"', [(4, "malformed JSON")]),
        ('{"prompt": "p",\n"target": }', [(2, "malformed JSON")]),
    ],
)
def test_a_broken_array_is_refused_at_its_line(write, content, expected):
    if content == "[]":
        with pytest.raises(ValueError, match="holds no edits"):
            loaded(write(content))
        return
    found = refusals(write(content))[0]
    assert found == (expected or [(3, "not an object"), (4, "wrong type")])


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "there is no such file"), ("", "the file is empty"), (" \n\n", "the file is empty")],
)
def test_no_rows_at_all_are_an_error_under_every_policy(tmp_path, content, reason, policy):
    path = tmp_path / "edits.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadRowsError, match=f"edits.jsonl: {reason}"):
        loaded(path, on_bad_row=policy)


def test_an_unknown_policy_is_quoted(write):
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'"):
        JSONL(write(GOOD), on_bad_row="ignore")


# --- EasyEdit's forms

REQUEST = {
    "case_id": 3,
    "prompt": "Ray Charles, the",
    "target_new": "violin",
    "subject": "Ray Charles",
    "ground_truth": "piano",
}


def test_request_with_rephrase_and_flat_locality(write):
    row = {
        **REQUEST,
        "rephrase_prompt": "Ray Charles plays the",
        "locality_prompt": "Joseph Fischhof, the",
        "locality_ground_truth": "piano",
        "loc_prompt": "An unrelated text",
        "whatever": 1,
    }
    data = loaded(write(row))
    assert data.edits == [
        Edit(0, "Ray Charles, the", "violin", "Ray Charles", negatives=("An unrelated text",))
    ]
    assert asked(data, "generalization") == [("Ray Charles plays the", "violin", "")]
    assert asked(data, "locality") == [("Joseph Fischhof, the", "piano", "")]
    assert data.probes[0].id == "3.reliability"


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"prompt": "q", "ground_truth": "a"}, [("q", "a", "x")]),
        ({"prompt": "q", "ground_truth": ["a", "alias"]}, [("q", "a", "x")]),
        ({"prompt": ["q", "r"], "ground_truth": ["a", "b"]}, [("q", "a", "x"), ("r", "b", "x")]),
        (
            {"prompt": ["q", "r"], "ground_truth": [["a", "alias"], ["b"]]},
            [("q", "a", "x"), ("r", "b", "x")],
        ),
        ([{"prompt": "q", "ground_truth": [["a", "alias"], ["b"]]}], [("q", "a", "x")]),
        ([{"prompt": "q", "ground_truth": [[], ["", "b"]]}], [("q", "b", "x")]),
        ([{"prompt": "q", "ground_truth": " a"}], [("q", "a", "x")]),
        ([], []),
        (None, []),
    ],
)
@pytest.mark.parametrize("kind", ["locality", "portability"])
def test_shapes_of_locality_and_portability(write, kind, group, expected):
    data = loaded(write({**REQUEST, kind: {"x": group}}))
    assert asked(data, kind) == expected


@pytest.mark.parametrize("answer", [None, "", [[]], [None, None]])
def test_locality_without_an_answer_is_compared_with_the_unedited_model(write, answer):
    row = {**REQUEST, "locality": {"x": {"prompt": "q", "ground_truth": answer}}}
    assert asked(loaded(write(row)), "locality") == [("q", None, "x")]


def test_parallel_prompts_without_answers_are_all_asked(write):
    row = {**REQUEST, "locality": {"x": {"prompt": ["q", "r"], "ground_truth": None}}}
    assert asked(loaded(write(row)), "locality") == [("q", None, "x"), ("r", None, "x")]


def test_several_rephrases_are_each_asked(write):
    data = loaded(write({**REQUEST, "rephrase_prompt": ["a", "b"], "locality": {}}))
    assert asked(data, "generalization") == [("a", "violin", ""), ("b", "violin", "")]


def test_first_of_several_targets_is_written(write):
    assert (
        loaded(write({**REQUEST, "target_new": ["violin", "fiddle"]})).edits[0].target == "violin"
    )


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"target_new": ""}, "empty field", "'target_new' is empty"),
        ({"target_new": []}, "missing field", "'target_new' is missing"),
        ({"target_new": 5}, "wrong type", "'target_new' must be text, found 5"),
        (
            {"portability": {"x": {"prompt": "q", "ground_truth": ""}}},
            "missing field",
            "'portability.x' has no answer to 'q'",
        ),
        ({"locality": "q"}, "wrong type", "'locality' must hold 'prompt' and 'ground_truth'"),
        ({"locality": {"x": "q"}}, "wrong type", "'locality.x' must hold 'prompt'"),
        (
            {"locality": {"x": {"prompt": ["q", "r"], "ground_truth": ["a"]}}},
            "wrong length",
            "'locality.x' has 2 prompts, but answers ['a']",
        ),
        (
            {"locality": {"x": [{"prompt": "q", "ground_truth": 3}]}},
            "wrong type",
            "'locality.x[0]' must be text, found 3",
        ),
    ],
)
def test_bad_easyedit_records_are_refused(write, change, reason, detail):
    found, message = refusals(write(BERLIN, {**REQUEST, **change}))
    assert found == [(2, reason)]
    assert detail in message


COLUMNS = {
    "prompts": ["Ray Charles, the", "Grant Hill is a"],
    "target_new": ["violin", "soccer player"],
    "ground_truth": ["piano", "basketball player"],
    "subject": ["Ray Charles", "Grant Hill"],
    "rephrase_prompts": ["Ray plays", None],
    "loc_prompts": ["some text", "other text"],
    "locality_inputs": {
        "near": {"prompt": ["q", ["r", "s"]], "ground_truth": ["a", ["b", "c"]]},
        "far": {"prompt": [None, "u"], "ground_truth": [None, "v"]},
    },
    "portability_inputs": {"hop": {"prompt": ["h", "i"], "ground_truth": ["j", "k"]}},
    "sequential_edit": True,
}


@pytest.mark.parametrize("indent", [None, 2])
def test_keyword_arguments_of_editor_edit_become_edits(write, indent, caplog):
    caplog.set_level(logging.INFO, "editkit")
    data = loaded(write(json.dumps(COLUMNS, indent=indent), name="request.json"))
    assert data.edits == [
        Edit(0, "Ray Charles, the", "violin", "Ray Charles", negatives=("some text",)),
        Edit(1, "Grant Hill is a", "soccer player", "Grant Hill", negatives=("other text",)),
    ]
    assert "line 1 holds 2 edits as EasyEdit columns" in caplog.text
    assert asked(data, "generalization") == [("Ray plays", "violin", "")]
    assert asked(data, "locality") == [
        ("q", "a", "near"),
        ("r", "b", "near"),
        ("s", "c", "near"),
        ("u", "v", "far"),
    ]
    assert asked(data, "portability") == [("h", "j", "hop"), ("i", "k", "hop")]


def test_one_edit_needs_no_lists_around_its_columns(write):
    columns = {
        "prompts": "Ray Charles, the",
        "target_new": "violin",
        "subject": "Ray Charles",
        "locality_inputs": {"near": {"prompt": "q", "ground_truth": "a"}},
    }
    data = loaded(write(columns))
    assert data.edits == [Edit(0, "Ray Charles, the", "violin", "Ray Charles")]
    assert asked(data, "locality") == [("q", "a", "near")]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"target_new": ["violin"]}, "column 'target_new' must hold 2 values"),
        ({"subject": "Ray Charles"}, "column 'subject' must hold 2 values"),
        ({"prompts": []}, "'prompts' must be a list of texts, found []"),
        ({"prompts": 3}, "'prompts' must be a list of texts, found 3"),
        ({"locality_inputs": ["q"]}, "'locality_inputs' must be an object"),
        ({"locality_inputs": {"near": "q"}}, "'locality_inputs.near' must be an object"),
        (
            {"locality_inputs": {"near": {"prompt": ["q"], "ground_truth": ["a"]}}},
            "column 'locality_inputs.near.prompt' must hold 2 values, as 'prompts' does; found 1",
        ),
    ],
)
def test_columns_that_do_not_match_are_refused(write, change, detail):
    found, message = refusals(write({**COLUMNS, **change}))
    assert len(found) == 1
    assert detail in message


def test_a_zsre_record(write):
    row = {
        "subject": "UniFirst",
        "src": "What does UniFirst make?",
        "alt": "aircraft",
        "pred": "uniform",
        "rephrase": "UniFirst's product is what?",
        "loc": "nq question: who sang it",
        "loc_ans": "Somebody",
        "portability": {"Recalled Relation": "(a, b)", "New Question": "q?", "New Answer": "a"},
    }
    data = loaded(write(json.dumps([row])))
    assert data.edits == [Edit(0, "What does UniFirst make?", "aircraft", "UniFirst")]
    assert asked(data, "generalization") == [("UniFirst's product is what?", "aircraft", "")]
    assert asked(data, "locality") == [("nq question: who sang it", "Somebody", "")]
    assert asked(data, "portability") == [("q?", "a", "")]


def test_a_qaedit_record(write):
    row = {
        "id": 1,
        "source": "NQ",
        "prompt": "who won",
        "target": "Wilt",
        "subject": "who",
        "rephrase": "which one won",
        "locality": [{"loc": "a", "loc_ans": "b"}, {"loc": "c", "loc_ans": "d"}],
    }
    data = loaded(write(json.dumps([row, {**row, "prompt": "who lost"}])))  # ids repeat there
    assert len(data.edits) == 2
    assert asked(data, "locality")[:2] == [("a", "b", ""), ("c", "d", "")]


# --- public files


@pytest.mark.parametrize(
    ("name", "edits", "refused"),
    [
        ("zsre/zsre_mend_edit.json", 1037, {}),
        ("zsre/zsre_mend_train-1k.json", 998, {"empty field": 2}),
        ("counterfact/counterfact-edit.json", 9921, {"contradiction": 79}),
        (
            "knowedit/ZsRE-test-all.json",
            1291,
            {"contradiction": 10, "subject not in prompt": 3},
        ),
        ("knowedit/wiki_recent_train.json", 570, {}),
        ("knowedit/wiki_counterfact_train_cf.json", 1428, {}),
        ("qaedit/QAEdit_inter_1k.json", 1000, {}),
        ("wise/hallucination/hallucination-edit.json", 600, {}),
        ("wise/temporal/temporal-edit.json", 75, {}),
    ],
)
def test_public_files_load_but_for_known_bad_rows(public_file, name, edits, refused):
    path = public_file(name)
    data = loaded(path, on_bad_row="skip")
    reasons = [row.reason for row in data.refused]
    assert {reason: reasons.count(reason) for reason in reasons} == refused
    assert len(data.edits) == edits
    assert edits + sum(refused.values()) == len(json.loads(path.read_text(encoding="utf-8")))
    assert len({probe.id for probe in data.probes}) == len(data.probes)
    assert all(edit.subject in edit.prompt for edit in data.edits)


def test_lines_of_refused_rows_in_a_public_file_are_where_the_text_is(public_file):
    path = public_file("knowedit/ZsRE-test-all.json")
    lines = path.read_text(encoding="utf-8").split("\n")
    data = loaded(path, on_bad_row="skip")
    for row in data.refused:
        if row.reason == "subject not in prompt":
            record = "\n".join(lines[row.line - 1 : row.line + 4])
            subject = row.detail.split("'")[1]
            assert f'"subject": {json.dumps(subject)}' in record
