"""Every scorer against plain Python on a trained model of others, and its invariances.

The model writes children's stories (260 thousand parameters, the llama2.c tokenizer). It is edited
by a random change of one weight; what a score should be is computed from transformers' own forward
of single rows, on a copy whose weight has the change in it.
"""

import collections
import hashlib
import json
import math
import random
import re
import string
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from editkit.adapters.delta import DeltaLayer
from editkit.edits import Probe
from editkit.functional.essays import words
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.metrics.essays import ReferenceTexts
from editkit.metrics.evaluate import score_probes
from editkit.metrics.judge import CallableJudge
from editkit.metrics.protocol import SCORERS, EvalProtocol
from editkit.metrics.references import References

BUDGET, ESSAY, TOP_K = 14, 24, 5
SUBJECTS = ["Lily", "Tim", "The cat", "A big dog", "Mom", "The little bird", "Ben and Sam"]
OPENINGS = ["{} went to the", "One day, {} saw a", "{} was very", "In the park, {} found a"]
ANSWERS = ["park", "big tree", "happy", "red ball", "store", "sad", "little girl named Lily"]
JUDGE = """
def is_right(question, expected, answer):
    return any(right.lower() in answer.lower() for right in expected)
"""


class Plain:
    """One row at a time, on a plain model."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def logits(self, ids):
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].float().double()

    def forced(self, prompt, text):
        """Return (log-probabilities at the text's places, the text's ids)."""
        head, whole = (self.tokenizer(t)["input_ids"] for t in (prompt, f"{prompt} {text}"))
        assert whole[: len(head)] == head
        logp_TV = self.logits(whole).log_softmax(-1)
        return logp_TV[len(head) - 1 : -1], whole[len(head) :]

    def nll(self, prompt, text):
        """Return the negative log-likelihood of each token of a text."""
        logp_NV, ids = self.forced(prompt, text)
        return [-float(logp_V[i]) for logp_V, i in zip(logp_NV, ids, strict=True)]

    def free(self, prompt, budget):
        """Return what the model says, greedily."""
        ids = self.ids(prompt, budget)
        start = len(self.tokenizer(prompt)["input_ids"])
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()

    def ids(self, prompt, budget, draws=None):
        """Return the prompt's tokens with those behind it, the likeliest or as draws choose."""
        ids = self.tokenizer(prompt)["input_ids"]
        for n in range(budget):
            logits_V = self.logits(ids)[-1]
            best = int(logits_V.argmax()) if draws is None else drawn(logits_V, draws[n])
            if best == self.tokenizer.eos_token_id:
                break
            ids = [*ids, best]
        return ids


def drawn(logits_V, number):
    """Choose among the likeliest tokens by their probability."""
    ranked = sorted(enumerate(logits_V.tolist()), key=lambda pair: -pair[1])[:TOP_K]
    weights = [math.exp(value - ranked[0][1]) for _, value in ranked]
    reached = 0.0
    for (token, _), weight in zip(ranked, weights, strict=True):
        reached += weight / sum(weights)
        if number < reached:
            return token
    return ranked[-1][0]


@pytest.fixture(scope="module")
def stories(shared):
    """Return (edited model, plain base, plain base with the change in its weight)."""
    folder = str(shared("data/models/stories260K/hf"))
    lm = EditableLM.load(LMSpec(id=folder))
    lm.model.double()
    layer = lm.attach(lm.site(2).path, DeltaLayer)
    delta_DF = torch.randn(layer.delta.shape, generator=torch.Generator().manual_seed(5))
    layer.add(0.08 * delta_DF)
    plain = [AutoModelForCausalLM.from_pretrained(folder).double().eval() for _ in range(2)]
    plain[1].get_submodule(lm.site(2).path).weight.data += 0.08 * delta_DF
    return lm, Plain(plain[0], lm.tokenizer), Plain(plain[1], lm.tokenizer)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """Every scorer there is."""
    folder = tmp_path_factory.mktemp("texts")
    texts = {a: [f"{s} saw the {a}." for s in SUBJECTS[i % 3 :]] for i, a in enumerate(ANSWERS[:5])}
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "grading_of_stories.py").write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        judge = CallableJudge("grading_of_stories.is_right", cache=folder / "verdicts")
    return EvalProtocol(
        scorers=SCORERS,
        max_new_tokens=BUDGET,
        judge=judge,
        reference_texts=ReferenceTexts(folder / "texts.json"),
        essay_tokens=ESSAY,
    )


