"""Rows of a run folder come back as they were written."""

from __future__ import annotations

from editkit.callbacks.rows import append_rows, keep_rows, read_rows


def test_rows_keep_answers_with_line_separators_of_unicode(tmp_path):
    path = tmp_path / "probes.jsonl"
    rows = [{"edits_seen": 1, "answer": "a\u2028b\x85c"}, {"edits_seen": 2, "answer": "d"}]
    append_rows(path, rows)
    assert read_rows(path) == rows
    keep_rows(path, 1)
    assert read_rows(path) == rows[:1]


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "probes.jsonl"
    append_rows(path, [{"edits_seen": 1}])
    with path.open("a") as file:
        file.write('{"edits_se')
    keep_rows(path, 5)
    assert read_rows(path) == [{"edits_seen": 1}]
