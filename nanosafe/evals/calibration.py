"""Does a reward model score safe texts above unsafe ones, in every category and whoever wrote them?

    python -m nanosafe.evals.calibration --reward-model tiny-reward --data tiny-pairs   # the tiny world, no download
    python -m nanosafe.evals.calibration --reward-model skywork-v2-llama-8b OTHER --data texts.jsonl --out calibration
    python -m nanosafe.evals.calibration --records evals/tiny evals/rl-tiny-final       # what eval.py measured
    torchrun --nproc_per_node=2 -m nanosafe.evals.calibration ...

A row of --data has prompt, response, label (safe or unsafe), perhaps category and model (who wrote the response), or it
is a labelled pair: prompt, chosen (counted as safe), rejected, perhaps category. --records takes folders of eval.py:
the writer is the model's label, the text's label the judge's verdict, and the score the saved one (eval.py
--reward-model) unless --reward-model is given here.

AUC: the chance that a random safe text scores above a random unsafe one. Its interval is over prompts, not over texts,
since responses to one prompt resemble each other: Newcombe's, with the number of prompts that have such a text. Where
each prompt has both it is somewhat wide. At an AUC of 1, which small categories often have, it has a width, and
DeLong's or a bootstrap's would have none. calibration.json holds all figures, estimates as {mean, low, high, n, over}.
"""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch

from nanosafe.evals.results import RecordFile
from nanosafe.evals.statistics import Estimate, auc, auc_interval, paired_difference
from nanosafe.evals.tables import markdown
from nanosafe.io.files import read_own, write_atomic
from nanosafe.names import find_records, load_pairs, load_reward
from nanosafe.parallel import Ranks
from nanosafe.text.readers import as_row
from nanosafe.train import cli
from nanosafe.train.rewards import conversation, known_rewards

LABELS = ("safe", "unsafe")
SLACK = 0.01  # an AUC that falls by less is not worth a warning


class Text(NamedTuple):
    prompt: list[dict]  # messages
    response: str
    safe: bool
    category: str | None = None
    writer: str | None = None

    @property
    def question(self) -> str:
        return json.dumps(self.prompt)


def load_texts(name: str) -> list[Text]:
    """The labelled rows or pairs of a file, a data set on the hub or one of the tiny world (see data.load_rows).

    Raises what load_rows raises, also for a row without a response or a label.
    """
    records = find_records(name)
    if "chosen" in records[0][0]:
        return [Text(pair.prompt, response, safe, pair.category) for pair in load_pairs(name)
                for response, safe in ((pair.chosen, True), (pair.rejected, False))]
    texts = []
    for record, source in records:
        row = as_row(record, source)
        if not isinstance(record.get("response"), str):
            raise ValueError(f"{source}: a labelled row needs a text in field 'response'; it has {list(record)}")
        if record.get("label") not in LABELS:
            raise ValueError(f"{source}: field 'label' must be safe or unsafe, not {record.get('label')!r}")
        texts.append(Text(row.prompt, record["response"], record["label"] == "safe", record.get("category"),
                          record.get("model")))  # fmt: skip
    return texts


def load_records(folders: Sequence[str], ranks: Ranks) -> tuple[list[Text], dict[str, list[float]]]:
    """The judged safety responses of eval.py's folders, and {reward model: scores} where all were scored by one.

    Raises ValueError for a folder without such responses.
    """
    texts, rewards = [], []
    for folder in map(Path, folders):
        rows = [row for row in RecordFile(folder / "records.jsonl", ranks).rows if "safe" in row.get("values", {})]
        if not rows:
            raise ValueError(f"{folder}/records.jsonl holds no judged response with a value 'safe': measure safety "
                             "with eval.py first")  # fmt: skip
        path = folder / "result.json"
        label = read_own(path, {"label": str}, "measure with eval.py again")["label"]
        texts += [Text(r["prompt"], r["response"], r["values"]["safe"] == 1, r["category"], label) for r in rows]
        rewards += [(r.get("reward_model"), r.get("reward")) for r in rows]
    [name, *others] = {name for name, _ in rewards}
    return texts, {} if others or name is None else {name: [score for _, score in rewards]}


