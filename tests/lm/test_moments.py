"""Second moments: what is summed, what runs, what is kept and when it is measured again."""

import json
import logging
import multiprocessing
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editkit.adapters.delta import DeltaLayer
from editkit.lm import kept, moments
from editkit.lm.corpus import Corpus
from editkit.lm.editable import EditableLM
from editkit.lm.moments import second_moments
from editkit.lm.spec import LMSpec

TEXTS = [
    "the capital of Alba is Rome",
    "Bera",
    "he works for Oslo and she lives in Bern where a big town is",
    "a small city, a big city",
    "St. Louis",
]


@pytest.fixture
def llama(tiny):
    return EditableLM.load(LMSpec(id=tiny("llama")))


@pytest.fixture
def corpus():
    return Corpus.of(TEXTS)


@pytest.fixture
def measure(tmp_path, corpus):
    """Measure layers of a model with the cache in the test's own folder."""

    def run(lm, layers=(1, 2), text=corpus, **options):
        sites = [lm.site(layer) for layer in layers]
        return second_moments(lm, sites, text, cache=tmp_path / "cache", **options)

    return run


def assert_near(found_FF, expected_FF, tolerance=1e-6):
    """Two fp32 forward passes differ by rounding."""
    assert float((found_FF - expected_FF).norm() / expected_FF.norm()) < tolerance


def one_by_one(lm, site, texts=TEXTS, length=None):
    """Sum the outer products of a site's inputs, text by text and token by token."""
    keys = []
    hook = lm.model.get_submodule(site.path).register_forward_pre_hook(
        lambda module, args: keys.extend(args[0][0].double())
    )
    with torch.no_grad():
        for text in texts:
            ids = lm.tokenizer(text)["input_ids"][:length]
            lm.model(torch.tensor([ids]))
    hook.remove()
    return sum(torch.outer(k, k) for k in keys) / len(keys), len(keys)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_moments_are_the_mean_outer_product_of_every_token(tiny, measure, architecture):
    lm = EditableLM.load(LMSpec(id=tiny(architecture)))
    found = measure(lm)
    assert list(found) == [lm.site(1).path, lm.site(2).path]
    for layer in (1, 2):
        expected, count = one_by_one(lm, lm.site(layer))
        site = found[lm.site(layer).path]
        assert site.cov_FF.dtype == torch.float64
        assert site.count == count
        assert_near(site.cov_FF, expected)
        assert torch.equal(site.cov_FF, site.cov_FF.T)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_moments_are_those_of_the_released_code(shared, tmp_path, layout):
    case = shared(f"parity/04_covariance_{layout}")
    given = json.loads((case / "inputs.json").read_text())
    lm = EditableLM.load(LMSpec(id=str(case / given["model"])))
    texts = json.loads((case / given["corpus"]).read_text())
    chosen = [texts[i] for i in given["document_indices_used"]]
    sites = [lm.site(layer) for layer in given["layers"]]
    found = second_moments(
        lm, sites, Corpus.of(chosen), max_length=given["max_tokens_per_document"], cache=tmp_path
    )
    expected = load_file(case / "expected.safetensors")
    numbers = json.loads((case / "expected.json").read_text())
    for site in sites:
        name = f"layer{site.layer}"
        (cov_FF,) = (t for key, t in expected.items() if name in key and "C0" in key)
        assert found[site.path].count == numbers[name]["count"]
        assert_near(found[site.path].cov_FF, cov_FF)
        assert found[site.path].condition == pytest.approx(numbers[name]["cond"], rel=1e-6)


def test_sums_are_fp64(llama, measure):
    """The mean of equal products is the product, to what fp64 holds and fp32 does not."""
    text = " ".join(["the capital of"] * 8)
    site = llama.site(1)
    some = measure(llama, (1,), Corpus.of([text] * 300), batch_tokens=400)[site.path].cov_FF
    many = measure(llama, (1,), Corpus.of([text] * 900), batch_tokens=400)[site.path].cov_FF
    assert_near(some, one_by_one(llama, site, [text])[0])
    assert_near(some, many, 1e-13)


