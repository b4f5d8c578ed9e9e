"""Weights & Biases, read back from the files it writes offline."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from editkit.callbacks.logger import RUN_ID, Wandb
from editkit.cli import main

ROOT = Path(__file__).parents[2]
BLOCK, HEAD = 32768, 7  # LevelDB's log format: crc (4 bytes), length (2), type (1), data


def records(path: Path):
    """Yield the records of a .wandb file; long ones are spread over blocks."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), HEAD, b""  # the file's own head is as long
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + HEAD + size > len(data):
            return  # still being written
        whole += data[at + HEAD : at + HEAD + size]
        at += HEAD + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


class Offline:
    """What one W&B run was told."""

    def __init__(self, path: Path) -> None:
        self.history, self.config, self.summary = [], {}, {}
        self.metrics, self.artefacts, self.run, self.exit = [], {}, None, None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append(self.values(record.history.item))
            elif kind == "config":
                self.config |= self.values(record.config.update)
            elif kind == "summary":
                self.summary |= self.values(record.summary.update)
            elif kind == "metric":
                self.metrics.append(record.metric)
            elif kind == "artifact":
                self.artefacts[record.artifact.type] = record.artifact
            elif kind == "run":
                self.run = record.run
            elif kind == "exit":
                self.exit = record.exit.exit_code

    @staticmethod
    def values(items):
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}

    def files(self, kind: str) -> dict[str, Path]:
        return {e.path: Path(e.local_path) for e in self.artefacts[kind].manifest.contents}


def runs() -> list[Offline]:
    """Return the W&B runs, oldest first, once their files are whole: wandb writes beside us."""
    folders, end = [*Path("runs/wandb").glob("offline-run-*")], time.monotonic() + 60
    told: list[Offline] = []
    while len(told) < len(folders) or any(one.exit is None for one in told):
        assert time.monotonic() < end, "a W&B run was never ended"
        time.sleep(0.05)
        told = [Offline(path) for folder in folders for path in folder.glob("run-*.wandb")]
    return sorted(told, key=lambda one: one.run.start_time.ToNanoseconds())


@pytest.fixture
def fit(tiny, tmp_path, monkeypatch):
    """Run `editkit fit` on four edits with W&B offline; more arguments are appended."""
    monkeypatch.setattr(sys, "argv", ["editkit"])
    monkeypatch.setattr("logging.raiseExceptions", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it too, for good
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    rows = [
        {"prompt": f"the capital of {s} is", "target": t, "probes": {"locality": [f"{s} is a"]}}
        for s, t in zip(["Alba", "Bera", "Cora", "Dora"], ["Oslo", "Lima", "Bern", "Rome"],
                        strict=True)
    ]  # fmt: skip
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*more):
        return main([
            "fit", "--model=editkit.methods.ft.FT", f"--model.lm.id={tiny('llama')}",
            "--model.lr=1e-2", "--data=editkit.data.jsonl.JSONL", "--data.path=edits.jsonl",
            "--trainer.default_root_dir=runs/x", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", "--milestones.at=[1]",
            f"--trainer.logger={ROOT / 'experiments' / 'logger' / 'wandb.yaml'}", *more,
        ])  # fmt: skip

    return run


def test_a_run_leaves_curves_config_probes_adapter_and_report(fit):
    assert fit() == 0
    (told,) = runs()
    rows = [json.loads(line) for line in Path("runs/x/probes.jsonl").read_text().splitlines()]
    summary = json.loads(Path("runs/x/summary.json").read_text())

    # curves by edits seen
    assert {m.step_metric for m in told.metrics if m.glob_name == "*"} >= {"edits"}
    assert [m.step_metric for m in told.metrics if m.glob_name == "*"][-1] == "edits"
    curve = [(r["edits"], r["edit/loss_after"]) for r in told.history if "edit/loss_after" in r]
    ledger = [json.loads(line) for line in Path("runs/x/edits.jsonl").read_text().splitlines()]
    assert curve == [(i + 1, pytest.approx(e["loss_after"])) for i, e in enumerate(ledger)]
    scored = [r for r in told.history if "reliability/generation" in r]
    assert [r["edits"] for r in scored] == [1, 4]
    for seen, point in zip((1, 4), scored, strict=True):
        mine = [r["scores"]["nll"] for r in rows if r["moment"] != "immediate"
                and r["edits_seen"] == seen and r["kind"] == "reliability"]  # fmt: skip
        assert point["reliability/nll"] == pytest.approx(sum(mine) / len(mine), rel=1e-5)

    # config, and the scores with their intervals
    assert told.config["model"]["class_path"] == "editkit.methods.ft.FT"
    assert told.config["model"]["init_args"]["lr"] == 0.01
    assert told.config["protocol"]["base_hash"] == summary["protocol"]["base_hash"]
    cell = summary["scores"]["locality"]["nll"]
    assert told.summary["final/locality/nll/value"] == pytest.approx(cell["value"])
    assert told.summary["final/locality/nll/low"] == pytest.approx(cell["low"])
    assert (told.run.project, told.run.display_name, told.exit) == ("editkit", "x", 0)

    # the table of probes
    (file,) = told.files("run_table").values()
    table = json.loads(file.read_text())
    final = [row for row in rows if row["moment"] == "final"]
    asked = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert [(a["probe_id"], a["answer"]) for a in asked] == [
        (r["probe_id"], r["answer"]) for r in final
    ]
    assert [a["nll"] for a in asked] == pytest.approx([r["scores"]["nll"] for r in final])

    # artefacts
    for kind, names in {
        "adapter": {"adapter_config.json", "adapter_model.safetensors", "edits.jsonl"},
        "report": {"report.html"},
    }.items():
        files = told.files(kind)
        assert set(files) == names
        for name, file in files.items():
            assert file.read_bytes() == Path("runs/x", name).read_bytes()


def test_a_resumed_run_goes_on_with_its_wandb_run_and_a_new_one_does_not(fit):
    assert fit("--trainer.max_steps=2") == 0
    kept = Path("runs/x", RUN_ID).read_text().strip()
    assert fit("--ckpt_path=last") == 0
    assert fit("--data.limit=1", "--run.overwrite=true") == 0
    first, second, third = runs()
    assert first.run.run_id == second.run.run_id == kept != third.run.run_id
    assert Path("runs/x", RUN_ID).read_text().strip() == third.run.run_id
    edits = [[r["edits"] for r in told.history if "edit/loss_after" in r]
             for told in (first, second)]  # fmt: skip
    assert edits == [[1, 2], [3, 4]]


def test_a_failed_run_is_ended_as_failed(fit, monkeypatch):
    def fail(self, edits):
        raise ValueError("no edit today")

    monkeypatch.setattr("editkit.methods.ft.FT.edit", fail)
    assert fit() == 1
    (told,) = runs()
    assert told.exit == 1
    import wandb

    assert wandb.run is None


def test_a_prefix_and_a_name_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    logger = Wandb(save_dir=tmp_path / "runs", offline=True, name="mine", prefix="p")
    logger.log_metrics({"edits": 3.0, "loss": 1.0}, 0)
    logger.log_metrics({"reliability/nll": 2.0}, 0)
    logger.close(failed=False)
    (told,) = runs()
    assert told.run.display_name == "mine"
    assert [r["p-edits"] for r in told.history] == [3, 3]
    assert [m.step_metric for m in told.metrics if m.glob_name == "*"][-1] == "p-edits"
