"""What the benchmarks share: a model to measure on, a clock, tables, the record of a run.

Benchmarks are run as files, `python benchmarks/memoir.py`, and find this one beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec

MID_SIZE = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 200)  # a pipe cuts no columns


@dataclass
class Seconds:
    """Wall-clock and CPU seconds of stretches of work, summed up."""

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


def save_model(folder: Path, shape: dict[str, Any] = MID_SIZE, corpus: bool = False) -> str:
    """Save a random Llama with fact-world's tokenizer; return the folder.

    Args:
        folder: Where to.
        shape: Widths and numbers of its layers.
        corpus: Copy fact-world's corpus, too, which methods then read by default.
    """
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    packaged = Path(LMSpec().path)
    AutoTokenizer.from_pretrained(packaged).save_pretrained(folder)
    if corpus:
        shutil.copy(packaged / "corpus.txt", folder)
    return str(folder)


def edits_of(count: int) -> list[Edit]:
    """Return edits of the fact-world."""
    data = FactWorld(limit=count)
    data.setup()
    return list(data.edits)


def with_and_without(lm: EditableLM, work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time some work with the edits and without, alternating; the least of each counts."""
    edited, base = [], []
    for _ in range(repeats + 1):
        with Seconds() as took:
            work()
        edited.append(took.cpu)
        with lm.unedited(), Seconds() as took:
            work()
        base.append(took.cpu)
    ratio = min(edited) / min(base)
    return {"ms": 1e3 * min(edited), "ms, unedited": 1e3 * min(base), "overhead": ratio - 1}


def show(title: str, lines: list[dict[str, Any]]) -> None:
    """Print rows of one kind as a table."""
    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name, justify="left" if isinstance(lines[0][name], str) else "right")
    for line in lines:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.values()))
    console.print(table)


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg(),
    }  # fmt: skip


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a command line that shows a module's docstring and takes a file for the figures."""
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(description=doc, formatter_class=raw)
    found.add_argument("--out", type=Path, help="write all figures here as JSON")
    return found


def keep(report: dict[str, Any], path: Path | None) -> None:
    """Write the figures, where a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
