"""A base model that is larger than one device: its weights lie in parts on all of them (FSDP2).

Edits are whole on every device, and so is the arithmetic: all devices run all rows, since every
pass needs every part.
"""

from __future__ import annotations

from typing import Any

from editkit.lm.editable import EditableLM


def shard(lm: EditableLM, mesh: Any) -> None:
    """Part the base weights block by block, where Lightning has set up a mesh of devices.

    Args:
        lm: Model without edit layers yet.
        mesh: What `ModelParallelStrategy` makes; None leaves the model whole.

    Raises:
        ValueError: If the mesh is to split single products (tensor parallelism).
    """
    if mesh is None:
        return
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "tensor_parallel_size is above 1; base models are parted by whole weights only: set "
            "data_parallel_size to the number of devices and tensor_parallel_size to 1"
        )
    from torch.distributed.fsdp import fully_shard

    for module in (*lm.blocks, lm.model):
        fully_shard(module, mesh=mesh["data_parallel"])