def test_batching_moves_only_rounding_and_the_same_call_nothing(llama, measure, tmp_path):
    first = measure(llama)[llama.site(1).path].cov_FF
    for name, batch in (("a", 1), ("b", 30)):
        options = {"cache": tmp_path / name, "batch_tokens": batch}
        other = second_moments(llama, [llama.site(1)], Corpus.of(TEXTS), **options)
        assert_near(other[llama.site(1).path].cov_FF, first)
    again = second_moments(llama, [llama.site(1)], Corpus.of(TEXTS), cache=tmp_path / "c")
    assert torch.equal(again[llama.site(1).path].cov_FF, first)


def test_texts_are_cut_at_max_length_and_the_corpus_at_tokens(llama, measure):
    site = llama.site(1)
    expected, count = one_by_one(llama, site, length=3)
    cut = measure(llama, (1,), max_length=3)[site.path]
    assert cut.count == count
    assert_near(cut.cov_FF, expected)
    ids = len(llama.tokenizer(TEXTS[0])["input_ids"])
    few = measure(llama, (1,), tokens=ids)[site.path]
    expected, count = one_by_one(llama, site, TEXTS[:1])
    assert few.count == count == ids
    assert_near(few.cov_FF, expected)
    assert measure(llama, (1,), tokens=ids + 2)[site.path].count == ids + 2


def test_a_text_beyond_the_models_positions_is_cut_off(llama, measure):
    found = measure(llama, (1,), Corpus.of(["Rome " * 500]))
    assert found[llama.site(1).path].count == 128


def test_one_pass_serves_all_sites_and_ends_at_the_last(llama, measure):
    runs = dict.fromkeys(range(4), 0)
    for layer, block in enumerate(llama.blocks):
        block.register_forward_hook(
            lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1)
        )
    measure(llama, (0, 2))
    assert runs == {0: 1, 1: 1, 2: 1, 3: 0}
    measure(llama, (0, 1))  # 0 is kept
    assert runs == {0: 2, 1: 2, 2: 1, 3: 0}


def test_any_role_can_be_measured(llama, measure):
    sites = [site for site in llama.sites if site.layer == 1]
    found = second_moments(llama, sites, Corpus.of(TEXTS), cache=None, progress=False)
    for site in sites:
        expected, _ = one_by_one(llama, site)
        assert_near(found[site.path].cov_FF, expected)


def test_edits_are_out_of_the_way(llama, measure, tmp_path):
    before = measure(llama)[llama.site(2).path].cov_FF
    layer = llama.attach(llama.site(1).path, DeltaLayer)
    layer.add(torch.ones_like(layer.delta))
    after = second_moments(llama, [llama.site(2)], Corpus.of(TEXTS), cache=tmp_path / "other")
    assert torch.equal(after[llama.site(2).path].cov_FF, before)
    assert layer.enabled
    assert not llama._forward_hooks


def test_autocast_changes_nothing(llama, measure, tmp_path):
    before = measure(llama)[llama.site(2).path].cov_FF
    with torch.autocast("cpu", torch.bfloat16):
        again = second_moments(llama, [llama.site(2)], Corpus.of(TEXTS), cache=tmp_path / "other")
    assert torch.equal(again[llama.site(2).path].cov_FF, before)


def test_condition_is_that_of_the_moments_and_infinite_below_full_rank(llama, measure, caplog):
    many = Corpus.of([" ".join(TEXTS[i:] + TEXTS[:i]) for i in range(5)])
    site = llama.site(1)
    found = measure(llama, (1,), many)[site.path]
    assert found.count >= site.in_features
    with caplog.at_level(logging.WARNING):
        few = measure(llama, (1, 2), Corpus.of(TEXTS[:1]))[site.path]
    assert few.condition == torch.inf
    expected = f"{few.count} tokens of texts for 64 inputs of {site.path} and 1 further sites"
    assert expected in caplog.text
    values = torch.linalg.svdvals(found.cov_FF)
    ratio = float(values[0] / values[-1])
    assert found.condition == pytest.approx(ratio, rel=1e-3)


