"""Two devices: the same edited model as one, on both of them, and errors that both know of.

One pair of processes runs every method under Lightning's `ddp`, a batch of three edits and a last
one of one edit; each test below looks at one thing that came of it.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from editkit.callbacks.devices import ToldToEnd
from editkit.descend import descend
from editkit.edits import Probe
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method
from editkit.methods.ft import FT
from editkit.metrics.protocol import EvalProtocol
from editkit.parallel import RankError, Ranks, agreed
from editkit.strategy import ShardedBase

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "experiments" / "method").glob("*.yaml"))
ARCHITECTURES = ["llama", "gpt2"]
CASES = [f"{path.stem}-{ARCHITECTURES[i % 2]}" for i, path in enumerate(YAMLS)]
SHARDED = [case for case in CASES if case.startswith(("memit-", "memoir-"))]
STEPS = 10  # rounding grows with the steps of a descent, on one device as on two


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 2), (3, 3), (2, 4), (1, 2)])
def test_shares_cover_all_rows_once_in_order_and_none_is_empty(count, size):
    ranks = [Ranks(rank, size) for rank in range(size)]
    shares = [list(range(count))[r.own(count)] for r in ranks]
    assert all(shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    kept = [share[:n] for share, n in zip(shares, ranks[0]._sizes(count), strict=True)]
    assert [*chain(*kept)] == list(range(count))


def test_one_device_takes_no_detour():
    rows = torch.ones(3, requires_grad=True)
    ranks = Ranks.present()
    assert ranks == Ranks(0, 1)
    assert ranks.gather(rows, 3) is rows
    assert ranks.scatter(rows) is rows
    with pytest.raises(KeyError, match="as it was"), agreed():
        raise KeyError("as it was")


# what runs on each of the two devices


def probes_of(edits):
    asked = [Probe(f"r{e.id}", e.id, "reliability", e.prompt, e.target) for e in edits]
    return asked + [Probe(f"l{e.id}", e.id, "locality", f"a town in {e.subject}") for e in edits]


def outcome(case, edits, folder, strategy="ddp"):
    """Edit under a Trainer, then say what came of it."""
    import lightning as L

    from tests.methods.test_contract import Stream, state

    class_path, model, arguments = case
    spec, evaluation = LMSpec(id=model), EvalProtocol(max_new_tokens=4)
    method = build_method(class_path, lm=spec, evaluation=evaluation, **arguments)
    several = {"devices": 2, "strategy": strategy} if Ranks.present().size > 1 else {"devices": 1}
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, num_sanity_val_steps=0, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, default_root_dir=folder, **several,
    )  # fmt: skip
    rows_run = []

    def note(module, args, kwargs):
        rows_run.append(len((*args, *kwargs.values())[0]))

    class Count(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.lm.blocks[-1].register_forward_pre_hook(note, with_kwargs=True)

    trainer.callbacks.append(Count())
    trainer.fit(method, Stream(edits, edits_per_step=3))
    edited_by = sum(rows_run)
    rows = method.score(probes_of(edits))
    losses = [[entry["loss_before"], entry["loss_after"]] for entry in method.ledger]
    return {
        "state": state(method),
        "rows": rows,
        "losses": losses,
        "rows_run": edited_by,
        "references": method.references.state_dict(),
        "parted": sum(hasattr(w, "placements") for w in method.lm.model.parameters()),
    }


class Torn(FT):
    """Fails on the second device alone, where the first is about to wait for it."""

    def edit(self, edits):
        if Ranks.present().rank == 1:
            raise ValueError(f"no luck with edit {edits[0].id}")
        return super().edit(edits)


def words_of_failure(work):
    try:
        work()
    except RankError as error:
        return str(error)
    return None


def everywhere(rank, folder, cases, edits, torn):
    logging_off()
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "", "MASTER_PORT": "0"}
    os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    found = {name: outcome(case, edits, folder) for name, case in cases.items()}
    for name in SHARDED:
        found[f"parts of {name}"] = outcome(cases[name], edits, folder, ShardedBase())
    leaf = torch.zeros(2, requires_grad=True)
    ranks = Ranks.present()

    def loss(step):
        own = (leaf.sum() - torch.arange(3.0)[ranks.own(3)]).square()
        return ranks.gather(own, 3).sum() + leaf.square().sum()

    found["descent"] = (
        descend([leaf], loss, 3, 0.1, optimizer=torch.optim.SGD).losses,
        leaf.detach(),
    )
    method = Torn(lm=LMSpec(id=torn), evaluation=EvalProtocol())
    found["torn"] = words_of_failure(lambda: method.apply_edits(edits))
    found["scratch"] = [bool(layer._scratch) for layer in method.lm.layers.values()]

    def infinite(step):
        return leaf.sum() * (float("nan") if rank == 1 else 1.0)

    def diverge():
        with agreed():
            descend([leaf], infinite, 3, 0.1)

    found["diverged"] = words_of_failure(diverge)
    told, flags = ToldToEnd(), SimpleNamespace(received_sigterm=False)
    found["told"] = []
    for is_told in (False, rank == 1):
        told.is_told = is_told
        told.on_train_batch_end(SimpleNamespace(_signal_connector=flags))
        found["told"].append(flags.received_sigterm)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def logging_off():
    import logging
    import warnings

    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "editkit"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def cases(tiny, located):
    """Arguments of every YAML's method on tiny models."""
    found = {}
    for path, case in zip(YAMLS, CASES, strict=True):
        config = yaml.safe_load(path.read_text())
        module, _, name = config["class_path"].rpartition(".")
        fitting = located(getattr(importlib.import_module(module), name))
        arguments = {**config.get("init_args", {}), **fitting}
        if "steps" in arguments:
            arguments["steps"] = STEPS
        model = tiny(case.rpartition("-")[2])
        found[case] = config["class_path"], model, arguments
    return found


