"""The verbs beside Lightning's own. Heavy imports wait for the call."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

NO_LAYERS = "no MLP brings anything back at the subject's last token: no causal_layers to propose"


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
    run: Path, prompt: str, max_new_tokens: int = 50, base: bool = False,
    device: str | None = None, trust: bool = False,
) -> None:  # fmt: skip
    """Answer a prompt with an edited model.

    Args:
        run: Run folder.
        prompt: Text to continue.
        max_new_tokens: Budget of the answer.
        base: Answer with the unedited model beside it.
        device: Such as `cpu` or `cuda`; none takes the GPU where there is one.
        trust: Allow a method class from outside editkit.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from editkit.api import load_edited

    lm = load_edited(run, device, trust=trust)
    table = Table("prompt", "edited")
    row = [prompt, lm.generate(prompt, max_new_tokens)]
    if base:
        table.add_column("unedited")
        with lm.unedited():
            row.append(lm.generate(prompt, max_new_tokens))
    table.add_row(*map(Text, row))
    Console().print(table)


def export(
    run: Path, out: Path, form: Literal["model", "peft"] = "model",
    device: str | None = None, trust: bool = False,
) -> None:  # fmt: skip
    """Write an edited model as a plain Hugging Face folder, or its edits as a PEFT adapter.

    Args:
        run: Run folder.
        out: Folder to write; must be new or empty.
        form: `model` for whole weights, `peft` for a LoRA adapter that PEFT loads on the base.
        device: Such as `cpu` or `cuda`; none takes the GPU where there is one.
        trust: Allow a method class from outside editkit.
    """
    from rich.console import Console

    from editkit.api import load_edited

    load_edited(run, device, trust=trust).export(out, form)
    Console().print(f"saved {out}; its logits equal the edited model's", highlight=False)


def report(
    runs: list[Path],
    out: Path | None = None,
    tables: Path | None = None,
    allow_mixed: bool = False,
) -> None:
    """Draw runs side by side in one HTML file, readable offline, and compare them probe by probe.

    Args:
        runs: Run folders, one after another; the first is the reference of the comparisons.
        out: File to write; none writes `report.html` into the first run's folder.
        tables: Folder for the same tables as CSV and markdown.
        allow_mixed: Also put runs side by side that were not measured alike.
    """
    from rich.console import Console

    from editkit.report.page import write_report

    path = write_report([Path(run) for run in runs], out, allow_mixed, tables)
    console = Console()
    console.print(f"saved {path}", highlight=False, soft_wrap=True)
    if tables is not None:
        console.print(f"saved the tables in {tables}", highlight=False, soft_wrap=True)


def trace(
    model: str,
    prompts: Path | None = None,
    prompt: str = "",
    subject: str = "",
    target: str = "",
    limit: int = 100,
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    seed: int = 0,
    out: Path = Path("runs/trace"),
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Show which layers and tokens carry facts to the answer, and propose layers to edit.

    Args:
        model: Hub id, local folder, or `factworld`, which brings facts of its own.
        prompts: File of facts, JSON with `prompt`, `subject` and `target`; without `target` what
            the model says is traced.
        prompt: One fact instead of a file: text up to the answer.
        subject: What the fact is about, a part of the prompt.
        target: The answer; none traces what the model says.
        limit: Facts at most, drawn by the seed.
        noise: Noise on the subject, in standard deviations of the subjects' embeddings.
        samples: Noise samples of each fact.
        window: Layers whose MLP or attention outputs are put back together; none takes 1 in models
            of up to 12 layers, else 10.
        seed: Seed of noise and facts.
        out: Folder for the heat map and the numbers.
        device: Such as `cpu` or `cuda`; none takes the GPU where there is one.
        dtype: Dtype of the weights such as `bfloat16`; none takes float32.
        trust_remote_code: Run model code that comes from the Hub.
    """
    from rich.console import Console

    from editkit.data.facts import facts_to_trace
    from editkit.lm.editable import EditableLM
    from editkit.lm.load import pick_device
    from editkit.lm.restoring import TraceSettings
    from editkit.lm.spec import LMSpec
    from editkit.lm.tracing import trace_facts
    from editkit.report.heatmap import trace_table, write_trace

    settings, place = TraceSettings(noise, samples, window, seed), pick_device(device)
    spec = LMSpec(id=model, dtype=dtype, trust_remote_code=trust_remote_code)
    facts = facts_to_trace(Path(spec.path), prompts, (prompt, subject, target), limit, seed)
    lm = EditableLM.load(spec).to(place)
    found = trace_facts(lm, facts, settings)
    about = {"model": model, "prompts": prompts and str(prompts), "noise": noise, "seed": seed}
    about |= {"samples": samples, "window": settings.width(len(lm.blocks))}
    write_trace(out, found, about)
    console = Console()
    console.print(trace_table(found))
    skipped = f"; {found.skipped} facts left out, the model says otherwise" if found.skipped else ""
    console.print(f"saved {out}{skipped}", highlight=False, soft_wrap=True)
    proposal = f"causal_layers: {found.causal_layers}"
    console.print(proposal if found.causal_layers else NO_LAYERS, highlight=False)


def lm_eval(
    model: str,
    tasks: str = "",
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    out: Path | None = None,
    trust: bool = False,
) -> None:
    """Measure general ability by lm-evaluation-harness, unedited and edited side by side.

    Args:
        model: Run folder; or the Hub id or folder of a model without edits, which is measured once.
        tasks: Tasks, groups, tags or patterns such as `mmlu_*`, or task YAMLs, with commas between.
        include_path: Folder of your own task YAMLs.
        limit: Questions per task; none asks all.
        num_fewshot: Examples in front of each question; none takes the task's own number.
        batch_size: Rows per forward pass.
        device: Such as `cpu` or `cuda`; none takes the GPU where there is one.
        out: JSON to write; none writes `lm_eval.json` into a run folder.
        trust: Allow a method class from outside editkit.
    """
    from rich.console import Console

    from editkit.harness.compare import about_model, find_tasks, load_model, measure_tasks
    from editkit.harness.scores import save_scores, score_table

    named = [name.strip() for name in tasks.split(",") if name.strip()]
    names, manager = find_tasks(named, include_path)  # told before a large model is loaded
    lm, run = load_model(model, device, trust)
    found = measure_tasks(lm, names, None, limit, num_fewshot, batch_size, manager)
    out = out or (run and run / "lm_eval.json")
    if out:
        save_scores(out, found, about_model(lm, run))
    console = Console()
    console.print(score_table(found))
    if out:
        console.print(f"saved {out}", highlight=False)


def study(
    path: Path, out: Path | None = None, jobs: int = 1, only: str = "", dry_run: bool = False
) -> None:
    """Run a grid of methods, objectives, remedies and seeds; one table and one page of all.

    Runs that are done are not run again, so a killed study goes on where it was.

    Args:
        path: YAML of the study, such as experiments/studies/factworld.yaml.
        out: Folder for its runs, table and page; none takes runs/studies/NAME.
        jobs: Runs at once.
        only: Run only what has this in its name, such as `memit-`; edited models come along.
        dry_run: List the runs and do nothing.
    """
    from editkit.study.verb import run_study

    run_study(Path(path), out, jobs, only, dry_run)
