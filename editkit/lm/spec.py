"""LMSpec: which language model to edit, as it stands in YAML."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

PACKAGED = "factworld"
FACTS = "editkit.json"  # in a model's folder: what was found out about it


@dataclass
class LMSpec:
    """Names a causal language model and the facts that editing needs to know about it.

    Args:
        id: Hub id, local folder, or `factworld` for the model that ships with editkit.
        revision: Hub branch, tag or commit; None for the default branch.
        dtype: Dtype of the base weights such as `bfloat16`; None follows `trainer.precision`.
        chat_template: Wrap every edit and every probe in the tokenizer's chat template.
        causal_layers: Blocks that recall facts, for the locate family; None takes those named in
            the model folder's `editkit.json`, or proposes by depth.
        memory_layer: Block whose down-projection carries a memory; None likewise.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`; None leaves it to transformers.
        trust_remote_code: Run model code that comes from the Hub.
    """

    id: str = PACKAGED
    revision: str | None = None
    dtype: str | None = None
    chat_template: bool = False
    causal_layers: list[int] | None = None
    memory_layer: int | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @property
    def path(self) -> str:
        """Where transformers finds the model: the packaged folder for `factworld`, else the id."""
        if self.id == PACKAGED and not (Path(self.id) / "config.json").is_file():
            return str(files("editkit") / "assets" / PACKAGED)
        return str(Path(self.id).expanduser()) if self.id.startswith("~") else self.id

    def with_known(self) -> LMSpec:
        """Return this spec with what the model folder's `editkit.json` says where it is silent.

        Raises:
            ValueError: If that file is not an object of `causal_layers` and `memory_layer`.
        """
        path = Path(self.path) / FACTS
        if not path.is_file():
            return self
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(facts, dict) or not facts.keys() <= {"causal_layers", "memory_layer"}:
            raise ValueError(f"{path} may hold causal_layers and memory_layer, not {facts!r}")
        return replace(self, **{k: v for k, v in facts.items() if getattr(self, k) is None})
