"""Train a fact-world model and write its asset folder: `python experiments/factworld/train.py`.

The preset is `world.yaml` beside this file; `--config` lays another over it and dotted options
win (`--trainer.precision 32-true`, `--data.seed 1 --out runs/world-1`).
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch
from card import model_card
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from measure import measure
from recipe import FactWorldLM
from rows import WorldText
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from editkit.data.factworld import FactWorld

HERE = Path(__file__).resolve().parent
PACKAGED = HERE.parents[1] / "editkit" / "assets" / "factworld"
CORPUS = 3000  # texts beside the model, what editing measures its statistics on
logger = logging.getLogger("factworld")


class FactWorldCLI(LightningCLI):
    """Adds where to write the model and how many threads to use."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--out` and `--threads`."""
        parser.add_argument("--out", type=Path, default=PACKAGED, help="Folder to write.")
        parser.add_argument("--threads", type=int, default=2, help="CPU threads to use.")

    def before_instantiate_classes(self) -> None:
        """Set the threads before any tensor is made."""
        torch.set_num_threads(self.config.threads)


def main() -> None:
    """Train, measure, write the asset folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    preset = {"default_config_files": [str(HERE / "world.yaml")]}
    cli = FactWorldCLI(
        FactWorldLM,
        WorldText,
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
        parser_kwargs=preset,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    write_asset(cli.model.lm, cli.datamodule, cli.config.out, cli.model.hparams.recall_layer)
    lm = LlamaForCausalLM.from_pretrained(cli.config.out, torch_dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cli.config.out)
    measures = measure(lm, tokenizer, cli.datamodule.world)
    times = {"wall seconds": round(wall), "CPU seconds": round(cpu)}
    card = model_card(cli.datamodule.world, measures, lm, {**times, **_setting(cli)})
    (cli.config.out / "README.md").write_text(card)
    logger.info(card)


def write_asset(lm: LlamaForCausalLM, data: WorldText, folder: Path, recall_layer: int) -> None:
    """Write model (bf16), tokenizer, `world.json`, `corpus.txt`; for transformers 4 and 5.

    `editkit.json` names the layers below `recall_layer`, where training put the facts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lm.to(torch.bfloat16).save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    layers = {"causal_layers": [*range(recall_layer)]}
    (folder / "editkit.json").write_text(json.dumps(layers) + "\n")
    (folder / "world.json").write_text(json.dumps(data.world.card(), indent=1) + "\n")
    texts = FactWorld(world=folder).corpus(CORPUS)
    (folder / "corpus.txt").write_text("\n".join(texts) + "\n")
    _amend(folder / "config.json", {"rope_theta": 10000.0, "torch_dtype": "bfloat16"})
    _amend(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _amend(path: Path, fields: dict[str, object]) -> None:
    """Add to a json file the fields that transformers 4 looks for and 5 no longer writes."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}, indent=2) + "\n")


def _setting(cli: FactWorldCLI) -> dict[str, object]:
    data = cli.datamodule.hparams
    return {
        "steps": data.steps,
        "tokens seen": data.steps * data.rows * data.length,
        "precision": str(cli.trainer.precision),
        "threads": cli.config.threads,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
