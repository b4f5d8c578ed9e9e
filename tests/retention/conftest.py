"""A tiny edited model in a folder, and files to fine-tune it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from editkit.api import load
from editkit.cli import main
from editkit.edits import Edit

WORDS = [
    "he",
    "works",
    "for",
    "a",
    "big",
    "city",
    "and",
    "a",
    "small",
    "town",
    "where",
    "she",
    "lives",
    "in",
]
TINY = [
    "--probes.intrinsic_per_edit=2", "--probes.matched_per_edit=1", "--probes.unknown=0",
    "--evaluation.max_new_tokens=6", "--data.steps=4", "--data.batch_size=4", "--data.test=4",
    "--model.lr=0.003", "--retain.drift_texts=2", "--trainer.accelerator=cpu", "--report=false",
    "--trainer.enable_progress_bar=false", "--trainer.logger=false",
]  # fmt: skip


def write_lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> str:
    """Sentences that have nothing to do with the edits."""
    rows = [{"text": " ".join(WORDS[i:] + WORDS[:i])} for i in range(len(WORDS))]
    return write_lines(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


FACTS = [
    Edit(i, f"{subject} works for", target, subject)
    for i, (subject, target) in enumerate(
        [
            ("Elda", "Rome"),
            ("Paris", "Oslo"),
            ("Lima", "Answer"),
            ("Bern", "Question"),
            ("Rome", "Louis"),
        ]
    )
]


@pytest.fixture(scope="session")
def facts(tmp_path_factory) -> str:
    """A file of facts that the base model of `edited` knows."""
    rows = [{"prompt": e.prompt, "subject": e.subject, "target": e.target} for e in FACTS]
    return write_lines(tmp_path_factory.mktemp("facts") / "facts.jsonl", rows)


@pytest.fixture(scope="session")
def base(tiny, tmp_path_factory) -> str:
    """A tiny model that was taught the facts."""
    lm = load(tiny("llama"), method="ft", lr=0.05, steps=60, append_eos=True)
    lm.edit_batch(FACTS)
    folder = tmp_path_factory.mktemp("base") / "llama"
    lm.export(folder)
    return str(folder)


@pytest.fixture(scope="session")
def edited(base, edits, tmp_path_factory) -> Path:
    """A folder that `EditedLM.save` wrote: four edits by plain fine-tuning."""
    folder = tmp_path_factory.mktemp("edited") / "ft"
    lm = load(base, method="ft", layer=2, lr=0.01, steps=60, append_eos=True)
    lm.edit_batch(edits)
    lm.save(folder)
    return folder


@pytest.fixture
def tiny_options() -> list[str]:
    """Options that make a run small."""
    return TINY


@pytest.fixture
def retain(edited, texts, facts, tmp_path, monkeypatch):
    """Run `editkit retain` on the tiny run; returns exit code and folder."""
    monkeypatch.setenv("EDITKIT_TRACEBACK", "")

    def run(*args: str, out: str = "out", run: Path = edited, path: str = texts):
        folder = tmp_path / out
        options = [*TINY, f"--run={run}", f"--out={folder}", f"--probes.facts={facts}"]
        task = [] if any(a.startswith("--data=") for a in args) else ["--data=Text"]
        full = [a.replace("--data=", "--data=editkit.retention.tasks.") if a.startswith("--data=")
                else a for a in [*task, *args]]  # fmt: skip
        code = main(["retain", *full[:1], f"--data.path={path}", *options, *full[1:]])
        return code, folder

    return run
