"""What is asked of the unedited model, how often, and what survives a checkpoint."""

import io

import pytest
import torch

from editkit.edits import Probe
from editkit.lm.reading import Reading
from editkit.metrics.evaluate import score_probes
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References

PROTOCOL = EvalProtocol(max_new_tokens=12)


@pytest.fixture
def asked_unedited(twins, monkeypatch):
    """Prompts that the model answered with its edits switched off."""
    asked = []
    decode = Reading.decode

    def watch(reading, *args):
        tokens = reading.tokens
        if not all(layer.enabled for layer in twins.lm.layers.values()):
            for ids_T, mask_T in zip(tokens.ids_BT, tokens.prompt_BT, strict=True):
                asked.append(twins.tokenizer.decode(ids_T[mask_T], skip_special_tokens=True))
        return decode(reading, *args)

    monkeypatch.setattr(Reading, "decode", watch)
    return asked


def test_each_probe_is_asked_once_of_the_unedited_model(twins, probes, asked_unedited):
    references = References()
    probes = [*probes, Probe("c", 0, "portability", "w1", "w2", conditions=(("w3", "w4"),))]
    first = score_probes(twins.lm, probes, references, PROTOCOL)
    local = [p for p in probes if p.kind == "locality"]
    blind = [p.prompt for p in local if p.target is None]  # then forced, on what was said
    assert sorted(asked_unedited) == sorted(["w3", *blind, *(p.prompt for p in local)])
    count = len(asked_unedited)
    assert score_probes(twins.lm, probes[::-1], references, PROTOCOL)
    assert len(asked_unedited) == count
    assert score_probes(twins.lm, probes, references, PROTOCOL) == first


def test_references_stay_those_of_the_unedited_model_when_edits_go_on(twins, probes):
    references = References()
    score_probes(twins.lm, probes, references, PROTOCOL)
    layer = next(iter(twins.lm.layers.values()))
    layer.add(torch.ones_like(layer.delta))
    later = score_probes(twins.lm, probes, references, PROTOCOL)
    assert later == score_probes(twins.lm, probes, References(), PROTOCOL)


def test_references_survive_a_checkpoint_that_loads_weights_only(twins, probes, asked_unedited):
    references = References()
    rows = score_probes(twins.lm, probes, references, PROTOCOL)
    file = io.BytesIO()
    torch.save(references.state_dict(), file)
    file.seek(0)
    restored = References()
    restored.load_state_dict(torch.load(file, weights_only=True))
    asked_unedited.clear()
    assert score_probes(twins.lm, probes, restored, PROTOCOL) == rows
    assert asked_unedited == []
    assert restored.state_dict() == references.state_dict()


def test_only_probes_that_need_a_reference_are_kept(twins, probes):
    references = References()
    score_probes(twins.lm, probes, references, PROTOCOL)
    assert len(references) == sum(p.kind == "locality" for p in probes)


def test_a_scorer_added_later_asks_what_is_missing(twins, probes):
    references = References()
    quick = EvalProtocol(scorers=("nll",), max_new_tokens=12)
    score_probes(twins.lm, probes, references, quick)
    rows = score_probes(twins.lm, probes, references, PROTOCOL)
    assert rows == score_probes(twins.lm, probes, References(), PROTOCOL)


def test_two_probes_of_one_id_are_refused(twins):
    probes = [Probe("p", None, "locality", "w1", "w2"), Probe("p", None, "locality", "w1", "w3")]
    with pytest.raises(ValueError, match=r"probe id 'p' stands for 'w1' -> 'w2' and for"):
        score_probes(twins.lm, probes, References(), PROTOCOL)


def test_references_of_another_way_of_decoding_are_refused(twins, probes):
    references = References()
    score_probes(twins.lm, probes, references, PROTOCOL)
    with pytest.raises(ValueError, match=r"'max_new_tokens': 12.*'max_new_tokens': 13"):
        score_probes(twins.lm, probes, references, EvalProtocol(max_new_tokens=13))
