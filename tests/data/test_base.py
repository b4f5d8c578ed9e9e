"""The stream: its order, its slices, and where a resumed run goes on."""

from itertools import pairwise

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from editkit.data.batches import Batch
from editkit.edits import Edit, Probe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*this fit will run with no optimizer",
    "ignore:.*ModelCheckpoint with manual optimization",
    "ignore:.*exists and is not empty",
    "ignore:.*isinstance.treespec, LeafSpec.",
)


class Recorder(lightning.LightningModule):
    """Records the batches it is given; dies before step `killed_at`."""

    def __init__(self, killed_at=None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.killed_at, self.steps, self.asked = killed_at, [], []

    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        if len(self.steps) == self.killed_at:
            raise RuntimeError("killed")
        self.steps.append((batch_idx, [(edit.id, edit.prompt) for edit in batch]))
        self.trainer.datamodule.edits_applied = batch[-1].id + 1
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.asked += [probe.id for probe in batch]


def trainer(folder, **kwargs):
    every_step = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    return lightning.Trainer(
        max_epochs=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[every_step],
        **kwargs,
    )


def prompts(data):
    data.setup()
    return [edit.prompt for edit in data.edits]


# --- order and slices


def test_ids_are_positions_in_the_stream(numbered):
    data = numbered(order="shuffled", seed=1, start=2, limit=5)
    data.setup()
    assert [edit.id for edit in data.edits] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_permutes_and_is_fixed_by_the_seed(numbered, seed):
    file, shuffled = prompts(numbered(30)), prompts(numbered(30, order="shuffled", seed=seed))
    assert shuffled == prompts(numbered(30, order="shuffled", seed=seed))
    assert sorted(shuffled) == sorted(file)
    assert shuffled != file
    assert shuffled != prompts(numbered(30, order="shuffled", seed=seed + 1))


def test_file_order_does_not_depend_on_the_seed(numbered):
    assert prompts(numbered(seed=1)) == prompts(numbered(seed=2))


@pytest.mark.parametrize("order", ["file", "shuffled"])
@pytest.mark.parametrize(("start", "limit"), [(0, 4), (3, None), (3, 4), (8, 100), (9, 1)])
def test_slices_are_of_the_ordered_stream(numbered, order, start, limit):
    whole = prompts(numbered(order=order, seed=7))
    stop = None if limit is None else start + limit
    assert prompts(numbered(order=order, seed=7, start=start, limit=limit)) == whole[start:stop]


def test_probes_follow_their_edits_and_free_probes_stay(numbered):
    data = numbered(order="shuffled", seed=5, start=1, limit=4)
    data.setup()
    owned = [probe for probe in data.probes if probe.edit_id is not None]
    assert len(owned) == 8
    assert all(data.edits[probe.edit_id].prompt == probe.prompt for probe in owned)
    assert [probe.id for probe in data.probes if probe.edit_id is None] == ["world"]


def test_probes_of_some_edits_are_only_theirs(numbered):
    data = numbered()
    data.setup()
    assert [probe.id for probe in data.probes_of({2, 0})] == [
        "0.reliability",
        "0.generalization",
        "2.reliability",
        "2.generalization",
    ]


def test_setup_reads_the_source_once(numbered):
    data = numbered()
    for stage in (None, "fit", "validate"):
        data.setup(stage)
    assert data.loads == 1
    assert data.texts == ["unrelated text"]


# --- batches and increments


def test_batches_are_the_stream_cut_into_steps(numbered):
    data = numbered(10, edits_per_step=4)
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [edit for batch in batches for edit in batch] == data.edits


def test_no_batch_crosses_the_end_of_an_increment(numbered):
    data = numbered(10, edits_per_step=4, increments=[1, 5, 3])
    data.setup()
    assert data.boundaries == [1, 6, 9]
    assert [[edit.id for edit in batch] for batch in data.train_dataloader()] == [
        [0],
        [1, 2, 3, 4],
        [5],
        [6, 7, 8],
    ]
    assert len(data.edits) == 9


def test_a_stream_without_increments_is_one(numbered):
    data = numbered(10)
    data.setup()
    assert data.boundaries == [10]


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader", "predict_dataloader"])
def test_every_probe_is_asked_once_per_evaluation(numbered, loader):
    data = numbered(10, probes_per_batch=4)
    data.setup()
    batches = list(getattr(data, loader)())
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 1]
    assert [probe for batch in batches for probe in batch] == data.probes


def test_loaders_are_no_dataloader_that_ddp_would_deal_out(numbered):
    data = numbered()
    data.setup()
    loaders = [data.train_dataloader(), data.val_dataloader()]
    assert not any(isinstance(loader, torch.utils.data.DataLoader) for loader in loaders)


def test_a_batch_is_used_like_a_list():
    batch = Batch(["a", "b", "c"])
    assert (batch[0], batch[-1], batch[1:], len(batch)) == ("a", "c", ["b", "c"], 3)
    assert batch == ["a", "b", "c"] == list(batch)
    assert batch == Batch(["a", "b", "c"])
    assert repr(batch) == "Batch(['a', 'b', 'c'])"


# --- wrong arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"edits_per_step": 0}, "edits_per_step is 0"),
        ({"probes_per_batch": 0}, "probes_per_batch is 0"),
        ({"start": -1}, "start is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"order": "random"}, "'random'; use 'file' or 'shuffled'"),
        ({"increments": []}, r"increments are \[\]"),
        ({"increments": [3, 0]}, r"increments are \[3, 0\]"),
        ({"start": 10}, "start is 10, but the source holds 10 edits"),
        ({"increments": [8, 4]}, r"\[8, 4\] need 12 edits.* leave 10 of the source's 10"),
        ({"increments": [3, 4], "start": 2, "limit": 6}, "need 7 edits, .* leave 6"),
        ({"count": 0}, "holds no edits"),
    ],
)
def test_wrong_arguments_are_quoted(numbered, kwargs, message):
    with pytest.raises(ValueError, match=message):
        numbered(**kwargs).setup()


