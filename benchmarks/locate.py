"""What the batched engine of the locate-then-edit methods gains over the released way.

One run measures, over one batch of edits, the values z, the keys of every site and the residuals:

- the engine, and the same engine used the way the methods' released code works: one edit at a time,
  all blocks on whole rows at every pass, the head on every token, and for keys and residuals whole
  passes at every site;
- the share of each shortcut, switched on one after another (values z only);
- peak memory by micro-batch;
- with CUDA, the shape of Llama-3-8B in bf16 with random weights.

    python benchmarks/locate.py                  # about 20 minutes on two quiet cores
    python benchmarks/locate.py --quick          # a smoke test
    python benchmarks/locate.py --only factworld --out locate.json

Times are wall-clock; CPU seconds and the machine's load stand beside them, for a busy machine makes
wall-clock times worthless.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from editkit.adapters.delta import DeltaLayer
from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.lm.blocks import tap
from editkit.lm.editable import EditableLM
from editkit.lm.prefixes import make_prefixes
from editkit.lm.row_states import Shortcuts
from editkit.lm.shortcuts import PLAIN
from editkit.lm.sites import Site
from editkit.lm.spec import LMSpec
from editkit.methods.targets import SubjectRows
from editkit.methods.value_search import ValueSearch

MID_SIZE = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LADDER = [  # released way first; each line switches one more thing on
    ("released way", PLAIN, False),
    ("+ batching", replace(PLAIN, leave=False), True),
    ("+ blocks below once", replace(PLAIN, leave=False, below=True), True),
    ("+ left of the subject once", Shortcuts(head=False, last=False, leave=False), True),
    ("+ head where wanted", Shortcuts(last=False, leave=False), True),
    ("+ last MLP where wanted", Shortcuts(leave=False), True),
    ("+ finished rows leave", Shortcuts(), True),
]
ROWS_AT_ONCE = 128  # of the released code's passes for keys
console = Console()


@dataclass
class Case:
    """A model with edits: sites, constants and prefixes included."""

    name: str
    lm: EditableLM
    edits: list[Edit]
    prefixes: tuple[str, ...]
    search: ValueSearch

    @property
    def sites(self) -> list[Site]:
        """Sites of the causal layers, ascending; the value is that of the last one's block."""
        return [self.lm.site(layer) for layer in self.lm.causal_layers]

    def rows(self, edits: list[Edit], shortcuts: Shortcuts | None, micro_batch: int) -> SubjectRows:
        """Run a batch up to its values."""
        return SubjectRows(
            self.lm, edits, self.prefixes, self.sites, self.sites[-1].layer,
            micro_batch=micro_batch, shortcuts=shortcuts,
        )  # fmt: skip


@dataclass
class Seconds:
    """Wall-clock and CPU seconds of a stretch of work."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Seconds:
        _wait()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        _wait()
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load_texts(count: int) -> tuple[EditableLM, list[Edit], tuple[str, ...]]:
    """Return the fact-world model, edits of its world, and prefixes that it writes."""
    lm = EditableLM.load(LMSpec())
    data = FactWorld(limit=count)
    data.setup()
    return lm, list(data.edits), make_prefixes(lm, generator=torch.Generator().manual_seed(0))


def random_llama(shape: dict[str, Any], tokenizer: Any, device: str, dtype: torch.dtype) -> Any:
    """Return a Llama of a shape with random weights, edited at layers 3-7 (4-8 at 32 blocks)."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(before)
    layers = [3, 4, 5, 6, 7] if shape["num_hidden_layers"] == 12 else [4, 5, 6, 7, 8]
    return EditableLM(model, tokenizer, LMSpec(id="random Llama", causal_layers=layers))


def attach(lm: EditableLM) -> None:
    """Wrap the sites of the causal layers."""
    for layer in lm.causal_layers:
        lm.attach(lm.site(layer).path, DeltaLayer)


