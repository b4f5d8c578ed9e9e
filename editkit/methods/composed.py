"""Composed: the changes of several edited models of one base, added up; it makes no edits itself.

Idea: a change of a weight that does not depend on the input is a matrix, and matrices of one base
add up (task arithmetic, Ilharco et al. 2023, arXiv 2212.04089, with all factors 1). What was
trained apart may then disagree: sums of changes are not the change that a method would have made
had it seen all edits, so probe the result. `editkit.compose` makes one.

Costs: an fp32 matrix per edited weight.
"""

from __future__ import annotations

from typing import Any

from editkit.adapters.delta import DeltaLayer
from editkit.edits import Edit
from editkit.methods.base import EditModule


class Composed(EditModule):
    """Carries added-up changes.

    Args:
        sites: Paths of the changed weights, as `editkit inspect` lists them.
    """

    def __init__(self, sites: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sites = list(sites)

    def attach(self) -> None:
        """Wrap the sites."""
        for path in self.sites:
            self.lm.attach(path, DeltaLayer)

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a composed model makes no edits; edit one of its parts and compose them again, or "
            "export it and edit that"
        )
