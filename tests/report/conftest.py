"""Run folders made up of random scores: what a report reads, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.summary import RunFacts, summarise

SCORERS = ("generation", "nll")
KINDS = ("reliability", "generalization", "portability", "locality")
WORDS = ["Oslo", "Lima", "Bern", "Rome", "Paris"]


def write_lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class MakeRun:
    """Writes a run folder whose scores are drawn anew; the probes depend on `edits` alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name, edits=20, right=0.8, seed=0, finished=True, milestones=(1, 10)):
        self.draw, self.right = Random(seed), right
        folder = self.root / name
        folder.mkdir(parents=True)
        rows = []
        for seen in range(1, edits + 1):
            rows += self.rows("immediate", seen, [seen - 1])
            if seen in milestones:
                rows += self.rows("milestone", seen, range(seen))
        final = self.rows("final", edits, range(edits)) if finished else []
        write_lines(folder / "probes.jsonl", rows + final)
        before = self.rows("", 0, range(edits))
        plain = [{k: v for k, v in r.items() if k not in ("moment", "edits_seen")} for r in before]
        write_lines(folder / "unedited.jsonl", plain)
        (folder / "config.yaml").write_text(json.dumps(self.config(edits, seed)))
        if finished:
            self.finish(folder, edits, seed, rows, final)
        return folder

    @staticmethod
    def read(folder, name="probes.jsonl"):
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    @staticmethod
    def write(folder, rows, name="probes.jsonl"):
        write_lines(folder / name, rows)

    def rows(self, moment, seen, edits):
        return [
            row
            for edit in edits
            for kind in KINDS
            for number in range(2 if kind == "generalization" else 1)
            for row in [self.row(moment, seen, edit, kind, number)]
        ]

    def row(self, moment, seen, edit, kind, number):
        hit = float(self.draw.random() < (self.right if moment else 0.1))
        target = WORDS[edit % 5]
        return {
            "moment": moment, "edits_seen": seen, "probe_id": f"{edit}.{kind}{number}",
            "edit_id": edit, "kind": kind, "axis": f"axis{edit % 2}", "group": "",
            "prompt": f"{kind} {number}: the capital of {edit} is", "target": target, "rival": None,
            "relation": ["capital", "mayor"][edit % 2],
            "scores": {"generation": hit, "nll": self.draw.expovariate(1)},
            "answer": target if hit else "nowhere",
            "reference": "elsewhere" if kind == "locality" else None, "counted": True,
        }  # fmt: skip

    def config(self, edits, seed):
        evaluation = {"scorers": list(SCORERS), "max_new_tokens": 50, "stop": ["\n", "."]}
        model = {
            "class_path": "editkit.methods.ft.FT",
            "init_args": {"lr": 0.1, "seed": seed, "lm": {"id": "tiny"}, "evaluation": evaluation},
        }
        data = {"class_path": "editkit.data.jsonl.JSONL", "init_args": {"edits_per_step": 1}}
        return {"model": model, "data": data}

    def finish(self, folder, edits, seed, rows, final):
        immediate = [row for row in rows if row["moment"] == "immediate"]
        facts = RunFacts("FT", "tiny", edits, 4.0, 6.0, 0.25, 2**20)
        summary = summarise(final, immediate, facts, EvalProtocol(scorers=SCORERS))
        summary["protocol"] |= {
            "base_hash": "b" * 64, "data_sha256": "d" * 64, "probes_sha256": "a" * 64,
            "template": "none", "n_edits": edits, "edits_per_step": 1, "seed": seed,
            "method_arguments": {"lr": 0.1 + seed}, "commit": "c" * 40, "torch": "2.13.0",
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        ledger = [{"edit_id": i, "seconds": 0.1 + 0.01 * i} for i in range(edits)]
        write_lines(folder / "edits.jsonl", ledger)
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 900)
        (folder / "adapter_config.json").write_bytes(b"y" * 100)


@pytest.fixture(scope="session")
def run_maker():
    return MakeRun


@pytest.fixture
def make_run(tmp_path):
    return MakeRun(tmp_path / "runs")


@pytest.fixture
def stamp():
    """Change fields of a run's stamped protocol: `stamp(folder, seed=3)`."""

    def change(folder: Path, **changed) -> None:
        path = folder / "summary.json"
        summary = json.loads(path.read_text())
        summary["protocol"] |= changed
        path.write_text(json.dumps(summary))

    return change
