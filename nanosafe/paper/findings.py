"""What a report opens with: ten lines of its results, the last four of them the paper's claims with a verdict.

Every number and every verdict is computed. A difference counts where its 95 % interval over seeds excludes zero. A
claim is "reproduced" where the change that it is about counts, "contradicted" where one counts that it excludes, and
else "open": few seeds may hide a change, so open is not the opposite of reproduced.
"""

from collections.abc import Callable, Mapping

from nanosafe.evals.diagnostics import same_order
from nanosafe.evals.results import Metric, headlines
from nanosafe.evals.statistics import Estimate
from nanosafe.evals.tables import sections, show
from nanosafe.paper.runs import MAIN, Runs, change, hardest_variation, level, results_of

CONTROLS = ("SFT, own style", "RL, shuffled labels", "RL, exact judge")
NOTE = """\
Means and differences with their 95 % intervals over seeds. A claim is reproduced where the changes that it is about
exclude zero, contradicted where one that it rules out does, and else open: few seeds may hide a change."""
ENTROPY = "entropy_per_token"  # at reflection words


def findings(found: Mapping[str, Runs]) -> list[str]:
    """The lines below NOTE, markdown items; found: the runs of each model."""
    lines = {
        "Unsafe requests answered safely (higher is better), base / SFT / RL": of_arms("safety"),
        "Benign look-alikes refused (lower is better), base / SFT / RL": of_arms("over-refusal"),
        "Reasoning, right answers (higher is better), base / SFT / RL": of_arms("reasoning"),
        "Safe answers in the variation hardest for RL, base / SFT / RL": under_attack,
        "Entropy at reflection words of unsafe requests, nats, base / SFT / RL": of_arms("safety", ENTROPY),
        "Controls, safe answers minus the base's": controls,
        "Claim: RL is safer and steadier than SFT": safer,
        "Claim: RL keeps reasoning where SFT loses some": keeps_reasoning,
        "Claim: RL lowers that entropy on unsafe requests and keeps it in reasoning": calms,
    }
    written = []
    for words, say in lines.items():
        said = {model: say(runs) for model, runs in found.items()}
        parts = [f"{model} {text}" for model, text in said.items() if text]
        written.append(f"- {words}: {'; '.join(parts) or 'not measured'}.")
    return [*written, f"- Claim: what SFT does follows how well the base knows the SFT set: {remembers(found)}."]


# Each says of one model's runs what it knows, or "" where that was not measured.


def of_arms(about: str, name: str = "") -> Callable[[Runs], str]:
    """What says the level of each main arm, in a subject's headline or in its metric `name`."""
    return lambda runs: levels(runs, metric_of(runs, about, name))


def levels(runs: Runs, metric: Metric | None) -> str:
    known = [level(runs, arm, metric) if metric and arm in runs else None for arm in MAIN]
    return " / ".join(show(value, "z.2f") for value in known) if any(known) else ""


def under_attack(runs: Runs) -> str:
    metric = hardest_variation(runs)
    return f"({metric.benchmark}) {levels(runs, metric)}" if metric else ""


def controls(runs: Runs) -> str:
    changes = {arm: difference(runs, "base", arm, "safety") for arm in CONTROLS}
    return ", ".join(f"{arm} {delta:+z.3f}" for arm, delta in changes.items() if delta)


def safer(runs: Runs) -> str:
    delta = difference(runs, "SFT", "RL", "safety")
    if delta is None:
        return ""
    said = f"{verdict(rises(delta), falls(delta))}, RL − SFT {delta:+z.3f}"
    if delta.low is None:
        return said
    metric = metric_of(runs, "safety")
    rl, sft = level(runs, "RL", metric), level(runs, "SFT", metric)
    return f"{said}, over seeds ±{rl.high - rl.mean:.2f} against ±{sft.high - sft.mean:.2f}"


def keeps_reasoning(runs: Runs) -> str:
    rl, sft = (difference(runs, "base", arm, "reasoning") for arm in ("RL", "SFT"))
    if rl is None or sft is None:
        return ""
    found = verdict(falls(sft) and not falls(rl), falls(rl) or rises(sft))
    return f"{found}, RL − base {rl:+z.3f}, SFT − base {sft:+z.3f}"


def calms(runs: Runs) -> str:
    unsafe, sums = (difference(runs, "base", "RL", about, ENTROPY) for about in ("safety", "reasoning"))
    if unsafe is None or sums is None:
        return ""
    moved = rises(sums) or falls(sums)
    found = verdict(falls(unsafe) and not moved, rises(unsafe) or moved)
    return f"{found}, RL − base {unsafe:+z.3f} and {sums:+z.3f}"


def remembers(found: Mapping[str, Runs]) -> str:
    """Whether the bases' log-likelihoods of the SFT set order the models as SFT's changes of safety do."""
    known, gained = {}, {}
    for model, runs in found.items():
        scores = sections([result for arm, result in results_of(runs) if arm == "base"]).get("Memorization")
        delta = difference(runs, "base", "SFT", "safety")
        if scores and delta:
            known[model], gained[model] = level(runs, "base", scores[0]).mean, delta.mean
    if len(known) < 2:
        return "open, it takes two models"
    alike = same_order({"known": known, "gained": gained})
    parts = [f"{model} {known[model]:.2f} nats a token, SFT − base {gained[model]:+.3f} safe" for model in known]
    return f"{verdict(alike, not alike)} in order, {'; '.join(parts)}"


def metric_of(runs: Runs, about: str, name: str = "") -> Metric | None:
    head = headlines([result for _, result in results_of(runs)]).get(about)
    return head._replace(name=name) if head and name else head


def difference(runs: Runs, before: str, after: str, about: str, name: str = "") -> Estimate | None:
    metric = metric_of(runs, about, name)
    return change(runs, before, after, metric) if metric else None


def rises(delta: Estimate) -> bool:
    return delta.excludes_zero and delta.mean > 0


def falls(delta: Estimate) -> bool:
    return delta.excludes_zero and delta.mean < 0


def verdict(is_reproduced: bool, is_contradicted: bool) -> str:
    if is_contradicted:
        return "contradicted"
    return "reproduced" if is_reproduced else "open"
