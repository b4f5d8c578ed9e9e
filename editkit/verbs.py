"""The verbs beside Lightning's own: inspect, generate, export. Heavy imports wait for the call."""

from __future__ import annotations

from pathlib import Path


def inspect(model: str, role: str | None = None, trust_remote_code: bool = False) -> None:
    """List the editable sites of a model and propose layers.

    Args:
        model: Hub id, local folder, or `factworld`.
        role: Show only sites of this role, such as `mlp.down`.
        trust_remote_code: Run model code that comes from the Hub.
    """
    from rich.console import Console
    from rich.table import Table

    from editkit.lm.editable import EditableLM
    from editkit.lm.spec import LMSpec

    lm = EditableLM.load(LMSpec(id=model, trust_remote_code=trust_remote_code))
    roles = sorted({site.role for site in lm.sites})
    if role is not None and role not in roles:
        raise ValueError(f"no site of role {role!r} in {model!r}; it has {', '.join(roles)}")
    count = sum(p.numel() for p in lm.model.parameters())
    table = Table(title=f"{model}: {type(lm.model).__name__}, {count / 1e6:,.1f} M parameters")
    for name in ("layer", "role", "site", "out x in"):
        table.add_column(name, no_wrap=True, justify="right" if name == "out x in" else "left")
    for site in lm.sites:
        if role in (None, site.role):
            shape = f"{site.out_features} x {site.in_features}"
            table.add_row(str(site.layer), site.role, site.path, shape)
    console = Console()
    console.print(table)
    policy = lm.policy
    console.print(
        f"blocks: {len(lm.blocks)}; proposed causal_layers: {lm.causal_layers}, "
        f"memory_layer: {lm.memory_layer}\n"
        f"tokenizer: {len(lm.tokenizer)} tokens, adds BOS: {policy.adds_bos}, "
        f"adds EOS: {policy.adds_eos}, chat template: {bool(lm.tokenizer.chat_template)}",
        highlight=False,
    )


def generate(
    run: Path, prompt: str, max_new_tokens: int = 50, base: bool = False, trust: bool = False
) -> None:
    """Answer a prompt with an edited model.

    Args:
        run: Run folder.
        prompt: Text to continue.
        max_new_tokens: Budget of the answer.
        base: Answer with the unedited model beside it.
        trust: Allow a method class from outside editkit.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from editkit.api import load_edited

    lm = load_edited(run, trust=trust)
    table = Table("prompt", "edited")
    row = [prompt, lm.generate(prompt, max_new_tokens)]
    if base:
        table.add_column("unedited")
        with lm.unedited():
            row.append(lm.generate(prompt, max_new_tokens))
    table.add_row(*map(Text, row))
    Console().print(table)


def export(run: Path, out: Path, trust: bool = False) -> None:
    """Write an edited model as a plain Hugging Face folder.

    Args:
        run: Run folder.
        out: Folder to write; must be new or empty.
        trust: Allow a method class from outside editkit.
    """
    from rich.console import Console

    from editkit.api import load_edited

    load_edited(run, trust=trust).export(out)
    Console().print(f"saved {out}; its logits equal the edited model's", highlight=False)
