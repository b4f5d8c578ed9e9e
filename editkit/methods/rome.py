"""ROME: one fact at a time, as a rank-one change of one layer.

Idea: the layer is a linear store of keys and values; put the new value at the subject's key, at the
least cost to the keys of a corpus.

Source: Meng et al. 2022 (arXiv 2202.05262), eqs. 2-4; released code kmeng01/rome, and its copy in
wpwpwpyo/LyapLock@c5e6186 (rome/rome_main.py).

Equation: Δ = (v - W k') u^T / (u^T k'), u = C0^-1 k, with k the key averaged over 21 contexts and
k' that of the bare prompt; the value v is searched for at the output of the same layer.

Deviations:
    - Where `layers` names none, the middle one of the model's causal layers is edited; released are
      5 of GPT-J and Llama-3-8B, 17 of GPT-2 XL.
    - The released code edits the first fact of a batch only; here all are, one after the other,
      each under those before it.
    - C0 is fp64, its inverse a Cholesky solve; the released one is an fp32 inverse.

Undo takes an edit's rank-one change out; later edits stay as they were solved. Refused beyond F
edits and for edits of a loaded run.

Costs: as MEMIT for one layer, and one search for each edit.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from editkit.functional.solve import rome_residual
from editkit.functional.spectral import Penalty
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit
from editkit.methods.targets import SubjectRows, Values, Weights
from editkit.methods.value_search import ValueSearch

AS_PUBLISHED = ValueSearch(steps=20, clamp=4.0)


class ROME(LocateThenEdit):
    """Writes one fact at a time into one layer.

    Args:
        search: How the value of an edit is searched for.

    Raises:
        ValueError: If more than one layer is named.
    """

    one_by_one: ClassVar[bool] = True
    value_at: ClassVar[Literal["block", "mlp"]] = "mlp"
    prompt_weights: ClassVar[Weights] = "flat"
    prefix_plan: ClassVar[tuple[tuple[int, int], ...]] = ((10, 5), (10, 10))

    def __init__(self, search: ValueSearch = AS_PUBLISHED, **kwargs: Any) -> None:
        super().__init__(search=search, **kwargs)
        if self.layers is not None and len(self.layers) != 1:
            raise ValueError(f"ROME edits one layer, got layers {self.layers}; name one")

    @property
    def default_layers(self) -> list[int]:
        """The middle of the causal layers."""
        causal = self.lm.causal_layers
        return [causal[len(causal) // 2]]

    def weight(self, count: int) -> float:
        """Return infinity: the value is met exactly."""
        return float("inf")

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return C0; its scale does not matter."""
        return Penalty(cov_FF, 1.0)

    def residual(
        self, rows: SubjectRows, values: Values, site: Site, keys_FE: Tensor, left: int
    ) -> Tensor:
        """Return what is missing at the bare prompt, for a change along the averaged key."""
        penalty = self.regressions[site.path].penalty
        bare_F1 = self._solvable(site, rows.keys(site, "bare"))
        missing_D1 = self._solvable(site, values.z_DE - rows.states())
        return rome_residual(keys_FE, bare_F1, missing_D1, penalty)
