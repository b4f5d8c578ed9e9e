"""Processes of several devices: where one is gone all end, and one sentence says why."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from editkit.callbacks import devices
from editkit.callbacks.devices import one_end


@pytest.fixture
def started():
    """Two processes that wait, and a Trainer whose launcher started them."""
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    others = [subprocess.Popen(wait) for _ in range(2)]
    launcher = SimpleNamespace(procs=[*others])
    strategy = SimpleNamespace(launcher=launcher)
    yield others, SimpleNamespace(strategy=strategy, global_rank=0, world_size=3)
    for process in others:
        process.kill()
        process.wait()
    devices._Watch.others.clear()


@pytest.fixture
def ends(monkeypatch):
    """Statuses that this process would have ended with."""
    found, done = [], threading.Event()

    def end(code):
        found.append(code)
        threading.current_thread().is_over.set()
        done.set()

    monkeypatch.setattr(devices.os, "_exit", end)
    return SimpleNamespace(found=found, done=done)


def test_where_another_process_is_killed_all_end_and_one_sentence_says_why(started, ends, capsys):
    others, trainer = started
    with one_end(trainer):
        others[1].kill()
        assert ends.done.wait(10)
    assert ends.found == [1]
    assert others[0].wait(10) == -9
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "editkit: error: the process of device 2 was ended by SIGKILL, and the run with it; go on "
        "with --ckpt_path last"
    ]


def test_where_the_first_process_is_gone_the_others_end(started, ends, capsys, monkeypatch):
    _, trainer = started
    trainer.global_rank = 1
    with one_end(trainer, "begin again"):
        monkeypatch.setattr(devices.os, "getppid", lambda: 1)
        assert ends.done.wait(10)
    said = capsys.readouterr().err
    assert said.endswith("the first device is gone, and the run with it; begin again\n")


def test_what_fails_here_ends_the_others_and_is_raised(started, ends):
    others, trainer = started
    with pytest.raises(ValueError, match="no luck"), one_end(trainer):
        raise ValueError("no luck")
    assert [process.wait(10) for process in others] == [-9, -9]
    assert ends.found == []


def test_a_run_that_is_told_to_end_ends_with_the_status_of_that(started, ends, capsys):
    others, trainer = started
    with pytest.raises(SystemExit) as ended, one_end(trainer, "begin again"):
        raise SIGTERMException
    assert ended.value.code == 143
    assert capsys.readouterr().err == "editkit: told to end (SIGTERM); begin again\n"
    assert [process.wait(10) for process in others] == [-9, -9]


def test_processes_that_ended_well_end_nothing(started, ends):
    others, trainer = started
    watch = devices._Watch(trainer, "")
    watch.others += [subprocess.Popen([sys.executable, "-c", ""])]
    watch.others[0].wait()
    with one_end(trainer):
        assert not ends.done.wait(5 * devices.EVERY)
    assert [process.poll() for process in others] == [None, None]
