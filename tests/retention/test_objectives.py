from __future__ import annotations

import json
from typing import ClassVar

import pytest

from editkit.data.decontaminate import Fact
from editkit.data.rows import BadRowError
from editkit.edits import Edit
from editkit.retention import tasks
from editkit.retention.objectives import Example


class Run:
    """What an objective asks of an edited run."""

    world = None
    old_answers: ClassVar = {0: "Rome"}
    standing: ClassVar = {
        0: Edit(0, "The capital of Alba is", "Oslo", "Alba", rephrases=("Alba's capital:",))
    }


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("task", "record", "expected"),
    [
        (tasks.Text, {"text": " a b "}, Example("", "a b")),
        (tasks.Instructions, {"prompt": "p", "answer": "a"}, Example("p", "a")),
        (
            tasks.Instructions, {"instruction": "Do", "input": "x", "output": "y"},
            Example("### Instruction:\nDo\n\nx\n\n### Response:\n", "y"),
        ),
        (
            tasks.Instructions, {"instruction": "Do", "instances": [{"input": "", "output": "y"}]},
            Example("### Instruction:\nDo\n\n### Response:\n", "y"),
        ),
        (
            tasks.Instructions,
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": "q2"}]},
            Example("q", "a"),
        ),
        (
            tasks.Maths, {"question": "1+1?", "answer": "2\n#### 2"},
            Example("Question: 1+1?\nAnswer:", "2\n#### 2"),
        ),
        (
            tasks.Classification, {"sentence": "good film", "label": 1},
            Example("Review: good film\nSentiment:", "positive", choices=("negative",)),
        ),
        (
            tasks.Knowledge, {"question": "q?", "answer": {"value": "a", "aliases": ["b", "a"]}},
            Example("Question: q?\nAnswer:", "a", aliases=("b", "a")),
        ),
        (
            tasks.Knowledge, {"question": "q?", "answers": ["a", "b"]},
            Example("Question: q?\nAnswer:", "a", aliases=("b",)),
        ),
        (
            tasks.Preference,
            {"prompt": "p", "chosen": [{"role": "x", "content": "good"}], "rejected": "bad"},
            Example("p", "good", "bad"),
        ),
    ],
)  # fmt: skip
def test_rows_of_published_forms_are_read(task, record, expected):
    assert task().parse(record) == expected


@pytest.mark.parametrize(
    ("task", "record"),
    [
        (tasks.Text, {"body": "x"}),
        (tasks.Maths, {"question": "q", "answer": "no number"}),
        (tasks.Maths, {"question": "q", "answer": "none\n#### none"}),
        (tasks.Classification, {"sentence": "x", "label": 2}),
        (tasks.Knowledge, {"question": "q", "answers": []}),
        (tasks.Preference, {"prompt": "p", "chosen": "c"}),
        (tasks.Instructions, {"messages": [{"role": "user", "content": "q"}]}),
    ],
)
def test_other_rows_are_refused(task, record):
    with pytest.raises(BadRowError):
        task().parse(record)


@pytest.fixture
def questions(tmp_path):
    rows = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(30)]
    return lines(tmp_path / "q.jsonl", [*rows, {"prompt": "tell me of Alba", "answer": "yes"}])


def test_every_row_comes_once_before_any_comes_again_and_tests_are_apart(questions):
    task = tasks.Instructions(path=questions, test=6, batch_size=4, steps=12)
    task.gather(Run(), [Fact("The capital of Alba is", ("Alba",), ("Oslo",))])
    assert len(task.tests) == 6
    assert len(task.plan) == 48
    assert len(task.examples) in (24, 25)  # 31 rows less 6 tests, less Alba unless that is a test
    first = task.plan[: len(task.examples)]
    assert {r.prompt for r in first} == {r.prompt for r in task.examples}
    assert not {r.prompt for r in task.plan} & {r.prompt for r in task.tests}
    assert not any("Alba" in r.prompt for r in task.plan)
    again = tasks.Instructions(path=questions, test=6, batch_size=4, steps=12)
    again.gather(Run(), [Fact("The capital of Alba is", ("Alba",), ("Oslo",))])
    assert again.plan == task.plan
    other = tasks.Instructions(path=questions, test=6, batch_size=4, steps=12, seed=1)
    other.gather(Run(), [])
    assert other.plan != task.plan


