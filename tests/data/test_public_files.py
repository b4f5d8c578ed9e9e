"""The published files, against counts made from their raw JSON."""

import hashlib
import json
from collections import Counter, defaultdict

import pytest

from editkit.data.counterfact import CounterFact
from editkit.data.hallucination import Hallucination
from editkit.data.knowedit import KnowEdit
from editkit.data.mquake import MQuAKE
from editkit.data.qaedit import QAEdit
from editkit.data.rippleedits import FRAMES, cut_sentence
from editkit.data.rows import BadRowsError
from editkit.data.source import leaks
from editkit.data.temporal import Temporal
from editkit.data.zsre import ZsRE

FILES = [
    (ZsRE, "zsre/zsre_mend_edit.json"),
    (ZsRE, "zsre/zsre_mend_train-1k.json"),
    (CounterFact, "counterfact/counterfact-edit.json"),
    (CounterFact, "counterfact/counterfact-train.json"),
    (CounterFact, "counterfact/counterfact_500.json"),
    (CounterFact, "counterfact/multi_counterfact_100.json"),
    (Hallucination, "wise/hallucination/hallucination-edit.json"),
    (Hallucination, "wise/hallucination/hallucination-train.json"),
    (Temporal, "wise/temporal/temporal-edit.json"),
    (Temporal, "wise/temporal/temporal-train.json"),
    (MQuAKE, "mquake/MQuAKE-CF-354.json"),
    (MQuAKE, "mquake/MQuAKE-hard.json"),
    (KnowEdit, "knowedit/ZsRE-test-all.json"),
    (KnowEdit, "knowedit/wiki_recent_train.json"),
    (KnowEdit, "knowedit/wiki_counterfact_train_cf.json"),
    (QAEdit, "qaedit/QAEdit_inter_1k.json"),
]


@pytest.fixture(scope="module")
def published(shared):
    """Return a module that has read a file, and the file's raw records; each read once."""
    found = {}

    def read(module, name):
        if name not in found:
            path = shared(f"data/{name}")
            raw = json.loads(path.read_text(encoding="utf-8"))
            data = module(path, on_bad_row="skip")
            data.setup()
            found[name] = data, raw["records"] if isinstance(raw, dict) else raw
        return found[name]

    return read


def listed(value):
    return value if isinstance(value, list) else [value]


def leaves(value):
    """Texts of nested lists that are not blank."""
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value.strip()] if value and value.strip() else []


def refused(module, rows):
    """Independent count of bad rows by reason."""
    if module is MQuAKE:
        return {}
    count = Counter()
    for row in rows:
        nested = row.get("requested_rewrite", row)
        prompt, target = nested.get("src", nested.get("prompt")), None
        for name in ("alt", "target_new", "target"):
            target = nested.get(name, target)
        target = target["str"] if isinstance(target, dict) else target
        prompt = prompt.replace("{}", nested["subject"])
        if not target.strip():
            count["empty field"] += 1
        elif nested["subject"] not in prompt:
            count["subject not in prompt"] += 1
    return dict(count)


def expected_kinds(module, row):
    """Probes that one good row should give, by kind and axis."""
    count = Counter({("reliability", ""): 1})
    if module is ZsRE:
        count["generalization", ""] = count["locality", ""] = 1
        count["portability", ""] = int("portability" in row)
    elif module is CounterFact:
        count["generalization", ""] = len(
            row.get("paraphrase_prompts") or listed(row.get("rephrase_prompt"))
        )
        near = (
            row.get("neighborhood_prompts") or row.get("locality") or [row.get("locality_prompt")]
        )
        count["locality", ""] = len(near)
    elif module is QAEdit:
        count["generalization", ""], count["locality", ""] = 1, len(row["locality"])
    elif module is KnowEdit:
        count["generalization", ""] = int("rephrase_prompt" in row)
        for kind in ("locality", "portability"):
            for axis, group in row[kind].items():
                count[kind, axis] += len(group)
    else:
        count["locality", ""] = 1
        count["generalization", "ood"] = int("ood_rephrase" in row)
    return +count


def is_good(module, row):
    return not refused(module, [row])


