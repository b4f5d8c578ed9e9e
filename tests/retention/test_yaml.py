from __future__ import annotations

from pathlib import Path

import pytest

from editkit.cli import main
from editkit.retention.settings import parser

FOLDER = Path(__file__).parents[2] / "experiments" / "retention"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_objective_binds(path):
    config = parser().parse_args(["--run=x", f"--config={path}"])
    assert config.data.class_path.startswith("editkit.retention.tasks.")
    assert path.read_text().startswith("#")


def test_help_names_the_options_and_loads_no_model(capsys, monkeypatch):
    monkeypatch.setattr("editkit.api.load_edited", None)
    with pytest.raises(SystemExit) as end:
        main(["retain", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("--retain.mode", "--model.freeze.policy", "--probes.facts", "--data"):
        assert option in out


def test_a_misspelt_option_is_one_sentence(capsys):
    assert main(["retain", "--run=x", "--model.lrr=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("editkit: error:")
    assert "lrr" in err