def test_replay_takes_its_share_of_every_batch(questions):
    task = tasks.Instructions(path=questions, batch_size=4, steps=5, replay=0.25, test=3)
    task.gather(Run(), [])
    for i in range(0, 20, 4):
        batch = task.plan[i : i + 4]
        assert sum(r.target == "Oslo" for r in batch) == 1
    assert {r.prompt for r in task.plan if r.target == "Oslo"} == {
        "The capital of Alba is", "Alba's capital:",
    }  # fmt: skip


def test_rows_that_are_none_are_refused_and_not_waited_for(questions):
    with pytest.raises(ValueError, match=r"data\.limit is 0"):
        tasks.Instructions(path=questions, limit=0)
    run = Run()
    run.standing = {}
    with pytest.raises(ValueError, match="none of the run's stands"):
        tasks.Instructions(path=questions, batch_size=4, steps=5, replay=0.25).gather(run, [])


def test_replay_in_running_text_is_the_whole_sentence(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one two three\nfour five six\nseven eight nine\n")
    task = tasks.Text(path=str(path), batch_size=2, steps=2, replay=0.5, test=1)
    task.gather(Run(), [])
    assert {r.target for r in task.plan} & {"The capital of Alba is Oslo", "Alba's capital: Oslo"}


def test_long_documents_are_cut_into_passages(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(" ".join(map(str, range(10))) + "\n")
    task = tasks.Text(path=str(path), words=4, batch_size=1, steps=1, test=1)
    task.gather(Run(), [])
    found = {r.target for r in (*task.examples, *task.tests)}
    assert found == {"0 1 2 3", "4 5 6 7", "8 9"}


def test_mentions_are_made_from_the_edits_or_kept_from_a_file(tmp_path):
    new = tasks.Mentions(about="new", batch_size=1, steps=2)
    new.gather(Run(), [])
    assert {r.target for r in (*new.examples, *new.tests)} <= {
        "The capital of Alba is Oslo.", "Alba's capital: Oslo.",
    }  # fmt: skip
    old = tasks.Mentions(about="old", batch_size=1, steps=2)
    old.gather(Run(), [])
    assert all("Rome" in r.target for r in old.plan)
    path = tmp_path / "t.txt"
    path.write_text("Alba is warm\nCora is cold\nAlba is far away\nAlba has hills\n")
    read = tasks.Mentions(path=str(path), batch_size=1, steps=2, test=1)
    read.gather(Run(), [])
    assert all("Alba" in r.target for r in (*read.examples, *read.tests))
    assert read.account == {"read": 4, "kept": 3}
    tests = tmp_path / "tests.txt"
    tests.write_text("Alba is small\n")
    apart = tasks.Mentions(path=str(path), test_path=str(tests), batch_size=1, steps=2)
    apart.gather(Run(), [])
    assert apart.account == {"read": 4, "kept": 3}


def test_neutral_mentions_are_of_subjects_alone():
    run = Run()
    run.standing = {i: Edit(i, "Who rules?", "Ann", s) for i, s in enumerate(["Alba", None] * 3)}
    neutral = tasks.Mentions(batch_size=1, steps=4)
    neutral.gather(run, [])
    assert all("said that Alba likes" in r.target for r in (*neutral.examples, *neutral.tests))
    run.standing = {1: run.standing[1]}
    with pytest.raises(ValueError, match="no edit that stands has a subject"):
        tasks.Mentions(batch_size=1, steps=4).gather(run, [])


def test_the_file_formats_that_are_shared_are_read(shared):
    for task, name in (
        (tasks.Maths, "data/finetune/gsm8k/train.jsonl"),
        (tasks.Classification, "data/finetune/glue_sst2/sst2.jsonl"),
        (tasks.Instructions, "data/finetune/instruct/dolly_151.jsonl"),
        (tasks.Instructions, "data/finetune/instruct/seed_tasks.jsonl"),
        (tasks.Knowledge, "data/popqa/popqa_longtail.jsonl"),
        (tasks.Text, "data/text/c4_demo.jsonl"),
    ):
        made = task(path=str(shared(name)), steps=2, test=20)
        made.gather(Run(), [])
        assert len(made.tests) == 20
        assert len(made.examples) > 100
        assert made.sources
