"""The Python door: load a model, edit it, ask it, undo, save. No Trainer needed."""

from __future__ import annotations

import importlib
import inspect
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, overload

import torch

from editkit.adapters.io import read_lines, write_lines
from editkit.data.conflicts import ConflictIndex
from editkit.edits import Edit, Probe, check_ids, next_id
from editkit.export import export_model, export_peft
from editkit.lm.load import pick_device, resolve_dtype
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method, load_edits, save_edits
from editkit.methods.base import EditModule
from editkit.metrics.protocol import EvalProtocol


class EditedLM:
    """A language model that takes corrections one after another.

    Args:
        method: The method that writes them; `editkit.load` makes it.
    """

    def __init__(self, method: EditModule) -> None:
        method.configure_model()
        self.method = method
        self._made = ConflictIndex()
        self._made_count = 0

    @property
    def lm(self) -> Any:
        """The `EditableLM` inside: encode, forward, generate on tensors."""
        return self.method.lm

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """Every applied edit, in order: text, losses, norm of its change."""
        return self.method.ledger

    @property
    def edits(self) -> list[dict[str, Any]]:
        """The edits that stand: entries of the ledger."""
        return self.method.standing()

    def edit(
        self,
        prompt: str,
        target: str,
        subject: str | None = None,
        rephrases: tuple[str, ...] = (),
        negatives: tuple[str, ...] = (),
    ) -> dict[str, float]:
        """Make `prompt` continue with `target`.

        Args:
            prompt: Text up to the answer.
            target: The answer.
            subject: Entity the fact is about; locate-then-edit methods need it.
            rephrases: Other wordings the method may train on.
            negatives: Unrelated texts the method may see.

        Returns:
            The numbers of this edit, such as `loss_before` and `loss_after`.
        """
        edit_id = next_id(self.ledger, self.method.edits_seen)
        edit = Edit(edit_id, prompt, target.strip(), subject, tuple(negatives), tuple(rephrases))
        return self.edit_batch([edit])

    def edit_batch(self, edits: list[Edit]) -> dict[str, float]:
        """Write several edits at once, as one step of the method.

        An edit that repeats, contradicts or nearly repeats an earlier one is made all the same; a
        warning names the earlier one.

        Raises:
            ValueError: If a text is empty, a subject is not in its prompt or an id is taken.
        """
        check_ids(edits, self.ledger, self.method.edits_seen)
        for edit in edits:
            if not edit.prompt.strip() or not edit.target.strip():
                raise ValueError(f"edit {edit.id} needs a prompt and a target, got {edit!r}")
            if edit.subject is not None and edit.subject not in edit.prompt:
                raise ValueError(
                    f"subject {edit.subject!r} not found in prompt {edit.prompt!r} (edit {edit.id})"
                )
        self._warn_of_conflicts(edits)
        return self.method.apply_edits(edits)

    def _warn_of_conflicts(self, edits: list[Edit]) -> None:
        """Warn of edits at odds with the ledger or with each other."""
        if self._made_count != len(self.ledger):  # loaded, an edit failed, or one was undone
            self._made = ConflictIndex()
            for e in self.edits:
                self._made.add(Edit(e["edit_id"], e["prompt"], e["target"], e["subject"]))
        for edit in edits:
            if (conflict := self._made.find(edit)) is not None:
                warnings.warn(str(conflict), stacklevel=4)
            self._made.add(edit)
        self._made_count = len(self.ledger) + len(edits)

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = ..., stop: tuple[str, ...] = ...
    ) -> str: ...
    @overload
    def generate(
        self, prompt: list[str], max_new_tokens: int = ..., stop: tuple[str, ...] = ...
    ) -> list[str]: ...
    def generate(
        self, prompt: str | list[str], max_new_tokens: int = 50, stop: tuple[str, ...] = ("\n",)
    ) -> str | list[str]:
        """Answer one prompt or several, greedily, up to EOS or the first stop string."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        answers: list[str] = self.lm.generate(prompts, max_new_tokens, stop)
        for mark in stop:
            answers = [answer.split(mark)[0] for answer in answers]
        return answers[0] if isinstance(prompt, str) else answers

    def score(self, probes: list[Probe]) -> list[dict[str, Any]]:
        """Score probes as a run does; one row per probe and kind."""
        return self.method.score(probes)

    def unedited(self) -> AbstractContextManager[None]:
        """Be the base model inside the context, bit for bit."""
        context: AbstractContextManager[None] = self.lm.unedited()
        return context

    def undo(self, edit_id: int) -> None:
        """Take one edit out exactly.

        Raises:
            UndoError: If the method cannot; the text says why.
        """
        self.method.undo_edit(edit_id)
        self._made_count = -1

    def save(self, folder: str | Path) -> None:
        """Write the edits and the ledger; `editkit.load_edited` brings them back."""
        folder = Path(folder)
        save_edits(folder, self.method)
        write_lines(folder / "edits.jsonl", self.ledger)

    def export(self, folder: str | Path, form: Literal["model", "peft"] = "model") -> None:
        """Write a plain Hugging Face folder with the edits merged in, or a PEFT adapter of them.

        A ValueError says why a layer cannot be merged, or is of no low rank.
        """
        write = {"model": export_model, "peft": export_peft}
        if form not in write:
            raise ValueError(f"form is {form!r}; use model or peft")
        write[form](self.lm, Path(folder))


def load(
    model: str = "factworld",
    method: str | type[EditModule] = "ft",
    device: str | None = "cpu",
    dtype: str = "float32",
    lm: LMSpec | None = None,
    **arguments: Any,
) -> EditedLM:
    """Load a model to edit.

    Args:
        model: Hub id, local folder, or `factworld`.
        method: File name in `editkit.methods` such as `ft`, a class path, or a class.
        device: Such as `cpu` or `cuda`; None takes the GPU where there is one.
        dtype: Dtype of the base weights; edits are fp32 whatever it is.
        lm: A whole spec instead of `model` and `dtype`.
        arguments: Constructor arguments of the method.

    Raises:
        ValueError: If the model or the method is not there; the text names the fix.
    """
    spec = lm or LMSpec(id=model, dtype=dtype)
    resolve_dtype(spec.dtype, torch.float32)
    place, path = pick_device(device), method_path(method)
    module = build_method(path, lm=spec, evaluation=EvalProtocol(), **arguments)
    module.configure_model()
    return EditedLM(module.to(place))


def load_edited(
    folder: str | Path,
    device: str | None = "cpu",
    dtype: str | None = None,
    lm: LMSpec | None = None,
    trust: bool = False,
) -> EditedLM:
    """Load an edited model from a run folder, onto the base it was edited on.

    Args:
        folder: A run folder, or what `EditedLM.save` wrote.
        device: Such as `cpu` or `cuda`; None takes the GPU where there is one.
        dtype: Dtype of the base weights; None takes that on which the edits were made.
        lm: Where the base lies now, if elsewhere than recorded; its weights must be the same.
        trust: Allow a method class from outside `editkit.methods`: that runs its code.

    Raises:
        ValueError: If the artefact is damaged, from another base, or not trusted.
    """
    folder = Path(folder)
    resolve_dtype(dtype, torch.float32)
    method = load_edits(folder, lm, dtype, pick_device(device), trust)
    ledger = folder / "edits.jsonl"
    if ledger.is_file():
        method.ledger = read_lines(ledger)
    return EditedLM(method)


def method_path(method: str | type[EditModule]) -> str:
    """Return the class path of a method given by file name, class path, or class.

    Raises:
        ValueError: If a bare name is no file of `editkit.methods`.
    """
    if not isinstance(method, str):
        return f"{method.__module__}.{method.__qualname__}"
    if "." in method:
        return method
    try:
        module = importlib.import_module(f"editkit.methods.{method.lower()}")
    except ModuleNotFoundError:
        folder = Path(__file__).parent / "methods"
        names = sorted(f.stem for f in folder.glob("*.py") if _class_of(f.stem))
        raise ValueError(f"no method {method!r}; there are {', '.join(names)}") from None
    name = _class_of(module.__name__.rpartition(".")[2])
    if name is None:
        raise ValueError(f"editkit.methods.{method} holds no method; give a class path")
    return f"{module.__name__}.{name}"


def _class_of(stem: str) -> str | None:
    """Return the name of the method class that a file of `editkit.methods` is called after."""
    if stem == "composed":  # makes no edits
        return None
    for name, cls in vars(importlib.import_module(f"editkit.methods.{stem}")).items():
        is_called_so = name.lower() == stem.replace("_", "")
        if is_called_so and inspect.isclass(cls) and issubclass(cls, EditModule):
            return name
    return None