@pytest.mark.parametrize(("module", "name"), FILES, ids=[name for _, name in FILES])
def test_rows_in_used_and_refused(published, module, name):
    data, raw = published(module, name)
    report = data.report
    bad = refused(module, raw)
    assert report.rows == len(raw)
    assert report.reasons == bad
    assert report.used == len(raw) - sum(bad.values())
    assert report.version
    assert len({probe.id for probe in data.probes}) == len(data.probes)
    assert all(edit.subject in edit.prompt for edit in data.edits)
    assert all(edit.target == edit.target.strip() != "" for edit in data.edits)
    assert not list(leaks(data.edits, data.probes))
    if bad:
        with pytest.raises(BadRowsError, match=f"{sum(bad.values())} of {len(raw)} rows"):
            module(data.path).setup()


@pytest.mark.parametrize(
    ("module", "name"),
    [pair for pair in FILES if pair[0] is not MQuAKE],
    ids=[name for module, name in FILES if module is not MQuAKE],
)
def test_edits_and_probes_by_kind(published, module, name):
    data, raw = published(module, name)
    good = [row for row in raw if is_good(module, row)]
    assert len(data.edits) == len(good)
    expected = sum((expected_kinds(module, row) for row in good), Counter())
    assert data.report.probes == expected
    by_edit = defaultdict(Counter)
    for probe in data.probes:
        by_edit[probe.edit_id][probe.kind, probe.axis] += 1
    for i, row in enumerate(good):
        assert by_edit[i] == expected_kinds(module, row)


@pytest.mark.parametrize(("module", "name"), FILES, ids=[name for _, name in FILES])
def test_the_cards_version_is_the_files_hash(shared, module, name):
    assert hashlib.sha256(shared(f"data/{name}").read_bytes()).hexdigest() in module.known


# --- what the rows mean


def test_zsre_reads_each_field_to_its_place(published):
    data, raw = published(ZsRE, "zsre/zsre_mend_edit.json")
    probes = {(p.edit_id, p.kind): p for p in data.probes}
    for i, (edit, row) in enumerate(zip(data.edits, raw, strict=True)):
        assert (edit.prompt, edit.target, edit.subject) == (
            row["src"], row["alt"].strip(), row["subject"],
        )  # fmt: skip
        assert probes[i, "generalization"].prompt == row["rephrase"]
        assert probes[i, "locality"].prompt == row["loc"]
        assert probes[i, "locality"].target == row["loc_ans"]
        assert probes[i, "portability"].target == row["portability"]["New Answer"]
        true = row["answers"][0].strip()
        assert probes[i, "reliability"].rival == (None if true == edit.target else true)


def test_zsre_contradictions_in_other_wordings(published):
    """An edit is overwritten where a later row answers one of its two wordings otherwise."""
    data, raw = published(ZsRE, "zsre/zsre_mend_edit.json")
    words = [{row["src"].lower(), row["rephrase"].lower()} for row in raw]
    overwritten = {
        i
        for i, row in enumerate(raw)
        if any(
            words[i] & words[j] and raw[j]["alt"].lower() != row["alt"].lower()
            for j in range(i + 1, len(raw))
        )
    }
    found = {p.edit_id for p in data.probes if p.kind == "reliability" and p.until is not None}
    assert found == overwritten
    assert len(found) == 24


def test_zsre_as_memit_reads_it(shared):
    path = shared("data/zsre/zsre_mend_edit.json")
    data = ZsRE(path, reading="answers")
    data.setup()
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert [edit.target for edit in data.edits] == [row["answers"][0].strip() for row in raw]
    asked = [p.prompt for p in data.probes if p.kind == "locality"]
    assert asked == [f"{row['loc']}?" for row in raw]


def test_zsre_trains_on_texts_of_its_training_file(shared):
    train = shared("data/zsre/zsre_mend_train-1k.json")
    data = ZsRE(shared("data/zsre/zsre_mend_edit.json"), negatives=train, train_rephrases=1)
    data.setup()
    pool = [r for r in json.loads(train.read_text(encoding="utf-8")) if r["alt"].strip()]
    texts = [f"{row['loc']} {row['loc_ans']}" for row in pool]
    assert [edit.negatives for edit in data.edits] == [
        (texts[i % len(texts)],) for i in range(len(data.edits))
    ]
    assert not list(leaks(data.edits, data.probes))
    assert not [p for p in data.probes if p.kind == "generalization"]


