from __future__ import annotations

import pytest
import torch

from editkit.api import load_edited
from editkit.retention.drift import Before, drift, look


def hidden_after(lm, edit, block: int) -> torch.Tensor:
    """Hugging Face's own record of a block's output at the last token of the subject."""
    ids = lm.tokenizer(edit.prompt, return_tensors="pt").input_ids
    ends = edit.prompt.index(edit.subject) + len(edit.subject)
    last = len(lm.tokenizer(edit.prompt[:ends]).input_ids) - 1
    return lm.model(ids, output_hidden_states=True).hidden_states[block + 1][0, last]


def test_activation_shift_is_that_of_the_states_at_the_subjects(edited, edits, tmp_path):
    lm = load_edited(edited).lm
    with torch.no_grad():
        before, old = look(lm, [], edits), [hidden_after(lm, e, 0) for e in edits]
        before.save(tmp_path / "before.safetensors")
        lm.blocks[0].self_attn.o_proj.weight.mul_(1.5)
        new = [hidden_after(lm, e, 0) for e in edits]
    found = drift(lm, Before.load(tmp_path / "before.safetensors"), look(lm, [], edits), {})
    each = [float((b - a).norm() / a.norm()) for a, b in zip(old, new, strict=True)]
    assert found["activations"]["0"] == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert sorted(found["activations"]) == [str(i) for i in range(len(lm.blocks))]
    assert found["kl"] is None
