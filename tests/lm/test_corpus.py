"""Corpora: what is read from files, folders and datasets, and what is refused with its fix."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from editkit.data.factworld import FactWorld
from editkit.lm import corpus as module
from editkit.lm.corpus import WIKIPEDIA, Corpus, cache_folder, read_corpus
from editkit.lm.spec import LMSpec

SPEC = LMSpec(id="nowhere/model")
ASSETS = Path(module.__file__).parents[1] / "assets" / "factworld"


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def rows(*texts):
    return [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]


def test_a_text_file_has_one_text_a_line_and_blank_lines_are_none(tmp_path):
    path = write(tmp_path / "c.txt", "one two", "", "  ", "drei\u2028vier", "five")
    corpus = read_corpus(path, 10, SPEC)
    assert corpus.texts == ["one two", "drei\u2028vier", "five"]
    assert corpus.name == str(path)


def test_json_lines_give_their_field_text(tmp_path):
    path = write(tmp_path / "c.jsonl", *rows("one", "two\nlines", " "), "")
    assert read_corpus(str(path), 10, SPEC).texts == ["one", "two\nlines"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = write(tmp_path / "c.jsonl", '{"text": "smile \\ud83d end"}')
    assert read_corpus(path, 10, SPEC).texts == ["smile ? end"]


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", *rows("b"))
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "x.txt", "ax")
    write(tmp_path / "c.txt", "c")
    write(tmp_path / "readme.md", "not a text")
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "x.txt", "hidden")
    assert read_corpus(tmp_path, 10, SPEC).texts == ["ax", "b", "c"]


def test_the_same_texts_have_the_same_hash_wherever_they_stand(tmp_path):
    one = read_corpus(write(tmp_path / "c.txt", "a", "b"), 10, SPEC)
    two = read_corpus(write(tmp_path / "d.jsonl", *rows("a", "b")), 10, SPEC)
    assert one.sha256 == two.sha256
    assert one.sha256 != Corpus.of(["ab"]).sha256
    assert one.sha256 != Corpus.of(["b", "a"]).sha256


def test_a_sample_is_seeded_fair_and_in_order(tmp_path):
    path = write(tmp_path / "c.txt", *(f"text {i}" for i in range(20)))
    corpus = read_corpus(path, 5, SPEC, seed=3)
    assert corpus == read_corpus(path, 5, SPEC, seed=3)
    numbers = [int(text.split()[1]) for text in corpus.texts]
    assert len(set(numbers)) == 5
    assert numbers == sorted(numbers)
    drawn = Counter(t for seed in range(400) for t in read_corpus(path, 5, SPEC, seed).texts)
    # 400 draws of 5 in 20: 100 each, standard deviation sqrt(400 * 1/4 * 3/4) = 8.7
    assert all(abs(drawn[f"text {i}"] - 100) < 4.5 * 8.7 for i in range(20))


def test_without_a_source_the_models_own_corpus_is_read(tmp_path):
    write(tmp_path / "corpus.txt", "its own")
    assert read_corpus(None, 10, LMSpec(id=str(tmp_path))).texts == ["its own"]
    packaged = read_corpus(None, 100_000, LMSpec())
    assert packaged.texts == FactWorld().corpus(3000)
    assert (ASSETS / "corpus.txt").stat().st_size < 250_000


def test_the_packaged_corpus_states_nothing_about_a_subject_that_is_edited_or_asked():
    """Such a name stands there as an answer at most, as in "The capital of Aland is Berg."."""
    group = FactWorld().world.group
    used = {name for name in group if group[name] != "background"}
    parts = {part for name in used for part in name.split()}
    named = 0
    for text in read_corpus(None, 100_000, LMSpec()).texts:
        assert not any(text.startswith(name) for name in used if text.split()[0] in parts), text
        words = text.rstrip(".").replace("?", " ").split()
        spans = {" ".join(words[i : i + n]) for i in range(len(words)) for n in (1, 2)}
        found = {name for name in used & spans if not text.endswith(f" {name}.")}
        assert not found, (text, found)
        named += bool(used & spans)
    assert named  # the check above has met some


def test_a_local_dataset_is_streamed_through_datasets(tmp_path):
    from datasets import Dataset

    folder = tmp_path / "data"
    folder.mkdir()
    Dataset.from_dict({"text": ["p", " ", "q"]}).to_parquet(folder / "train-00000.parquet")
    assert read_corpus(folder, 10, SPEC).texts == ["p", "q"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset that stands for one of the Hub, and the cache folder."""
    import datasets

    load = datasets.load_dataset
    file = write(tmp_path / "hub.jsonl", *rows(*(f"article {i}" for i in range(50))))
    opened = []

    def load_dataset(name, config, **options):
        opened.append((name, config))
        return load("json", data_files=str(file), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return opened, tmp_path / "cache", file


def test_a_hub_dataset_is_sampled_once_and_then_kept(hub):
    opened, cache, file = hub
    first = read_corpus("owner/name:part", 20, SPEC, seed=1, cache=cache)
    assert opened == [("owner/name", "part")]
    assert len(set(first.texts)) == 20
    assert set(first.texts) <= {f"article {i}" for i in range(50)}
    assert first.name == "owner/name:part"
    file.unlink()  # as without a network
    assert read_corpus("owner/name:part", 20, SPEC, seed=1, cache=cache) == first
    assert len(opened) == 1


def test_another_seed_or_count_is_another_draw(hub):
    opened, cache, _ = hub
    first = read_corpus("owner/name", 20, SPEC, seed=1, cache=cache)
    assert read_corpus("owner/name", 20, SPEC, seed=2, cache=cache).texts != first.texts
    assert len(read_corpus("owner/name", 30, SPEC, seed=1, cache=cache).texts) == 30
    assert opened == [("owner/name", None)] * 3


def test_without_any_source_wikipedia_is_asked_for(hub):
    opened, cache, _ = hub
    assert read_corpus(None, 5, SPEC, cache=cache).name == WIKIPEDIA
    assert opened == [("wikimedia/wikipedia", "20231101.en")]


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_a_damaged_draw_is_drawn_again_with_a_word(hub, caplog, damage):
    opened, cache, _ = hub
    first = read_corpus("owner/name", 20, SPEC, cache=cache)
    (kept,) = (cache / "corpora").iterdir()
    data = kept.read_text()
    head, _, body = data.partition("\n")
    other = json.dumps({**json.loads(head), "source": "owner/other"})
    kept.write_text(
        {
            "cut": data[: len(data) // 2],
            "changed": data.replace("article", "Article", 1),
            "foreign": f"{other}\n{body}",
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert read_corpus("owner/name", 20, SPEC, cache=cache) == first
    assert "is damaged; its texts are drawn again" in caplog.text
    assert len(opened) == 2
    assert kept.read_text() == data


def test_a_draw_that_cannot_be_kept_is_still_used(hub, caplog, tmp_path):
    write(tmp_path / "file", "no folder")
    corpus = read_corpus("owner/name", 20, SPEC, cache=tmp_path / "file")
    assert len(corpus.texts) == 20
    assert "drawn but not kept" in caplog.text


def test_the_cache_folder_is_given_or_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path / "env"))
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    assert cache_folder() == tmp_path / "env"
    monkeypatch.delenv("EDITKIT_CACHE")
    assert cache_folder() == Path("~/.cache/editkit").expanduser()


def check_refused(source, match, count=10, **options):
    with pytest.raises(ValueError, match=match) as error:
        read_corpus(source, count, SPEC, **options)
    return str(error.value)


def test_what_is_not_there_is_refused_without_asking_the_hub(tmp_path):
    check_refused(tmp_path / "no.txt", r"no\.txt' does not exist; give a \.txt \(one text a line\)")
    check_refused("no.jsonl", r"corpus 'no\.jsonl' does not exist")
    check_refused("a/b/c", "corpus 'a/b/c' does not exist")
    check_refused("", "corpus '' does not exist; give")


def test_empty_corpora_are_refused(tmp_path):
    check_refused(write(tmp_path / "c.txt", "", " "), r"c\.txt' has no text; give")
    check_refused(write(tmp_path / "c.txt", "a"), "a corpus of 0 texts is empty", count=0)
    with pytest.raises(ValueError, match="corpus 'texts' has no text"):
        Corpus.of([" "])


def test_files_that_are_no_texts_are_refused_with_the_place(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"fine\ncaf\xe9 noir\n")
    check_refused(latin, r"latin\.txt' is not UTF-8 at byte 8; save it as UTF-8")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"PK\x03\x04\0\0\0")
    check_refused(binary, r"binary\.txt' holds binary data")
    check_refused(
        write(tmp_path / "c.csv", "text", "a"), r"c\.csv' is no \.txt or \.jsonl; give a \.txt"
    )


def test_bad_json_lines_are_refused_with_the_line(tmp_path):
    path = tmp_path / "c.jsonl"
    check_refused(write(path, *rows("a"), '{"text": '), r"c\.jsonl:2: Expecting value at column")
    check_refused(
        write(path, '{"body": "a"}'), r"c\.jsonl:1: needs a field 'text'.* found \['body'\]"
    )
    check_refused(write(path, '{"text": 3}'), r"c\.jsonl:1: needs a field 'text'.* found 3")
    check_refused(write(path, '["a"]'), r"c\.jsonl:1: expected \{\"text\": \.\.\.\}, found \['a'\]")


def test_a_dataset_without_texts_is_refused(tmp_path, hub):
    _, cache, file = hub
    write(file, json.dumps({"body": "a"}))
    check_refused("owner/name", r"dataset 'owner/name': needs a field 'text'", cache=cache)
    assert not (cache / "corpora").exists()


def test_a_folder_with_nothing_to_read_names_the_fix(tmp_path):
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", r"dataset '.*empty' cannot be opened \(.*\); check its name")


def test_an_unreachable_dataset_names_the_fix(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_refused(
        "owner/not-there", r"owner/not-there' cannot be opened .* give `corpus` as a \.txt"
    )


def test_a_stream_that_breaks_off_names_the_fix(monkeypatch):
    class Broken:
        def shuffle(self, **options):
            return self

        def __iter__(self):
            yield {"text": "one"}
            raise ConnectionError("the line went dead")

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: Broken())
    check_refused("owner/name", r"broke off \(the line went dead\); .* give `corpus` as a \.txt")