@pytest.mark.parametrize("name", ["counterfact-edit.json", "counterfact-train.json"])
def test_counterfact_is_asked_while_it_is_true(published, name):
    """Against a replay of the flat file: what later rows overwrite, and edited neighbours."""
    data, raw = published(CounterFact, f"counterfact/{name}")
    at = defaultdict(list)
    for i, row in enumerate(raw):
        at[" ".join(row["prompt"].lower().split())].append(i)
    repeats = sum(len(places) - 1 for places in at.values())
    notes = data.report.notes
    in_file = notes["edits that repeat an earlier one"] + notes["edits that update an earlier one"]
    assert in_file == repeats == {"counterfact-edit.json": 83, "counterfact-train.json": 77}[name]
    probes = {(p.edit_id, p.kind): p for p in data.probes}
    for i, row in enumerate(raw):
        later = [
            j
            for j in at[" ".join(row["prompt"].lower().split())]
            if j > i and raw[j]["target_new"] != row["target_new"]
        ]
        if later:
            assert probes[i, "reliability"].until <= min(later)
        near = probes[i, "locality"]
        edited = at.get(" ".join(row["locality_prompt"].lower().split()), [])
        if edited:
            assert near.until <= edited[0]
        assert (near.target, near.rival) == (row["ground_truth"], row["target_new"])
        assert probes[i, "generalization"].rival == row["ground_truth"]