@pytest.mark.parametrize(
    ("edits", "probes", "message"),
    [
        ([Edit(1, "p", "t")], [], "numbered edit 0 as 1"),
        ([Edit(0, "p", "t")], [Probe("a", 0, "locality", "q")] * 2, "'a' is used twice"),
        ([Edit(0, "p", "t")], [Probe("a", 1, "locality", "q")], "belongs to edit 1, but"),
        (
            [Edit(0, "p", "t", negatives=("Water  IS wet",))],
            [Probe("a", None, "locality", "water is", "wet")],
            "edit 0 .*probe a: 'Water  IS wet'",
        ),
        (
            [Edit(0, "p", "t", rephrases=("q",))],
            [Probe("a", 0, "generalization", "q", "t")],
            "asked as probe a: 'q'",
        ),
    ],
)
def test_a_source_that_breaks_the_contract_is_refused(numbered, edits, probes, message):
    data = numbered()
    data.load = lambda: (edits, probes)
    with pytest.raises(ValueError, match=message):
        data.setup()


# --- fitting and resuming

STREAM = {"count": 23, "edits_per_step": 2, "increments": [5, 6, 12], "order": "shuffled"}


def test_a_fit_applies_the_stream_once_in_order(numbered, tmp_path):
    data, model = numbered(**STREAM), Recorder()
    trainer(tmp_path).fit(model, data)
    ids = [edit_id for _, batch in model.steps for edit_id, _ in batch]
    assert ids == list(range(23))
    assert len(model.asked) == len(data.probes)


@pytest.mark.parametrize("killed_at", [1, 2, 7, 11, 12])
def test_a_killed_and_resumed_run_gets_the_batches_of_one_never_killed(
    numbered, tmp_path, killed_at
):
    whole = Recorder()
    trainer(tmp_path / "whole").fit(whole, numbered(**STREAM))
    assert len(whole.steps) == 12

    before = Recorder(killed_at)
    if killed_at < 12:
        with pytest.raises(RuntimeError, match="killed"):
            trainer(tmp_path / "part").fit(before, numbered(**STREAM))
    else:
        trainer(tmp_path / "part").fit(before, numbered(**STREAM))
    after, second = Recorder(), trainer(tmp_path / "part")
    second.fit(after, numbered(**STREAM), ckpt_path="last")

    assert before.steps + after.steps == whole.steps
    assert second.global_step == 12


def test_a_resumed_run_may_be_killed_and_resumed_again(numbered, tmp_path):
    steps = []
    for killed_at, checkpoint in ((3, None), (4, "last")):
        model = Recorder(killed_at)
        with pytest.raises(RuntimeError, match="killed"):
            trainer(tmp_path).fit(model, numbered(**STREAM), ckpt_path=checkpoint)
        steps += model.steps
    model = Recorder()
    trainer(tmp_path).fit(model, numbered(**STREAM), ckpt_path="last")
    steps += model.steps
    assert [index for index, _ in steps] == list(range(12))
    assert [edit_id for _, batch in steps for edit_id, _ in batch] == list(range(23))


def test_a_second_fit_without_checkpoint_starts_at_the_first_edit(numbered, tmp_path):
    data = numbered(4)
    for run in ("first", "second"):
        model = Recorder()
        trainer(tmp_path / run).fit(model, data)
        assert len(model.steps) == 4


def test_a_validation_with_a_checkpoint_moves_no_later_fit(numbered, tmp_path):
    data = numbered(4)
    trainer(tmp_path).fit(Recorder(), data)
    model = Recorder()
    trainer(tmp_path).validate(model, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    trainer(tmp_path / "next").fit(model, data)
    assert len(model.steps) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "file"}, "first 9 edits of this stream are not those of the checkpoint"),
        ({"seed": 1}, "file, start, order and seed of that run"),
        ({"increments": None, "limit": 6}, "applied 9 edits, but this stream holds 6"),
        ({"increments": [9, 14], "edits_per_step": 3}, "9 edits in 5 batches.*edits_per_step=3"),
        ({"increments": None, "edits_per_step": 2}, "in 5 batches.*increments=None"),
    ],
)
def test_another_stream_is_not_resumed(numbered, tmp_path, change, message):
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path).fit(Recorder(5), numbered(**STREAM))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(Recorder(), numbered(**{**STREAM, **change}), ckpt_path="last")


def test_a_longer_stream_with_the_same_beginning_is_resumed(numbered, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path).fit(Recorder(3), numbered(20, limit=5))
    model = Recorder()
    trainer(tmp_path).fit(model, numbered(20, limit=8), ckpt_path="last")
    assert [batch[0][0] for _, batch in model.steps] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_frozen_records_reach_the_step_whatever_the_precision(numbered, tmp_path, precision):
    model = Recorder()
    trainer(tmp_path, precision=precision).fit(model, numbered(3))
    assert len(model.steps) == 3
    assert model.asked


def test_positions_of_a_state_agree_with_the_batches(numbered):
    data = numbered(**STREAM)
    data.setup()
    stops = [0] + [batch[-1].id + 1 for batch in data.train_dataloader()]
    for batches, (applied, after) in enumerate(pairwise(stops)):
        data.edits_applied = applied
        data.load_state_dict(data.state_dict())
        rest = list(data.train_dataloader())
        assert len(rest) == 12 - batches
        assert (rest[0][0].id, rest[0][-1].id) == (applied, after - 1)