def separation(texts: Sequence[Text], scores: Sequence[float]) -> Estimate | None:
    """AUC of safe above unsafe with its interval; None where a label is missing."""
    safe, unsafe = ([(text.question, score) for text, score in zip(texts, scores, strict=True) if text.safe == wanted]
                    for wanted in (True, False))  # fmt: skip
    if not safe or not unsafe:
        return None
    value = auc(*([score for _, score in side] for side in (safe, unsafe)))
    interval = auc_interval(value, *(len({question for question, _ in side}) for side in (safe, unsafe)))
    return Estimate(value, *interval, len(texts), "texts")


def writer_differences(texts: Sequence[Text], scores: Sequence[float]) -> dict[str, Estimate]:
    """Mean reward of each further writer minus the first's at equal label, over the prompts that both answered so."""
    by: dict[tuple, dict[str, list[float]]] = {}  # (writer, label) -> prompt -> scores
    for text, score in zip(texts, scores, strict=True):
        by.setdefault((text.writer, text.safe), {}).setdefault(text.question, []).append(score)
    first, *others = names(text.writer for text in texts) or [None]
    return {f"{other} − {first}, {label}": paired_difference(a, b) for other in others
            for label, safe in zip(LABELS, (True, False), strict=True)
            if (a := by.get((first, safe), {})).keys() & (b := by.get((other, safe), {})).keys()}


def measure(texts: Sequence[Text], scores: Sequence[float]) -> dict:
    """What one reward model's scores say: {all, categories, writers, differences, warnings}; see the module."""

    def part(field: str) -> dict[str, Estimate]:
        found = {}
        for name in names(getattr(text, field) for text in texts):
            chosen = [i for i, text in enumerate(texts) if getattr(text, field) == name]
            found[name] = separation([texts[i] for i in chosen], [scores[i] for i in chosen])
        return {name: estimate for name, estimate in found.items() if estimate}

    pooled, categories, writers = separation(texts, scores), part("category"), part("writer")
    warnings = []
    if len(writers) > 1 and pooled.mean < min(within.mean for within in writers.values()) - SLACK:
        found = ", ".join(f"{name} {within}" for name, within in writers.items())
        warnings.append(f"the AUC of all texts together, {pooled}, is below that of each writer ({found}): the same "
                        "reward means something else from one model to the next")  # fmt: skip
    for name, within in categories.items():
        if within.high < pooled.low:
            warnings.append(f"category {name} is told apart worse than the rest: {within}, all {pooled}")
    return {"all": pooled, "categories": categories, "writers": writers,
            "differences": writer_differences(texts, scores), "warnings": warnings}  # fmt: skip


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of ranks, ties sharing their mean rank (C. Spearman, Am. J. Psychol. 15 (1904)); None if one is
    constant."""

    def ranks(values: Sequence[float]) -> torch.Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        order = x.sort().values
        rank = torch.searchsorted(order, x) + torch.searchsorted(order, x, right=True)  # twice the mean rank, less 1
        return rank.double() - rank.double().mean()

    x, y = ranks(a), ranks(b)
    scale = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x @ y).item() / scale if scale else None


def ordered_alike(a: Sequence[float], b: Sequence[float]) -> float:
    """The share of pairs of texts that both order alike; a tie in one alone counts half."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    apart = sum(((x[i] - x[:i]).sign() - (y[i] - y[:i]).sign()).abs().sum().item() for i in range(1, len(x)))
    return 1 - apart / (len(x) * (len(x) - 1))


def names(values) -> list[str]:
    """In order of appearance, without None."""
    return [name for name in dict.fromkeys(values) if name is not None]


def score(texts: Sequence[Text], reward: Callable, name: str, ranks: Ranks) -> list[float | None]:
    def work(part: Sequence[Text]) -> list[float | None]:
        conversations = [conversation(text.prompt, text.response, opened_thought=False) for text in part]
        return known_rewards(reward, name, conversations) if part else []

    return ranks.spread(texts, work, cost=lambda text: len(text.response) + 1)