@pytest.fixture(scope="module")
def both(cases, edits, tiny, tmp_path_factory):
    """What came of it on each of two devices; workers of one test run share one pair."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "pair"
    with (root / "pair.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            mp.spawn(everywhere, args=(str(folder), cases, edits, tiny("llama")), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(cases, edits, tmp_path_factory):
    """What comes of a case on one device."""
    return lambda name: outcome(cases[name], edits, tmp_path_factory.mktemp("alone"))


def distance(one, other):
    """Largest relative difference of what edits wrote."""
    assert one.keys() == other.keys()
    pairs = [(one[k].float(), other[k].float()) for k in one]
    return max(float((a - b).norm() / (b.norm() + 1e-12)) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_two_devices_give_the_edited_model_that_one_gives(case, both, alone):
    expected, found = alone(case), both[0][case]
    assert distance(found["state"], expected["state"]) < 1e-4
    close = {"rel": 1e-3, "abs": 1e-4}
    for losses, right in zip(found["losses"], expected["losses"], strict=True):
        assert losses == pytest.approx(right, **close)
    for row, right in zip(found["rows"], expected["rows"], strict=True):
        assert {**row, "scores": 0, "route": 0} == {**right, "scores": 0, "route": 0}
        assert row["scores"] == pytest.approx(right["scores"], **close)
    assert found["references"] == expected["references"]
    assert found["rows_run"] < expected["rows_run"]


@pytest.mark.parametrize("case", SHARDED)
def test_a_base_model_in_parts_gives_the_edited_model_of_a_whole_one(case, both, alone):
    expected, found = alone(case), both[0][f"parts of {case}"]
    assert found["parted"] > 0
    assert expected["parted"] == 0
    assert distance(found["state"], expected["state"]) < 1e-4
    assert [row["answer"] for row in found["rows"]] == [row["answer"] for row in expected["rows"]]


@pytest.mark.parametrize("case", CASES)
def test_both_devices_hold_the_same_bits(case, both):
    one, other = (found[case] for found in both)
    assert all(torch.equal(one["state"][k], other["state"][k]) for k in one["state"])
    assert one["losses"] == other["losses"]
    assert one["rows"] == other["rows"]


def test_a_loss_of_shared_rows_and_of_what_each_device_adds_descends_as_on_one(both):
    leaf = torch.zeros(2, requires_grad=True)

    def loss(step):
        return (leaf.sum() - torch.arange(3.0)).square().sum() + leaf.square().sum()

    losses = descend([leaf], loss, 3, 0.1, optimizer=torch.optim.SGD).losses
    for found in both:
        assert found["descent"][0] == pytest.approx(losses, rel=1e-6)
        assert torch.allclose(found["descent"][1], leaf.detach())


def test_where_one_device_fails_both_say_the_same_and_nothing_is_half_written(both):
    for found in both:
        assert found["torn"] == "on device 1 of 2: no luck with edit 0"
        assert found["diverged"].startswith("on device 1 of 2: the loss became nan at step 0")
        assert found["scratch"] == [False]


def test_what_one_device_is_told_both_hear_of_at_the_same_step(both):
    assert [found["told"] for found in both] == [[False, True]] * 2


def on_two(folder, model, path, *more):
    """Run the command line as a user does, who leaves starting the second process to Lightning."""
    args = [
        sys.executable, "-m", "editkit", "fit", "--model=editkit.methods.ft.FT",
        f"--model.lm.id={model}", "--model.steps=5", "--data=editkit.data.jsonl.JSONL",
        f"--data.path={path}", "--data.edits_per_step=3", "--trainer.accelerator=cpu",
        "--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip
    return subprocess.run(args, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_command_line_edits_on_two_devices_and_one_of_them_writes(tiny, edits, tmp_path):
    rows = [
        {"prompt": e.prompt, "target": e.target, "probes": {"locality": [f"a town in {e.subject}"]}}
        for e in edits
    ]
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = on_two(tmp_path / "run", tiny("llama"), path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    asked = [json.loads(line) for line in (tmp_path / "run" / "probes.jsonl").open()]
    final = [(row["kind"], row["edit_id"]) for row in asked if row["moment"] == "final"]
    assert sorted(final) == [(kind, i) for kind in ("locality", "reliability") for i in range(4)]
    ledger = [json.loads(line) for line in (tmp_path / "run" / "edits.jsonl").open()]
    assert [entry["edit_id"] for entry in ledger] == [0, 1, 2, 3]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["protocol"]["devices"] == 2
    assert not [p.name for p in (tmp_path / "run").iterdir() if "tmp" in p.name]