# what is kept


@pytest.fixture
def forwards(monkeypatch):
    """Count forward passes of measuring."""
    seen = []
    add = moments._add
    monkeypatch.setattr(moments, "_add", lambda *args: (seen.append(1), add(*args)))
    return seen


def test_moments_are_kept_bit_for_bit_and_said_in_the_header(llama, measure, forwards, tmp_path):
    first = measure(llama)
    assert len(forwards) == 1
    second = measure(llama)
    assert len(forwards) == 1
    for path, found in first.items():
        assert torch.equal(second[path].cov_FF, found.cov_FF)
        assert (second[path].count, second[path].condition) == (found.count, found.condition)
    files = sorted((tmp_path / "cache" / "moments").iterdir())
    assert [f.name.rpartition("-")[0] for f in files] == list(first)  # and no temporary file
    with safe_open(files[0], "pt") as opened:
        header = opened.metadata()
    identity = json.loads(header["identity"])
    assert identity["name"] == llama.site(1).path
    assert identity["corpus"] == Corpus.of(TEXTS).sha256
    assert identity["weights"] == kept.weight_hash(llama.spec)
    assert identity["max_length"] == 128
    assert identity["dtype"] == "float32"
    assert int(header["count"]) == first[llama.site(1).path].count


def test_what_decides_moments_decides_what_is_kept(llama, measure, forwards, tiny, tokenizers):
    def grows(*args, **options):
        before = len(forwards)
        measure(*args, **options)
        return len(forwards) > before

    assert grows(llama)
    assert not grows(llama, batch_tokens=100)
    assert grows(llama, text=Corpus.of(TEXTS[::-1]))
    assert grows(llama, max_length=4)
    assert grows(llama, tokens=10)
    assert grows(llama, layers=(3,))
    assert grows(EditableLM.load(LMSpec(id=tiny("llama"), dtype="bfloat16")))
    assert grows(EditableLM.load(LMSpec(id=tiny("mistral"))))
    llama.attach(llama.site(1).path, DeltaLayer)
    assert not grows(llama)
    llama.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    assert not grows(llama)
    llama.tokenizer = tokenizers("sentencepiece_style")
    assert grows(llama)


def test_weights_in_memory_that_are_not_the_files_are_measured(llama, measure, forwards, tiny):
    before = measure(llama)[llama.site(1).path].cov_FF
    with torch.no_grad():
        llama.model.get_submodule(llama.site(0).path).weight.mul_(1.1)
    after = measure(llama)[llama.site(1).path].cov_FF
    assert len(forwards) == 2
    assert not torch.equal(before, after)


def test_a_model_made_in_memory_is_measured_every_time(llama, measure, forwards, tmp_path, caplog):
    lm = EditableLM(llama.model, llama.tokenizer, LMSpec(id=str(tmp_path / "no-files")))
    measure(lm)
    measure(lm)
    assert len(forwards) == 2
    assert "has no weight files; its moments are not kept" in caplog.text
    assert not (tmp_path / "cache").exists()


def cut(path, other):
    path.write_bytes(path.read_bytes()[:-100])


def text(path, other):
    path.write_text("no tensors at all")


def changed(path, other):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def foreign(path, other):
    path.write_bytes(other.read_bytes())


def bare(path, other):
    save_file({"tensor": torch.eye(64).double()}, path)


def unnamed(path, other):
    save_file({"cov": torch.eye(64).double()}, path)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut, "is torn"),
        (text, "is torn or no safetensors file"),
        (changed, "is not what was written"),
        (foreign, "is of something else"),
        (bare, "is of something else"),
        (unnamed, "is torn"),
    ],
)
def test_files_that_cannot_be_trusted_are_measured_again_with_a_word(
    llama, measure, forwards, tmp_path, caplog, damage, word
):
    first = measure(llama)
    one, two = sorted((tmp_path / "cache" / "moments").iterdir())
    damage(one, two)
    again = measure(llama)
    assert len(forwards) == 2
    assert word in caplog.text
    assert str(one) in caplog.text
    for path, found in first.items():
        assert torch.equal(again[path].cov_FF, found.cov_FF)
    assert torch.equal(measure(llama)[llama.site(1).path].cov_FF, found_of(first, llama))
    assert len(forwards) == 2  # and kept again