@pytest.fixture(scope="module")
def probes(stories):
    """Probes of every kind, with rivals, choices and aliases, some right and some not."""
    _, _, after = stories
    draw = random.Random(0)
    made = []
    for i in range(42):
        prompt = draw.choice(OPENINGS).format(draw.choice(SUBJECTS))
        said = cut(after.free(prompt, BUDGET))
        target = draw.choice([*ANSWERS, *([said] if said else [])])
        kind = ("reliability", "generalization", "locality", "portability", "intrinsic")[i % 5]
        others = [a for a in ANSWERS if a != target]
        made.append(
            Probe(
                f"p{i}",
                i // 5,
                kind,
                prompt,
                target,
                rival=others[i % 6] if i % 3 else None,
                choices=tuple(others[: i % 4]),
                aliases=(said,) if i % 7 == 0 and said else (),
                group="g" if i % 4 == 0 else "",
            )
        )
        if kind == "locality" and i % 2:
            made[-1] = Probe(f"p{i}", None, kind, prompt)
    return made


def cut(text):
    """Cut at the first stop; these targets have none inside."""
    return re.split(r"[\n.]", text)[0].strip()


def bare(text):
    """Words without case, punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in kept.split() if w not in ("a", "an", "the")]


def tokens_scored(logp_NV, judged):
    hits = [int(row.argmax()) == i for row, i in zip(logp_NV, judged, strict=True)]
    nll = [-float(row[i]) for row, i in zip(logp_NV, judged, strict=True)]
    return {
        "token_accuracy": sum(hits) / len(hits),
        "sequence_accuracy": float(all(hits)),
        "first_token": float(hits[0]),
        "nll": sum(nll) / len(nll),
    }


def against_target(plain, probe):
    """Scores of a probe's target beside other answers and bounds."""
    own = plain.nll(probe.prompt, probe.target)
    mean = sum(own) / len(own)
    whole = plain.tokenizer(f"{probe.prompt} {probe.target}")["input_ids"]
    logp_TV = plain.logits(whole).log_softmax(-1)
    sure = [float(logp_TV[t - 1, whole[t]].exp()) > 0.8 for t in range(1, len(whole))]
    found = {
        "perplexity": math.exp(mean),
        "ood": sum(sure) / len(sure),
        "ood_instance": float(math.exp(-mean) > 0.8),
    }
    if probe.rival:
        rival = plain.nll(probe.prompt, probe.rival)
        found["pair"] = float(mean < sum(rival) / len(rival))
        found["pair_diff"] = math.exp(-mean) - math.exp(-sum(rival) / len(rival))
    if probe.choices:
        others = [plain.nll(probe.prompt, text) for text in probe.choices]
        found["choice"] = float(all(sum(own) < sum(other) for other in others))
        found["choice_norm"] = float(all(mean < sum(o) / len(o) for o in others))
    return found


