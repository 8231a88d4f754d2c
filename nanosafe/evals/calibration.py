"""Does a reward model score safe texts above unsafe ones, in every category and whoever wrote them?

    python -m nanosafe.evals.calibration --reward-model tiny-reward --data tiny-pairs
    python -m nanosafe.evals.calibration --reward-model skywork-v2-llama-8b OTHER --data texts.jsonl
    torchrun --nproc_per_node=2 -m nanosafe.evals.calibration ...

A row of --data has prompt, response, label (safe or unsafe), perhaps category and model (who wrote
the response), or it is a labelled pair: prompt, chosen (counted as safe), rejected, perhaps
category.

AUC: the chance that a random safe text scores above a random unsafe one. Its interval is over
prompts, not over texts, since responses to one prompt resemble each other: Newcombe's, with the
number of prompts that have such a text. Where each prompt has both it is somewhat wide. If all
texts have a lower AUC than each writer's, the same reward means something else from one writer to
the next.
calibration.json holds all figures, estimates as {mean, low, high, n, over}.
"""

from nanosafe.evals.flags import calibration_flags

if __name__ == "__main__":
    calibration_flags(__doc__).parse_args()  # --help and wrong flags end here, before PyTorch is loaded

# isort: split
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanosafe.evals.statistics import Estimate, auc, auc_interval
from nanosafe.evals.tables import markdown
from nanosafe.io.files import write_atomic
from nanosafe.names import find_records, load_pairs, load_reward
from nanosafe.parallel import Ranks
from nanosafe.text.forms import as_row
from nanosafe.train import cli
from nanosafe.train.rewards import conversation, known_rewards

LABELS = {"safe": True, "unsafe": False}


@dataclass(frozen=True)
class Text:
    prompt: list[dict]  # messages
    response: str
    safe: bool
    category: str | None = None
    writer: str | None = None


def load_texts(name: str) -> list[Text]:
    """The labelled rows or pairs of a file, a hub data set or the tiny world (names.load_rows).

    Raises what load_rows raises, also for a row without a response or a label.
    """
    texts = []
    records = find_records(name)
    if "chosen" in records[0][0]:
        for pair in load_pairs(name):
            texts.append(Text(pair.prompt, pair.chosen, True, pair.category))
            texts.append(Text(pair.prompt, pair.rejected, False, pair.category))
        return texts
    for record, source in records:
        row, response, label = as_row(record, source), record.get("response"), record.get("label")
        if not isinstance(response, str):
            raise ValueError(f"{source}: a labelled row needs a text in field 'response'; it has "
                             f"{list(record)}")
        if label not in LABELS:
            raise ValueError(f"{source}: field 'label' must be safe or unsafe, not {label!r}")
        category, writer = record.get("category"), record.get("model")
        texts.append(Text(row.prompt, response, LABELS[label], category, writer))
    return texts


def separation(texts: Sequence[Text], scores: Sequence[float]) -> Estimate | None:
    """AUC of safe above unsafe with its interval; None where a label is missing."""
    by_label, prompts = {True: [], False: []}, {True: set(), False: set()}
    for text, score in zip(texts, scores, strict=True):
        by_label[text.safe].append(score)
        prompts[text.safe].add(json.dumps(text.prompt))  # messages are no hashable key
    if not by_label[True] or not by_label[False]:
        return None
    value = auc(by_label[True], by_label[False])
    low, high = auc_interval(value, len(prompts[True]), len(prompts[False]))
    return Estimate(value, low, high, len(texts), "texts")


def measure(texts: Sequence[Text], scores: Sequence[float]) -> dict[str, dict[str, Estimate]]:
    """AUCs of one reward model: {"all": {"all": ...}, "categories": {...}, "writers": {...}}.

    A category or writer of whom one label is missing has none.
    """
    # kind -> name -> the rows of that group
    members = {"all": {"all": range(len(texts))}, "categories": {}, "writers": {}}
    for i, text in enumerate(texts):
        members["categories"].setdefault(text.category, []).append(i)
        members["writers"].setdefault(text.writer, []).append(i)
    measured = {"all": {}, "categories": {}, "writers": {}}
    for kind, groups in members.items():
        for name, rows in groups.items():
            estimate = separation([texts[i] for i in rows], [scores[i] for i in rows])
            if name is not None and estimate is not None:
                measured[kind][name] = estimate
    return measured


def score(texts: Sequence[Text], name: str, dtype: torch.dtype, ranks: Ranks) -> list[float | None]:
    """The reward of each text; None for one that is longer than the reward model's context."""
    with ranks.local_main_first():
        reward = load_reward(name, device=ranks.device, dtype=dtype)

    def work(some: Sequence[Text]) -> list[float | None]:
        conversations = []
        for text in some:
            conversations.append(conversation(text.prompt, text.response, opened_thought=False))
        return known_rewards(reward, name, conversations) if conversations else []

    return ranks.split_work(texts, work, cost=lambda text: len(text.response) + 1)


def table(texts: Sequence[Text], measured: dict[str, dict]) -> str:
    """measured: what `measure` gives for each reward model."""
    rows = []
    first, *_ = measured.values()  # all have the same groups
    for kind, groups in first.items():
        for name in groups:
            cells = [str(of_model[kind][name]) for of_model in measured.values()]
            rows.append([name, *cells])
    safe = sum(text.safe for text in texts)
    title = (f"{safe} safe and {len(texts) - safe} unsafe texts; AUC of safe above unsafe, with "
             "95 % intervals over prompts")
    return "\n".join([title, "", *markdown(["", *measured], rows)])


def write_figures(texts: Sequence[Text], measured: dict[str, dict], folder: Path) -> None:
    rewards = {}
    for name, of_model in measured.items():
        objects = {}
        for kind, estimates in of_model.items():
            objects[kind] = {group: estimate._asdict() for group, estimate in estimates.items()}
        rewards[name] = objects | {"all": objects["all"]["all"]}  # which has one group only
    figures = {"texts": len(texts), "safe": sum(text.safe for text in texts), "rewards": rewards}
    write_atomic(folder / "calibration.json", (json.dumps(figures, indent=1) + "\n").encode())


def run(args: Namespace, ranks: Ranks) -> str:
    """The table; writes calibration.json too where --out names a folder."""
    texts, scores = load_texts(args.data), {}
    if len({text.safe for text in texts}) < 2:
        label = "safe" if texts[0].safe else "unsafe"
        raise ValueError(f"{args.data}: all {len(texts)} texts are {label}, and an AUC needs both "
                         "labels")
    dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    for name in args.reward_model:
        scores[name] = score(texts, name, getattr(torch, dtype), ranks)
    # Reward models are compared on the texts that all of them could read.
    read = []
    for i, of_models in enumerate(zip(*scores.values(), strict=True)):
        if None not in of_models:
            read.append(i)
    if len(read) < len(texts):
        unread = len(texts) - len(read)
        ranks.print(f"left out {unread} texts longer than the context of a reward model")
    texts, measured = [texts[i] for i in read], {}
    for name, values in scores.items():
        measured[name] = measure(texts, [values[i] for i in read])
    if args.out and ranks.main:
        write_figures(texts, measured, Path(args.out))
    return table(texts, measured)


def main(argv: list[str] | None = None) -> None:
    args = calibration_flags(__doc__).parse_args(argv)
    ranks = Ranks(args.device)
    ranks.print(run(args, ranks))
    ranks.wait()
    ranks.close()


if __name__ == "__main__":
    with cli.readable_errors():
        main()