def found_of(found, lm):
    return found[lm.site(1).path].cov_FF


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(llama, forwards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the cache folder .* EDITKIT_CACHE"):
        second_moments(llama, [llama.site(1)], Corpus.of(TEXTS), cache=tmp_path / "file")
    assert not forwards


def test_a_full_disk_loses_the_file_and_not_the_work(llama, measure, monkeypatch, caplog, tmp_path):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "save_file", full)
    found = measure(llama)
    assert found[llama.site(1).path].count
    assert "measured but cannot be kept: [Errno 28] No space left" in caplog.text
    assert not list((tmp_path / "cache" / "moments").iterdir())


FORK = multiprocessing.get_context("fork")


def test_a_process_killed_while_writing_leaves_nothing_that_is_used(llama, tmp_path, monkeypatch):
    def die(tensors, path, metadata):
        path.write_bytes(b"half")
        os._exit(9)

    corpus = Corpus.of(["the capital of Alba"])
    with monkeypatch.context() as patch:
        patch.setattr(kept, "save_file", die)
        arguments = (llama, [llama.site(1)], corpus)
        worker = FORK.Process(target=second_moments, args=arguments, kwargs={"cache": tmp_path})
        worker.start()
        worker.join()
    assert worker.exitcode == 9
    assert len(list((tmp_path / "moments").iterdir())) == 1  # the temporary file
    found = second_moments(llama, [llama.site(1)], corpus, cache=tmp_path)
    expected, _ = one_by_one(llama, llama.site(1), corpus.texts)
    assert_near(found[llama.site(1).path].cov_FF, expected)


def store_often(folder):
    tensors = kept.KeptTensors(folder, {"who": "all"})
    for _ in range(100):
        tensors.save("site", torch.eye(100, dtype=torch.float64))


def test_processes_that_write_the_same_file_do_not_harm_each_other(tmp_path, caplog):
    workers = [FORK.Process(target=store_often, args=(tmp_path,)) for _ in range(2)]
    store_often(tmp_path)
    reader = kept.KeptTensors(tmp_path, {"who": "all"})
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        tensor, _ = reader.load("site")
        assert torch.equal(tensor, torch.eye(100, dtype=torch.float64))
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not caplog.text
    assert len(list(tmp_path.iterdir())) == 1


# what is refused


def test_a_corpus_without_tokens_is_refused(llama, measure, tokenizers):
    llama.tokenizer = tokenizers("word_level")  # adds no BOS
    with pytest.raises(ValueError, match="corpus 'marks' has no tokens; give longer texts"):
        measure(llama, text=Corpus(["", ""], "marks", "0"))


@pytest.mark.parametrize("name", ["tokens", "max_length", "batch_tokens"])
def test_numbers_below_one_are_refused(llama, measure, name):
    with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
        measure(llama, **{name: 0})


def test_inputs_that_are_not_finite_are_refused_and_not_kept(llama, measure, tmp_path):
    with torch.no_grad():
        llama.model.get_input_embeddings().weight[5:].fill_(torch.inf)
    with pytest.raises(ValueError, match=r"what enters model\.layers\.1.* is not finite"):
        measure(llama)
    assert not list((tmp_path / "cache" / "moments").iterdir())


def test_a_bar_shows_tokens_and_the_time_left(llama, measure, monkeypatch, capsys):
    monkeypatch.setattr(moments.Console, "is_terminal", True)
    measure(llama)
    shown = capsys.readouterr().err
    assert "tokens" in shown
    assert ":" in shown.rpartition("tokens")[2]
