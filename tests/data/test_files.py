"""What a path may stand for, and how records are read from there."""

import hashlib
import json

import datasets
import pytest

from editkit.data.files import files_of, read_records, version_of
from editkit.data.jsonl import JSONL
from editkit.data.rows import BadRowError, BadRowsError

ROWS = [{"prompt": f"p{i}", "target": "t"} for i in range(4)]


def targets(path, **kwargs):
    data = JSONL(path, **kwargs)
    data.setup()
    return [edit.prompt for edit in data.edits]


@pytest.fixture
def folder(tmp_path):
    """A data set of two splits, one of them in two files."""
    for name, part in (("train-0", ROWS[:1]), ("train-1", ROWS[1:3]), ("test", ROWS[3:])):
        path = tmp_path / "set" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, part)))
    return tmp_path / "set"


# --- wrapped records


@pytest.mark.parametrize("indent", [None, 1])
def test_records_may_be_wrapped_in_an_object(tmp_path, indent):
    path = tmp_path / "a.json"
    head = {"dataset": 'a "records": [', "n": [1, {"records": 3}], "sizes": {}}
    path.write_text(json.dumps({**head, "records": ROWS, "tail": [2]}, indent=indent))
    found = list(read_records(path))
    assert [record for _, record in found] == ROWS
    text = path.read_text().split("\n")
    for line, record in found:
        assert (
            '{"prompt"' in text[line - 1]
            if indent is None
            else f'"{record["prompt"]}"' in text[line]
        )


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        ('{"records": [\n{"prompt": "p"},\n3]}', [None, (3, "not an object")]),
        ('{"records": [\n{"prompt": "p"}\n{"a": 1}]}', [None, (3, "malformed JSON")]),
        ('{"records": [\n{"prompt": "p"}],\n"x"}', [None, (3, "malformed JSON")]),
        ('{"a": 1,\n"records": [\n{"prompt": "p"}]', [None, (3, "malformed JSON")]),
        ("{\n1: 2}", [(2, "malformed JSON")]),
        ('{"records": [],\n"a": 1\n}', []),
        ('{"records": 3,\n"a": 1\n}', [None]),
    ],
)
def test_a_broken_wrapper_is_told_with_its_line(tmp_path, content, reasons):
    path = tmp_path / "a.json"
    path.write_text(content)
    found = [
        (line, row.reason) if isinstance(row, BadRowError) else None
        for line, row in read_records(path)
    ]
    assert found == reasons


# --- Parquet, folders, the Hub


def test_parquet_is_told_by_its_content_and_counts_records(tmp_path):
    path = tmp_path / "no_suffix"
    bad = {"prompt": "p9", "target": ""}
    datasets.Dataset.from_list([*ROWS, bad]).to_parquet(path)
    assert targets(path, on_bad_row="skip") == [row["prompt"] for row in ROWS]
    with pytest.raises(BadRowsError) as caught:
        targets(path)
    assert [row.line for row in caught.value.refused] == [5]


def test_a_folder_is_read_split_by_split_in_order(folder):
    assert targets(folder) == ["p0", "p1", "p2"]
    assert targets(folder, split="test") == ["p3"]
    with pytest.raises(ValueError, match=r"has no split 'dev', only \['test', 'train'\]"):
        targets(folder, split="dev")


def test_every_file_of_a_folder_is_recorded_with_its_hash(folder):
    data = JSONL(folder)
    data.setup()
    assert data.sources == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("train-0.jsonl", "train-1.jsonl")
    }


def test_lines_of_bad_rows_are_those_of_their_own_file(folder):
    (folder / "train-1.jsonl").write_text('{"prompt": "p", "target": "t"}\n{"prompt": "q"}')
    with pytest.raises(BadRowsError, match=r"train-1.jsonl:2: field 'target' is missing"):
        targets(folder)


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRowsError, match=r"data/edits.json: there is no such file"):
        targets("data/edits.json")


class Hub:
    """Stands for the Hub: a data set `me/facts` at two revisions."""

    def __init__(self, folder):
        self.folder, self.asked, self.opened = folder, [], []

    def builder(self, name, revision=None):
        self.asked.append((name, revision))
        files = [f"hf://datasets/{name}@{revision or 'main'}/d/train-{i}.jsonl" for i in (0, 1)]
        config = type("Config", (), {"data_files": {"train": files}})
        return type("Builder", (), {"config": config})

    def open(self, url, mode):
        assert mode == "rb"
        self.opened.append(url)
        path = self.folder / url.rpartition("/")[2]
        return type("File", (), {"open": lambda _: path.open("rb")})()


@pytest.fixture
def hub(folder, monkeypatch):
    hub = Hub(folder)
    monkeypatch.setattr("datasets.load_dataset_builder", hub.builder)
    monkeypatch.setattr("fsspec.open", hub.open)
    return hub


def test_a_hub_data_set_goes_by_owner_name_and_revision(hub):
    data = JSONL("me/facts@v2")
    data.setup()
    assert [edit.prompt for edit in data.edits] == ["p0", "p1", "p2"]
    assert hub.asked == [("me/facts", "v2")]
    assert data.sources == {f"hf://datasets/me/facts/d/train-{i}.jsonl": "v2" for i in (0, 1)}


@pytest.mark.parametrize("revision", [None, "abc"])
def test_one_file_of_the_hub_is_fetched_by_its_address(folder, monkeypatch, revision):
    def fetch(repo, file, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        return str(folder / "train-1.jsonl")

    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    at = f"@{revision}" if revision else ""
    data = JSONL(f"hf://datasets/me/facts{at}/d/train-1.jsonl")
    data.setup()
    assert [edit.prompt for edit in data.edits] == ["p1", "p2"]
    assert asked == [("me/facts", "d/train-1.jsonl", "dataset", revision)]
    digest = hashlib.sha256((folder / "train-1.jsonl").read_bytes()).hexdigest()
    assert data.sources == {"train-1.jsonl": digest}


def test_no_more_is_fetched_than_the_stream_needs(hub):
    assert targets("me/facts", limit=1) == ["p0"]
    assert not any(url.endswith("train-1.jsonl") for url in hub.opened)
    assert targets("me/facts", start=1, limit=1) == ["p1"]
    assert targets("me/facts", increments=[1, 1]) == ["p0", "p1"]
    hub.opened.clear()
    assert targets("me/facts", limit=1, order="shuffled", seed=1)  # a draw needs all of it
    assert any(url.endswith("train-1.jsonl") for url in hub.opened)


def test_a_data_set_that_cannot_be_had_is_named(monkeypatch):
    def fail(name, revision=None):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    with pytest.raises(ValueError, match="data set 'me/facts' cannot be read: no network"):
        targets("me/facts")


@pytest.mark.parametrize("path", ["a.json", "/x/y/z", "owner/name.jsonl", "./a", "a"])
def test_what_is_no_data_set_is_taken_for_a_file(path):
    assert files_of(path, "train") == [path]


def test_versions_of_files(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)
    assert version_of(str(path)) == {"a": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert version_of(str(tmp_path / "b")) == {}
    assert version_of("hf://datasets/o/n/f.json") == {"hf://datasets/o/n/f.json": ""}