def test_nested_counterfact_reads_each_field_to_its_place(published):
    data, raw = published(CounterFact, "counterfact/multi_counterfact_100.json")
    for edit, row in zip(data.edits, raw, strict=True):
        rewrite = row["requested_rewrite"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        head, tail = rewrite["prompt"].split("{}")
        assert edit.prompt == head + rewrite["subject"] + tail
        mine = [p for p in data.probes if p.edit_id == edit.id]
        near = [p for p in mine if p.kind == "locality"]
        assert [p.prompt for p in near] == row["neighborhood_prompts"]
        assert {(p.target, p.rival) for p in near} == {(true, new)}
        assert {(p.target, p.rival) for p in mine if p.kind != "locality"} == {(new, true)}


def test_lists_of_neighbours_without_answers_stand_for_the_true_one(published):
    data, raw = published(CounterFact, "counterfact/counterfact_500.json")
    for probe in data.probes:
        if probe.kind == "locality":
            row = raw[probe.edit_id]
            assert (probe.target, probe.rival) == (row["ground_truth"], row["target_new"])


def test_hallucination_keeps_its_texts_whole(published):
    data, raw = published(Hallucination, "wise/hallucination/hallucination-edit.json")
    assert [edit.target for edit in data.edits] == [row["target_new"] for row in raw]
    near = [p for p in data.probes if p.kind == "locality"]
    assert [p.prompt for p in near] == [row["locality_prompt"] for row in raw]
    assert sum(p.target is None for p in near) == 7
    assert [p.target or "" for p in near] == [row["locality_ground_truth"].strip() for row in raw]


def test_temporal_loses_no_word_of_the_other_text(published):
    data, raw = published(Temporal, "wise/temporal/temporal-edit.json")
    assert sum(row["ood_rephrase"].startswith(row["prompt"]) for row in raw) == 44
    other = [p for p in data.probes if p.axis == "ood"]
    for probe, row in zip(other, raw, strict=True):
        assert f"{probe.prompt} {probe.target}".split() == row["ood_rephrase"].split()
        words = 1 + row["prompt"].count(" ") * row["ood_rephrase"].startswith(row["prompt"])
        assert probe.prompt.split() == row["ood_rephrase"].split()[:words]


@pytest.mark.parametrize("name", ["MQuAKE-CF-354.json", "MQuAKE-hard.json"])
def test_mquake_counts(published, name):
    data, raw = published(MQuAKE, f"mquake/{name}")
    full = [
        {
            (w["prompt"].replace("{}", w["subject"]), w["target_new"]["str"]): w
            for w in row["requested_rewrite"]
        }
        for row in raw
    ]
    distinct = {fact for case in full for fact in case}
    assert {(e.prompt, e.target) for e in data.edits} == distinct
    assert len(data.edits) == len(distinct)
    unedited = sum(
        hop["cloze"] not in {prompt for prompt, _ in case}
        for row, case in zip(raw, full, strict=True)
        for hop in row["new_single_hops"]
    )
    assert data.report.probes == +Counter({
        ("reliability", ""): len(distinct),
        ("generalization", "question"): len(distinct),
        ("portability", "multi_hop"): sum(len(row["questions"]) for row in raw),
        ("intrinsic", "single_hop"): 2 * unedited,
    })  # fmt: skip
    groups = {p.group for p in data.probes if p.axis == "multi_hop"}
    assert groups == {f"{row['case_id']}.multi_hop" for row in raw}


@pytest.mark.parametrize("name", ["MQuAKE-CF-354.json", "MQuAKE-hard.json"])
def test_mquake_asks_a_case_while_its_whole_chain_holds(published, name):
    """Replay the stream as a dictionary over what each case takes the world to be."""
    data, raw = published(MQuAKE, f"mquake/{name}")
    cases = {str(row["case_id"]): row for row in raw}
    worlds, world = [{}], {}
    for edit in data.edits:
        world = {**world, edit.prompt: edit.target}
        worlds.append(world)
    for probe in data.probes:
        if probe.axis != "multi_hop":
            continue
        row = cases[probe.id.split(".")[0]]
        assert probe.target == row["new_answer"]
        assert list(probe.aliases) == leaves(row["new_answer_alias"])
        asked = [seen for seen in range(len(worlds)) if probe.is_due(seen)]
        for seen in {*asked[:1], *asked[-1:], *asked[::40]}:
            for hop in row["new_single_hops"]:
                assert worlds[seen].get(hop["cloze"], hop["answer"]) == hop["answer"]
            for one in row["requested_rewrite"]:
                prompt = one["prompt"].replace("{}", one["subject"])
                assert worlds[seen][prompt] == one["target_new"]["str"]
        if probe.until is not None:  # and the edit that ends it does break the chain
            after = worlds[probe.until + 1]
            chain = {hop["cloze"]: hop["answer"] for hop in row["new_single_hops"]}
            assert any(after.get(prompt, answer) != answer for prompt, answer in chain.items())


def test_every_edit_of_a_mquake_case_in_turn(shared):
    path = shared("data/mquake/MQuAKE-hard.json")
    data = MQuAKE(path, stream="case_wise", cases=50)
    data.setup()
    raw = json.loads(path.read_text(encoding="utf-8"))[:50]
    assert len(data.edits) == sum(len(row["requested_rewrite"]) for row in raw) == 200
    ends = {p.group: p.edit_id for p in data.probes if p.axis == "multi_hop"}
    assert list(ends.values()) == [4 * i + 3 for i in range(50)]


def test_knowedit_answers_of_every_shape(published):
    for name in ("ZsRE-test-all.json", "wiki_recent_train.json", "wiki_counterfact_train_cf.json"):
        data, raw = published(KnowEdit, f"knowedit/{name}")
        good = [row for row in raw if is_good(KnowEdit, row)]
        for i, row in enumerate(good):
            for kind in ("locality", "portability"):
                mine = [p for p in data.probes_of([i]) if p.kind == kind] if i % 50 == 0 else None
                if mine is None:
                    continue
                questions = [
                    (axis, q["prompt"], list(dict.fromkeys(leaves(q["ground_truth"]))))
                    for axis, group in row[kind].items()
                    for q in group
                ]
                found = [
                    (p.axis, p.prompt, [p.target, *p.aliases] if p.target else []) for p in mine
                ]
                assert found == questions


def test_qaedit_reads_five_questions_each(published):
    data, raw = published(QAEdit, "qaedit/QAEdit_inter_1k.json")
    near = defaultdict(list)
    for probe in data.probes:
        if probe.kind == "locality":
            near[probe.edit_id].append((probe.prompt, probe.target))
    for i, row in enumerate(raw):
        assert near[i] == [(q["loc"], q["loc_ans"].strip()) for q in row["locality"]]
    assert data.probes[0].id == f"{raw[0]['source']}-{raw[0]['id']}.reliability"


@pytest.mark.parametrize(("name", "empty"), [("popular", 1), ("random", 2)])
def test_edit_sentences_of_rippleedits_are_all_cut(shared, name, empty):
    path = shared(f"data/rippleedits/{name}_prompts.json")
    targets = []
    for sentence in json.loads(path.read_text(encoding="utf-8")):
        whole = sentence.strip().removesuffix(".").strip()
        relation = next(
            (r for r, link in (("FOLLOWED_BY", " is followed by "), ("FOLLOWS", " follows "))
             if link in f"{whole} " and not whole.startswith("The name")), "OTHER",
        )  # fmt: skip
        prompt, target = cut_sentence(whole, None, relation, ())
        assert f"{prompt} {target}".strip() == whole
        subject = next(m[1] for frame in FRAMES if (m := frame.fullmatch(prompt)))
        assert subject in prompt
        targets.append(target)
    assert targets.count("") == empty