def essay_scores(plain, probe, texts):
    """Scores of what the model writes on a prompt."""
    digest = hashlib.sha256(f"0 {probe.prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    draws = torch.rand(ESSAY, generator=generator).tolist()
    room = ESSAY - len(plain.tokenizer(probe.prompt)["input_ids"])
    ids = plain.ids(probe.prompt, room, draws)
    essay = plain.tokenizer.decode(ids, skip_special_tokens=True)
    entropy = []
    for n in (2, 3):
        grams = [tuple(words(essay)[i : i + n]) for i in range(len(words(essay)) - n + 1)]
        shares = [count / len(grams) for count in collections.Counter(grams).values()]
        entropy.append(-sum(share * math.log2(share) for share in shares))
    found = {"fluency": 100 * (entropy[0] / 3 + entropy[1] * 2 / 3)}
    if probe.target in texts:
        found["consistency"] = cosine(essay, " ".join(texts[probe.target]), texts)
    return found


def cosine(first, second, texts):
    """Cosine of TF-IDF vectors whose frequencies are those of all texts, smoothed by one."""
    documents = [set(terms(text)) for group in texts.values() for text in group]
    vectors = []
    for text in (first, second):
        counts = collections.Counter(terms(text))
        vector = {}
        for term, count in counts.items():
            holding = sum(term in document for document in documents)
            if holding:
                vector[term] = count * (math.log((1 + len(documents)) / (1 + holding)) + 1)
        vectors.append(vector)
    norms = [math.sqrt(sum(x * x for x in v.values())) for v in vectors]
    dot = sum(x * vectors[1].get(term, 0.0) for term, x in vectors[0].items())
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0


def terms(text):
    return re.findall(r"\b\w\w+\b", text.lower())


def expected_rows(stories, probe, texts):
    """Return (kind, scores) of each row of one probe."""
    _, before, after = stories
    budget = BUDGET
    accepted = [] if probe.target is None else [probe.target, *probe.aliases]
    for text in accepted:
        budget = max(budget, len(after.forced(probe.prompt, text)[1]) + 8)
    said = cut(after.free(probe.prompt, budget))
    rows = []
    if probe.kind == "locality":
        known = cut(before.free(probe.prompt, budget))
        text = probe.target or known or "."
        base = before.forced(probe.prompt, text)[0].argmax(-1).tolist()
        scores = tokens_scored(after.forced(probe.prompt, text)[0], base)
        scores["generation"] = float(bare(said) == bare(known))
        scores["judge"] = float(known.lower() in said.lower())
        rows.append(("locality", scores))
    if probe.target is not None:
        scores = tokens_scored(*after.forced(probe.prompt, probe.target))
        scores["generation"] = float(any(bare(said) == bare(right) for right in accepted))
        scores["judge"] = float(any(right.lower() in said.lower() for right in accepted))
        scores |= against_target(after, probe)
        if probe.kind == "reliability":
            scores |= essay_scores(after, probe, texts)
        rows.append(("locality_gold" if probe.kind == "locality" else probe.kind, scores))
    return rows


def test_every_scorer_is_that_of_plain_transformers(stories, probes, protocol):
    rows = score_probes(stories[0], probes, References(), protocol)
    texts = json.loads(protocol.reference_texts.path.read_text())
    expected = [row for probe in probes for row in expected_rows(stories, probe, texts)]
    seen = collections.defaultdict(set)
    for row, (kind, scores) in zip(rows, expected, strict=True):
        assert row["kind"] == kind
        assert row["scores"].keys() == scores.keys()
        assert row["scores"] == pytest.approx(scores, abs=1e-6, rel=1e-6)
        for scorer, value in scores.items():
            seen[scorer].add(value)
    assert set(seen) == set(SCORERS)
    assert all(len(values) > 1 for scorer, values in seen.items() if scorer != "ood_instance")


@pytest.mark.parametrize("seed", range(4))
def test_no_score_depends_on_batches_order_or_padding(stories, probes, protocol, seed, monkeypatch):
    lm = stories[0]
    whole = {
        (r["probe_id"], r["kind"]): r for r in score_probes(lm, probes, References(), protocol)
    }
    draw = random.Random(seed)
    pad = lm.policy.pad
    if draw.random() < 0.5:
        monkeypatch.setattr(
            lm.policy, "pad", lambda h, t, i, padding="right": pad(h, t, i, "right")
        )
    monkeypatch.setattr(lm.tokenizer, "padding_side", draw.choice(["left", "right"]))
    mixed = draw.sample(probes, len(probes))
    references, parts = References(), []
    while mixed:
        size = draw.randint(1, 20)
        mixed, part = mixed[size:], mixed[:size]
        parts += score_probes(lm, part, references, protocol, batch_size=draw.randint(1, 9))
    found = {(r["probe_id"], r["kind"]): r for r in parts}
    assert found.keys() == whole.keys()
    for key, row in found.items():
        assert row["scores"] == pytest.approx(whole[key]["scores"], abs=1e-6, rel=1e-6)
        assert {**row, "scores": 0} == {**whole[key], "scores": 0}


def test_each_scorer_alone_gives_what_it_gives_among_all(stories, probes, protocol):
    whole = score_probes(stories[0], probes[:20], References(), protocol)
    for scorer in SCORERS:
        alone = score_probes(
            stories[0], probes[:20], References(), replace(protocol, scorers=(scorer,))
        )
        for row, among in zip(alone, whole, strict=True):
            expected = {k: v for k, v in among["scores"].items() if k == scorer}
            assert row["scores"] == pytest.approx(expected, abs=1e-6, rel=1e-6)
