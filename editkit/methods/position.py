"""Lightning's counters in a checkpoint, set from the stream's own position.

Lightning counts batches itself and takes an epoch that ended early for one that is done. A stream
that was cut short (`max_steps`, a callback) or taken back by some edits could then not go on.
"""

from __future__ import annotations

from typing import Any


def set_position(checkpoint: dict[str, Any], batches: int, is_last: bool) -> None:
    """Make a checkpoint say that `batches` batches of its epoch are done and others are ahead.

    Args:
        checkpoint: What Lightning is about to write; changed in place, to what it holds when it is
            written at the end of a batch in mid-epoch.
        batches: Edit batches that are applied.
        is_last: Whether they are all; what comes behind the last one is then still ahead.
    """
    done = {"ready": batches, "started": batches, "processed": batches}
    batch = {**done, "completed": max(batches - 1, 0)}  # Lightning adds the last one on resuming
    step = {"ready": batches, "completed": batches}
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loop = checkpoint["loops"]["fit_loop"]
    loop["epoch_progress"] = {"total": dict(epoch), "current": dict(epoch)}
    loop["epoch_loop.batch_progress"] = {
        "total": dict(batch),
        "current": dict(batch),
        "is_last_batch": is_last,
    }
    loop["epoch_loop.manual_optimization.optim_step_progress"] = {
        "total": dict(step),
        "current": dict(step),
    }
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(batches - 1, 0)
    checkpoint["global_step"], checkpoint["epoch"] = batches, 0