def write_something(case: Case, site: Site, undo: bool = False) -> None:
    """Write a small fixed change, so that what lies above a site has to run again."""
    layer = case.lm.layers[site.path]
    assert isinstance(layer, DeltaLayer)
    if undo:
        layer.delta.data.zero_()
        layer.is_written = False
        layer.changed()
    else:
        generator = torch.Generator().manual_seed(site.layer)
        change = torch.randn(layer.shape_oi, generator=generator) * 1e-3
        layer.add(change.to(layer.delta))


def engine(case: Case, micro_batch: int) -> tuple[dict[str, float], list[Tensor]]:
    """Measure the engine on the whole batch; return seconds, and values, keys and residuals."""
    values, keys = Seconds(), Seconds()
    with values:
        rows = case.rows(case.edits, None, micro_batch)
        z_DE = rows.find_values(case.search).z_DE
    found = [z_DE]
    for left, site in zip(range(len(case.sites), 0, -1), case.sites, strict=True):
        with keys:
            found += [rows.keys(site), (z_DE - rows.states()) / left]
        write_something(case, site)
    for site in case.sites:
        write_something(case, site, undo=True)
    return _seconds(case, values, keys), found


def released(case: Case) -> tuple[dict[str, float], list[Tensor]]:
    """Measure the released way on the same batch; the same numbers come out."""
    values, keys = Seconds(), Seconds()
    with values:
        z_DE = torch.cat(
            [
                case.rows([edit], PLAIN, 1).find_values(case.search).z_DE
                for edit in case.edits
            ],
            dim=1,
        )  # fmt: skip
    found = [z_DE]
    for left, site in zip(range(len(case.sites), 0, -1), case.sites, strict=True):
        with keys:
            found += [whole_keys(case, site), (z_DE - whole_states(case)) / left]
        write_something(case, site)
    for site in case.sites:
        write_something(case, site, undo=True)
    return _seconds(case, values, keys), found


def _seconds(case: Case, values: Seconds, keys: Seconds) -> dict[str, float]:
    count = len(case.edits)
    return {
        "values_wall": values.wall / count, "values_cpu": values.cpu / count,
        "keys_wall": keys.wall / count, "keys_cpu": keys.cpu / count,
        "wall": (values.wall + keys.wall) / count, "cpu": (values.cpu + keys.cpu) / count,
    }  # fmt: skip


@torch.no_grad()
def at_subject(case: Case, prefixes: Sequence[str], path: str, inputs: bool) -> Tensor:
    """Return what a module takes or gives at the subjects, [E, contexts, .], by whole passes."""
    texts = [prefix + edit.prompt for edit in case.edits for prefix in prefixes]
    subjects = [str(edit.subject) for edit in case.edits for _ in prefixes]
    found = []
    for start in range(0, len(texts), ROWS_AT_ONCE):
        here = slice(start, start + ROWS_AT_ONCE)
        tokens = case.lm.encode(texts[here], subjects=subjects[here])
        with tap(case.lm.model.get_submodule(path), inputs) as seen:
            case.lm(tokens)
        found.append(seen[0][torch.arange(len(tokens.subject_B)), tokens.subject_B].float())
    return torch.cat(found).unflatten(0, (-1, len(prefixes)))


def whole_keys(case: Case, site: Site) -> Tensor:
    """Return a site's keys [F, E], each weighted 1/2 bare and 1/2 behind prefixes."""
    keys_ECF = at_subject(case, ["", *case.prefixes], site.path, inputs=True)
    return ((keys_ECF[:, 0] + keys_ECF[:, 1:].mean(1)) / 2).T


def whole_states(case: Case) -> Tensor:
    """Return the bare prompts' values [D, E]."""
    path = case.sites[-1].path.split(f".{case.sites[-1].layer}.")[0]
    return at_subject(case, [""], f"{path}.{case.sites[-1].layer}", inputs=False)[:, 0].T