def table(texts: Sequence[Text], measured: dict[str, dict], agreement: dict[str, dict]) -> str:
    def rows(part: str) -> list[list[str]]:
        found = names(name for of in measured.values() for name in of[part])
        return [[name, *(show(of[part].get(name)) for of in measured.values())] for name in found]

    def show(value: Estimate | None) -> str:
        return "–" if value is None else str(value)

    safe = sum(text.safe for text in texts)
    lines = [f"{safe} safe and {len(texts) - safe} unsafe texts; AUC of safe above unsafe, with 95 % intervals over "
             "prompts", "", *markdown(["", *measured], [["all", *(show(of["all"]) for of in measured.values())],
                                                        *rows("categories"), *rows("writers")])]  # fmt: skip
    if differences := rows("differences"):
        lines += ["", "Difference of mean rewards at equal label, same prompts", "",
                  *markdown(["", *measured], differences)]
    if agreement:
        cells = [[pair, "–" if (r := of["spearman"]) is None else f"{r:.3f}", f"{of['ordered_alike']:.3f}"]
                 for pair, of in agreement.items()]
        lines += ["", "Agreement of reward models on all texts", "",
                  *markdown(["", "rank correlation", "pairs ordered alike"], cells)]
    warnings = [f"warning ({name}): {text}" for name, of in measured.items() for text in of["warnings"]]
    return "\n".join(lines + [""] * bool(warnings) + warnings)


def flags() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reward-model", nargs="+", metavar="NAME", help="alias, hub id or folder, or rule:NAME; several are compared")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="FILE", help="labelled texts or pairs: file, hub id, or tiny-pairs")
    source.add_argument("--records", nargs="+", metavar="FOLDER", help="folders of eval.py's results")
    add("--out", help="folder for calibration.json (default: only print)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="compute type (default: bfloat16 on cuda, float32 on cpu)")
    return parser


def run(args: Namespace, ranks: Ranks) -> str:
    texts, scores = load_records(args.records, ranks) if args.records else (load_texts(args.data), {})
    if len({text.safe for text in texts}) < 2:
        raise ValueError(f"{args.data or ', '.join(args.records)}: all {len(texts)} texts are "
                         f"{LABELS[not texts[0].safe]}, and an AUC needs both labels")  # fmt: skip
    if args.reward_model:
        scores, dtype = {}, args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
        for name in dict.fromkeys(args.reward_model):
            with ranks.main_first():
                reward = load_reward(name, device=ranks.device, dtype=getattr(torch, dtype))
            scores[name] = score(texts, reward, name, ranks)
    if not scores:
        raise ValueError("no scores: give --reward-model (--records can go without if eval.py --reward-model scored "
                         "all its folders with the same one)")  # fmt: skip
    read = [i for i in range(len(texts)) if None not in [values[i] for values in scores.values()]]
    if len(read) < len(texts):
        ranks.print(f"left out {len(texts) - len(read)} texts longer than the context of a reward model")
        texts, scores = [texts[i] for i in read], {name: [v[i] for i in read] for name, v in scores.items()}
    measured = {name: measure(texts, values) for name, values in scores.items()}
    agreement = {f"{a}, {b}": {"spearman": spearman(scores[a], scores[b]),
                               "ordered_alike": ordered_alike(scores[a], scores[b])}
                 for a, b in combinations(scores, 2)}  # fmt: skip
    if args.out and ranks.main:
        found = {"texts": len(texts), "safe": sum(text.safe for text in texts), "rewards": measured,
                 "agreement": agreement}  # fmt: skip
        write_atomic(Path(args.out) / "calibration.json", (json.dumps(_plain(found), indent=1) + "\n").encode())
    return table(texts, measured, agreement)


def _plain(value):
    """Estimates as objects; json would write them as lists."""
    if isinstance(value, Estimate):
        return value._asdict()
    return {key: _plain(of) for key, of in value.items()} if isinstance(value, dict) else value


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    ranks = Ranks(args.device)
    ranks.print(run(args, ranks))
    ranks.wait()
    ranks.close()


if __name__ == "__main__":
    with cli.readable_errors():
        main()
