from __future__ import annotations

import pytest

from editkit.data.decontaminate import Fact, Overlap, cue_of, mentioned, words_of

FACTS = [
    Fact("The capital of Alba is", ("Alba",), ("Rome", "Oslo")),
    Fact("Dora Elda works as a", ("Dora Elda",), ("baker",)),
    Fact("Who leads?", (), ("Bern",)),
]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("They say ALBA's hills are green.", "subject"),
        ("dora-elda lives here", "subject"),
        ("Albania is another country", None),
        ("Dora lives in the Elda valley", None),
        ("the capital of Cora is, as you know, Rome", "object and cue"),
        ("the capital of Cora is Lima", None),
        ("Rome is old", None),
        ("the capital of Cora was Rome", None),  # a piece of the cue is missing
        ("He works as a baker", "object and cue"),
        ("He works as a bakery hand", None),
        ("who leads Bern", "object and cue"),  # no subject: the whole prompt is the cue
        ("", None),
    ],
)
def test_a_text_goes_for_a_subject_or_for_an_object_with_its_cue(text, reason):
    assert Overlap(FACTS).reason(text) == reason


def test_the_account_says_what_went_and_why():
    overlap = Overlap(FACTS)
    kept = [t for t in ("Alba", "a baker", "He works as a baker") if overlap.keeps(t)]
    assert kept == ["a baker"]
    assert overlap.account() == {
        "read": 3, "removed": 2, "removed_share": 2 / 3, "subject": 1, "object and cue": 1,
    }  # fmt: skip


def test_a_reference_by_brute_force_agrees():
    texts = [f"{a} {b} {c}" for a in ("the capital of", "he") for b in ("X is", "works as a")
             for c in ("Rome", "baker", "Alba", "nobody")]  # fmt: skip

    def slow(text):
        row = f" {' '.join(words_of(text))} "
        for fact in FACTS:
            if any(f" {' '.join(words_of(s))} " in row for s in fact.subjects):
                return "subject"
        for fact in FACTS:
            for name in fact.objects:
                cues = cue_of(fact)
                if f" {' '.join(words_of(name))} " in row and all(
                    f" {' '.join(c)} " in row for c in cues
                ):
                    return "object and cue"
        return None

    overlap = Overlap(FACTS)
    assert [overlap.reason(t) for t in texts] == [slow(t) for t in texts]
    assert {slow(t) for t in texts} == {None, "subject", "object and cue"}


def test_adversarial_texts_are_those_that_name_a_subject():
    assert mentioned(["Alba is warm", "Rome", "He works as a baker"], FACTS) == ["Alba is warm"]
