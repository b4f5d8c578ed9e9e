"""What the numbers of a report mean, one plain sentence each."""

from __future__ import annotations

LOWER_IS_BETTER = frozenset({"nll", "perplexity"})
STRICTEST_FIRST = (
    "generation", "judge", "sequence_accuracy", "choice_norm", "choice", "pair", "token_accuracy",
    "nll",
)  # fmt: skip
HITS = frozenset(
    {"first_token", "generation", "judge", "sequence_accuracy", "choice", "choice_norm", "pair"}
)  # of several wordings of one question any may be the right one
HAS_NO_RIGHT_ANSWER = frozenset({"nll", "perplexity", "pair_diff", "fluency", "consistency"})

KINDS = {
    "reliability": "the edited prompt itself: is the new answer given?",
    "generalization": "other wordings of the edited prompt, never trained on: is the new answer "
    "given?",
    "portability": "what follows from the edit, such as a question through it: is the answer that "
    "now follows given?",
    "locality": "what the edit should leave alone: is the answer still the unedited model's?",
    "locality_gold": "the same questions as locality, judged against the true answer instead",
    "intrinsic": "facts that were never edited and that the unedited model knows",
}
SCORERS = {
    "generation": "1 where the model, answering freely, gives exactly the expected answer (up to "
    "case, articles and punctuation), else 0",
    "sequence_accuracy": "1 where every token of the expected answer is the most likely one while "
    "the answer is forced on the model, else 0; kinder than free answers",
    "token_accuracy": "share of the expected answer's tokens that are the most likely ones under "
    "forcing; the kindest, and what many papers report",
    "first_token": "1 where the first token of the expected answer is the most likely one, else 0",
    "nll": "mean negative log-likelihood of the expected answer in nats per token; lower is better",
    "perplexity": "exponential of that; lower is better",
    "pair": "1 where the expected answer is likelier, token by token, than its rival: the old "
    "answer where it is the new one",
    "pair_diff": "how much likelier: the difference of the two probabilities per token",
    "choice": "1 where the expected answer is the likeliest of the choices, as a whole",
    "choice_norm": "1 where it is the likeliest of the choices, per token",
    "ood": "share of all tokens of prompt and expected answer that the model gives more than 0.8",
    "ood_instance": "1 where the mean probability of the expected answer's tokens is above 0.8",
    "judge": "1 where a judge finds the free answer right, else 0",
    "fluency": "entropy of the n-grams of longer texts, in bits; low where a model repeats itself",
    "consistency": "likeness of longer texts to reference texts, from 0 to 1",
}
MOMENTS = {
    "before": "the unedited model",
    "right after": "each edit's probes right after that edit",
    "final": "all probes after the whole stream",
}
TUNED_FATES = {
    "erased_true": "say the old answer",
    "erased_other": "say something else",
    "erased_empty": "say nothing",
}
FATES = {
    "forgotten": "right just after its own edit, wrong at the end",
    "never right": "wrong just after its own edit, and at the end",
    "changed later": "kept by its own edit, changed by a later one",
    "changed at once": "changed by its own edit",
    "": "not asked right after its edit",
}


def number(value: float | None, signed: bool = False) -> str:
    """Return a number with about three figures, a dash for None."""
    if value is None or value != value:
        return "-"
    size = abs(value)
    digits = 3 if size < 10 else 2 if size < 100 else 1
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if size >= 1e5:
        text = f"{value:+.2e}" if signed else f"{value:.2e}"
    elif size >= 1000:
        text = f"{value:+,.0f}" if signed else f"{value:,.0f}"
    elif 0 < size < 0.0005:
        text = f"{value:+.1e}" if signed else f"{value:.1e}"
    return text


def chance(p: float | None) -> str:
    """Return a p-value in three decimals, `< 0.001` below that."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def size(count: float | None) -> str:
    """Return a number of bytes in a unit that reads well."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
