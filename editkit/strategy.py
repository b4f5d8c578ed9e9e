"""ShardedBase: Lightning's strategy for a base model that is larger than one device.

    editkit fit ... --trainer.devices 8 --trainer.strategy sharded

The frozen weights lie in parts on all devices (FSDP2); edits, checkpoints and artefacts are whole,
as on one device.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy


class ShardedBase(ModelParallelStrategy):
    """Parts the base weights over all devices; checkpoints hold edits alone, in one file."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Let all devices take part."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether the model must be in place first; edits are loaded as on one device."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather nothing: the module puts its edits into the checkpoint itself."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: edits are descended on between two steps of the clock."""
        return {}

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write one file, from the first device."""
        Strategy.save_checkpoint(self, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read one file, on every device."""
        return Strategy.load_checkpoint(self, *args, **kwargs)

    def load_model_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Hand the edits to the module."""
        Strategy.load_model_state_dict(self, *args, **kwargs)
