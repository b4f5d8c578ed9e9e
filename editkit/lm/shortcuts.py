"""Find out, once per model, what need not run at every pass: by trying, not by the model's name."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from editkit.lm.editable import EditableLM
from editkit.lm.row_states import RowStates, Shortcuts
from editkit.lm.sites import Site
from editkit.lm.subject_rows import EditRows
from editkit.lm.suffix import SuffixRows

log = logging.getLogger(__name__)

PLAIN = Shortcuts(below=False, left=False, head=False, last=False)
TRIED = (
    Shortcuts(),
    Shortcuts(last=False),
    Shortcuts(last=False, left=False),
    Shortcuts(last=False, left=False, below=False),
)
# how a model says that it takes no such cache, where it does not just give other logits
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)


def find_shortcuts(lm: EditableLM, edit: EditRows, site: Site, path: str, first: int) -> Shortcuts:
    """Return the first of the known shortcuts whose logits are those of plain passes.

    Tried in the dtype of the weights, out of autocast, whose rounding would hide what a shortcut
    does wrong; so the answer holds for passes of every precision.

    Args:
        lm: Model; the answer is kept there.
        edit: Rows to try it on.
        site: A site below the changed module.
        path: Module whose output is changed.
        first: Block from which the change can be followed.
    """

    @torch.no_grad()
    def logits(shortcuts: Shortcuts) -> Tensor:
        leads = [row.ids[: row.place // 2] for row in edit.all]
        states = RowStates(lm, [edit], leads, site, path, first, shortcuts)
        change_1D = states.init_ED.flip(1)  # as large as the value, and elsewhere
        rows = SuffixRows(states, [0] * len(states.rows))
        return rows.logits(change_1D)[rows.lead_N.argsort(stable=True)]  # one order for all

    if lm.shortcuts is None:
        with torch.autocast(lm.device.type, enabled=False):
            lm.shortcuts = _tried(lm, logits)
        if lm.shortcuts != TRIED[0]:
            log.warning("%s takes no stored keys and values; edits will be slower", lm.spec.id)
    return lm.shortcuts


def _tried(lm: EditableLM, logits: Callable[[Shortcuts], Tensor]) -> Shortcuts:
    """Return the first shortcuts that change no logits but for rounding."""
    plain_NV = logits(PLAIN)
    rounding = 1e-3 if lm.model.dtype == torch.float32 else 5e-2

    def agree(shortcuts: Shortcuts) -> bool:
        try:
            missed_NV = logits(shortcuts) - plain_NV
        except REFUSALS as error:
            log.info("%s: %s", shortcuts, error)
            return False
        missed = float(missed_NV.norm() / plain_NV.norm())
        log.info("%s: logits differ by %.1e", shortcuts, missed)
        return missed <= rounding

    return next(filter(agree, TRIED), PLAIN)
