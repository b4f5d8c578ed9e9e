"""Rows of edits: places, targets, shared leads; and the released code's subject indices."""

import json

import pytest
from transformers import AutoTokenizer

from editkit.edits import Edit
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.lm.subject_rows import encode_edits, shared_leads
from editkit.lm.tokens import TokenPolicy

PREFIXES = ["the town is. ", "a big city he works for Rome. "]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_hold_prompt_and_target_up_to_its_last_token(tiny, edits, architecture):
    lm = EditableLM.load(LMSpec(id=tiny(architecture)))
    for edit, rows in zip(edits, encode_edits(lm, edits, PREFIXES, "{} is a"), strict=True):
        for prefix, row in zip(["", *PREFIXES], rows.contexts, strict=True):
            text = f"{prefix}{edit.prompt} {edit.target}"
            whole = lm.tokenizer(text)["input_ids"]
            assert row.ids == whole[:-1]
            assert [whole[t + 1] for t in row.wanted] == row.targets
            assert lm.tokenizer.decode(row.targets).strip() == edit.target
            up_to = lm.tokenizer.decode(row.ids[: row.place + 1], skip_special_tokens=True)
            assert up_to == prefix + edit.prompt[: edit.prompt.index(edit.subject)] + edit.subject
        anchor = lm.tokenizer.decode(rows.anchor.ids, skip_special_tokens=True)
        assert anchor == edit.subject
        assert list(rows.anchor.wanted) == [rows.anchor.place] == [len(rows.anchor.ids) - 1]


def test_leads_are_what_rows_share_and_end_before_a_place(tiny):
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    edits = [
        Edit(0, "the town of Alba is", "Oslo", "Alba"),
        Edit(1, "the town", "Lima", "the town"),
    ]
    rows = encode_edits(lm, edits, PREFIXES, "{} is a")
    for lead, same in zip(
        shared_leads(rows), zip(*(r.all for r in rows), strict=True), strict=True
    ):
        assert all(row.ids[: len(lead)] == lead for row in same)
        nexts = {row.ids[len(lead)] for row in same}
        assert len(nexts) > 1 or len(lead) == min(row.place for row in same)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_template_names_the_place_that_the_released_code_finds(shared, name):
    rows = json.loads((shared("parity/01_subject_index") / "expected.json").read_text())[name]
    policy = TokenPolicy(AutoTokenizer.from_pretrained(shared(f"parity/models/tiny-{name}-p")))
    for row in rows:
        assert policy.template_indices(row["template"], [row["subject"]]) == [row["last"]], row
