"""editkit: keep a large language model up to date, one correction after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editkit.edits import Edit, Probe

if TYPE_CHECKING:
    from editkit.api import EditedLM, load, load_edited
    from editkit.composition import compose

__version__ = "0.1.0"
__all__ = ["Edit", "EditedLM", "Probe", "__version__", "compose", "load", "load_edited"]


def __getattr__(name: str) -> object:
    """Load the Python door only when it is asked for, so that `import editkit` stays light."""
    if name in {"EditedLM", "load", "load_edited"}:
        from editkit import api

        return getattr(api, name)
    if name == "compose":
        from editkit.composition import compose

        return compose
    raise AttributeError(f"module 'editkit' has no attribute {name!r}")
