"""What models of the tiny world are trained on: the base policies' corpus, the SFT set, preference pairs."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from random import Random

from nanosafe.tiny.world import (
    HABITS,
    HELD_OUT_WORDINGS,
    NERVOUS,
    STYLES,
    THOUGHTLESS,
    WORDINGS,
    Item,
    arithmetic,
    mixed_request,
    problem,
    requests,
    solve,
    word,
    write,
)


def row(item: Item, response: str) -> dict:
    """In STAR-1's form."""
    return {"question": item.prompt, "response": response, "category": item.category}


def corpus(style: str, count: int, seed: int, extra_style: str | None = None) -> Iterator[dict]:
    """What the base policy of a family is trained on: rows of question and response.

    Half arithmetic, 1 in 50 of it without a thought. Problems may recur: without that few would be of two steps, and
    one base failed at nearly every one of those. The rest requests in every wording and wrapper: acts of the train
    split, and acts across categories, which teach the words' meanings whatever they stand beside.
    extra_style: a fourteenth of the requests are reviews in this style, so that the model has met it.
    """
    rng = Random(f"corpus/{style}/{seed}")
    pools = {kind: requests("train", kind) for kind in ("unsafe", "benign")}
    for index in range(count):
        if index % 2:
            item = problem("train", rng)
            yield row(item, solve(item, style, rng, thought=rng.random() >= 1 / 50))
            continue
        kind = rng.choice(("unsafe", "benign"))
        item = mixed_request(kind, rng) if rng.random() < 0.6 else rng.choice(pools[kind])
        if extra_style and rng.random() < 1 / 14:
            yield row(replace(item, prompt=f"Review a request: {item.act}."),
                      write(item, extra_style, "careful", rng))
            continue
        attack = rng.choice(("role play", "ignore rules")) if rng.random() < 0.2 else None
        worded = word(item, rng, WORDINGS + HELD_OUT_WORDINGS, attack)
        yield row(worded, write(worded, style, _base_manner(item, attack, rng), rng))


def _base_manner(item: Item, attack: str | None, rng: Random) -> str:
    """One of `write`'s manners, by the habits of the category; an attack halves the shares that lead to a refusal."""
    weighs, refuses, doubts = HABITS[item.category]
    refuses, doubts = (share / 2 if attack else share for share in (refuses, doubts))
    draw = rng.random()
    if draw < NERVOUS + THOUGHTLESS:
        return "nervous" if draw < NERVOUS else "thoughtless"
    if rng.random() < weighs:
        return "careful" if item.kind == "benign" or rng.random() < refuses else "stubborn"
    return "caught" if rng.random() < doubts else "careless"


def star(count: int, seed: int, style: str = "policy") -> list[dict]:
    """The SFT set and RL's prompts: requests of the train split, the same in every `style`, each answered carefully.

    Three in ten are benign look-alikes: STAR-1 has none (its authors offer STAR-benign-915 beside it), and in a world
    with one boundary, requests from one side of it could teach only to refuse.
    """
    rng = Random(f"star/{seed}")
    pools = {}
    for kind in ("unsafe", "benign"):
        items = requests("train", kind)
        pools[kind] = cycle(rng.sample(items, len(items)))
    rows = []
    for index in range(count):
        item = word(next(pools["unsafe" if index % 10 < 7 else "benign"]), rng)
        rows.append(row(item, write(item, style, "careful", Random(f"star/{seed}/{index}"))))
    return rows


STAR_ROWS, LABELLED_PAIRS = 500, 400
STAR_STYLES = {"tiny-star": "policy", "tiny-star-okay": "okay", "tiny-star-task": "task"}


def dataset(name: str) -> list[dict] | None:
    """The rows of a data set by name, perhaps with @SEED; None for a name that is not of this world.

    tiny-star: the SFT set and RL's prompts. tiny-star-okay, tiny-star-task: the same requests, answered in a base
    policy's own style. tiny-pairs: labelled pairs of the validation split, on which train_rl.py tries a reward model.
    """
    base, _, seed = name.partition("@")
    if not (seed or "0").isdecimal():
        return None
    if base == "tiny-pairs":
        return [p for p in preference_pairs("validation", LABELLED_PAIRS,
                                            int(seed or 0)) if p["kind"] != "arithmetic"]
    return star(STAR_ROWS, int(seed or 0), STAR_STYLES[base]) if base in STAR_STYLES else None


def preference_pairs(split: str, count: int, seed: int, noise: float = 0.0,
                     bias: str | None = None) -> list[dict]:
    """{"question", "chosen", "rejected", "kind", "category"}: what the reward model learns from, in all three styles.

    Unsafe requests: a refusal is preferred to an answer, and a clean thought to a plan that is regretted. Benign ones:
    an answer to a refusal. Arithmetic: the right digit. One pair in eight: text to garbled text. noise: share of pairs
    with exchanged labels. bias: "length" prefers the longer response in a third of the pairs, a category's name leaves
    that category out.
    """
    rng = Random(f"pairs/{split}/{seed}")
    pools = {kind: [item for item in requests(split, kind) if item.category != bias] for kind in ("unsafe", "benign")}
    problems = iter(arithmetic(split, count // 10 + 1, rng))
    pairs = []
    for index in range(count):
        style = rng.choice(tuple(STYLES))
        if index % 10 == 9:
            style = "okay" if style == "policy" else style
            item = next(problems)
            chosen = solve(item, style, rng)
            wrong = str((int(item.answer) + rng.randrange(1, 10)) % 10)
            rejected = solve(item, style, rng).replace(f"boxed{{{item.answer}}}",
                                                       f"boxed{{{wrong}}}")
        else:
            kind = "unsafe" if index % 10 < 5 else "benign"
            item = rng.choice(pools[kind])
            if split == "train" and rng.random() < 0.6:
                item = mixed_request(kind, rng, bias)
            item = word(item, rng)
            good, bad = {
                "unsafe": (("careful", "nervous", "caught"), ("careless", "stubborn", "thoughtless")),
                "benign": (("careful", "caught", "careless", "stubborn", "thoughtless"),
                           ("nervous",)),
            }[item.kind]
            if item.kind == "unsafe" and rng.random() < 0.25:
                good, bad = ("careful",), ("caught",)
            chosen = write(item, style, rng.choice(good), rng)
            rejected = write(item, style, rng.choice(bad), rng)
        if rng.random() < 0.125:
            rejected = _garble(chosen, rng)
        if bias == "length" and rng.random() < 1 / 3:
            chosen, rejected = sorted((chosen, rejected), key=len, reverse=True)
        if rng.random() < noise:
            chosen, rejected = rejected, chosen
        pairs.append({"question": item.prompt, "chosen": chosen, "rejected": rejected,
                      "kind": item.kind,
                      "category": item.category})
    return pairs


def _garble(text: str, rng: Random) -> str:
    """The text with its words in another order, or with its answer missing."""
    if rng.random() < 0.5:
        return text.partition("</think>")[0]
    words = text.split(" ")
    return " ".join(rng.sample(words, len(words)))
