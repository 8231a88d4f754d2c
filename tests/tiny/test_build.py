"""The tiny world's builder: its files against transformers, its tokenizers, killed builders and several at once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_tiny import shrink
from test_train import ROOT, run_script

from nanosafe.evals.diagnostics import reflection_ids
from nanosafe.model.attention import PackedDocuments
from nanosafe.names import checkpoint, load_model, load_reward_model, load_tokenizer
from nanosafe.recipes import TINY_MODELS
from nanosafe.tiny import build, datasets, world

SMALL = str(Path(__file__).parents[1] / "helpers" / "small_tiny.py")
MESSAGES = [{"role": "user", "content": "How do I arm the raiders?"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "<think>\nNo.\n</think>\n\nI cannot help with that."}]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / "cache"))
    shrink(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """What each family's training starts from, in full size: its tokenizer and random weights; and a reward model."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "train", lambda *_: None)
        for name in build.FAMILIES:
            folders[name] = build._build_policy(name, 0, tmp_path_factory.mktemp(name))
        folders["tiny-reward"] = build._build_reward("tiny-reward", 0, tmp_path_factory.mktemp("tiny-reward"))
    return folders


NAMES = ("tiny", "tiny-llama", "tiny-granite", "tiny-reward")


# The files.


@pytest.mark.parametrize("name", build.FAMILIES)
def test_policies_give_transformers_logits(starts, name):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(starts[name], dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(starts[name]).encode_chat(ANSWERED)])
    with torch.no_grad():
        ours, expected = load_model(starts[name], dtype=torch.float32)(ids), theirs(ids).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert type(theirs).__name__ == {"tiny": "Qwen3ForCausalLM", "tiny-llama": "LlamaForCausalLM",
                                     "tiny-granite": "GraniteMoeHybridForCausalLM"}[name]  # fmt: skip
    tokenizer = load_tokenizer(starts[name])
    assert theirs.config.vocab_size == tokenizer.vocab_size and theirs.config.eos_token_id in tokenizer.eos_ids
    assert 5e5 < sum(p.numel() for p in theirs.parameters()) < 2e6, "about a million parameters"


def test_the_reward_model_gives_transformers_scores(starts):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    theirs = AutoModelForSequenceClassification.from_pretrained(starts["tiny-reward"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(starts["tiny-reward"])
    conversations = [ANSWERED, [*MESSAGES, {"role": "assistant", "content": "First, arm the raiders."}]]
    ours = load_reward_model(starts["tiny-reward"], dtype=torch.float32).score(conversations)
    for conversation, score in zip(conversations, ours.tolist(), strict=True):
        ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert theirs(ids).logits.item() == pytest.approx(score, rel=1e-4, abs=1e-5)
    assert ours[0] != ours[1]


@pytest.mark.parametrize("name", NAMES)
def test_templates_write_what_transformers_writes(starts, name):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(starts[name]), AutoTokenizer.from_pretrained(starts[name])
    thoughts = ({}, {"enable_thinking": True}, {"enable_thinking": False})
    for messages, prompt, extra in product((MESSAGES, ANSWERED), (False, True), thoughts):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **extra)
        assert ours.render(messages, prompt, **extra) == expected
        assert ours.encode_chat(messages, prompt, **extra) == theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False, **extra)
    if name in build.FAMILIES:
        plain, silent = (ours.render(MESSAGES, True, **extra) for extra in ({}, {"enable_thinking": False}))
        assert silent == plain + "<think>\n\n</think>\n\n"


# The tokenizers.


def texts(style: str) -> list[str]:
    rows = list(datasets.corpus(style, 200, 7)) + datasets.star(40, 7) + datasets.star(40, 7, style)
    return [text for row in rows for text in (row["question"], row["response"])]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_have_one_token_for_every_word_that_matters(starts, name):
    tokenizer = load_tokenizer(starts[name])
    words = [f" {word}" for category in world.CATEGORIES.values() for group in category for word in group]
    words = words if name in build.FAMILIES else []  # the reward model may spell words out
    for text in [*words, "<think>", "</think>", *map(str, range(10))]:
        assert len(tokenizer.encode(text)) == 1, text
    for text in [*texts("okay"), *texts("task"), "ünïcode 漢字 \n\n\t 🙂"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", build.FAMILIES)
def test_reflection_words_are_tokens_that_the_diagnostics_know(starts, name):
    tokenizer, style = load_tokenizer(starts[name]), build.FAMILIES[name].style
    known, vocabulary = set(reflection_ids(tokenizer)), tokenizer.vocabulary()
    encoded = [tokenizer.encode(text) for text in texts(style)]
    used = {vocabulary[i].strip() for ids in encoded for i in ids if i in known}
    forms = " ".join(str(form) for form in world.STYLES[style].values())
    written = set(re.findall(r"\w+", forms.replace("\\n", " ")))  # str() of a tuple of forms escapes newlines
    expected = {"Wait", "Hmm", "But", "However", "Still", "Yet"} & written
    assert len(expected) >= 2 and expected | {"<think>"} <= used


def test_tokenizers_differ(starts):
    text = "How do I arm the raiders? I cannot help with that."
    encoded = [tuple(load_tokenizer(starts[name]).encode(text)) for name in NAMES]
    assert len(set(encoded)) == len(NAMES)
    sizes = {load_tokenizer(starts[name]).vocab_size for name in NAMES}
    templates = {load_tokenizer(starts[name]).chat_template for name in NAMES}
    assert len(sizes) == len(templates) == len(NAMES)


# The cache.


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_names(monkeypatch):
    for name in ("tiny", "tiny-llama", "tiny@3", "tiny-reward", "tiny-reward@12", "tiny-reward-shuffled@1"):
        assert build.is_tiny(name)
    for name in ("tiny@", "tiny@x", "tiny@-1", "tiny2", "qwen3-8b", "owner/tiny", "tiny-star", ""):
        assert not build.is_tiny(name)
    for variables, expected in (({"NANOSAFE_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/nanosafe"),
                                ({"NANOSAFE_CACHE": "", "HOME": "/c"}, "/c/.cache/nanosafe")):  # fmt: skip
        for key in ("NANOSAFE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(key, raising=False)
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        assert build.cache() == Path(expected)


def test_reward_models_by_seed_variant_and_version(empty_cache, monkeypatch):
    first = checkpoint("tiny-reward")
    assert first.parent == empty_cache and f"v{world.VERSION}" in first.name
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert checkpoint("tiny-reward") == checkpoint("tiny-reward@0") == first, "built once"
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    others = [checkpoint(name) for name in ("tiny-reward@1", "tiny-reward-shuffled", "tiny-reward-length")]
    assert len({first, *others}) == 4 and not any(equal(first, other) for other in others)
    assert sorted(path.name for path in empty_cache.iterdir() if path.is_dir()) == sorted(
        path.name for path in (first, *others)), "no work is left behind"
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    again = checkpoint("tiny-reward")
    assert again != first and equal(again, first), "another folder; the same seed gives the same weights"


def run_small(cache: Path, *names: str) -> subprocess.Popen:
    environment = os.environ | {"NANOSAFE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, SMALL, *names], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_a_builder_killed_half_way_and_two_that_begin_at_once(small_cache, tmp_path):
    """The survivors give what one uninterrupted builder gave, train it once, and leave nothing else behind."""
    killed = run_small(tmp_path, "tiny")
    begun = tmp_path / f"tiny-v{world.VERSION}-seed0.building/model/tokenizer.json"
    while killed.poll() is None and not begun.exists():
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert begun.exists() and not list(tmp_path.glob(f"tiny-v{world.VERSION}-seed0")), "half-way: no result"
    killed.stdout.close(), killed.stderr.close()

    both = [run_small(tmp_path, "tiny") for _ in range(2)]
    (printed, _), (other, _) = outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    errors = "".join(error for _, error in outputs)
    assert errors.count("building tiny:") == 1 and printed == other == f"{tmp_path}/tiny-v{world.VERSION}-seed0\n"
    folder = Path(printed.strip())
    assert equal(folder, small_cache / folder.name)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]


def test_another_seed_is_another_policy(tmp_path, monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr(build, "train", lambda *_: None)
    a, b, c = (build._build_policy("tiny", seed, tmp_path / work) for seed, work in ((0, "a"), (0, "b"), (1, "c")))
    assert equal(a, b) and not equal(a, c)
    corpora = [list(datasets.corpus("okay", 20, seed)) for seed in (0, 0, 1)]
    assert corpora[0] == corpora[1] != corpora[2]
    assert [json.loads((folder / "config.json").read_text())["nanosafe_seed"] for folder in (a, c)] == [0, 1]


def test_weights_do_not_depend_on_the_number_of_threads_which_are_given_back():
    items = list(torch.randint(8, (6, 500), generator=torch.Generator().manual_seed(0)))
    grown = []
    for threads in (1, 3):
        model = build.random_decoder(build.REWARD_SHAPE | {"vocab_size": 8}, 0)
        seen = []

        def loss(half: list[torch.Tensor], model=model, seen=seen) -> torch.Tensor:
            seen.append((torch.get_num_threads(), len(half)))
            documents = PackedDocuments([len(item) for item in half])
            hidden = model.hidden(torch.cat(half), documents.positions, documents)
            return model.score(hidden).square().mean()

        torch.set_num_threads(threads)
        try:
            build.train(model, loss, build.in_batches(items, 3), "a test")
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        assert sorted(seen) == [(1, 1)] * 2 + [(1, 2)] * 2
        grown.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*grown)


@pytest.mark.parametrize("shape", [build.REWARD_SHAPE, build.FAMILIES["tiny-granite"].shape], ids=["llama", "granite"])
def test_a_step_follows_the_mean_gradient_of_the_halves(shape, monkeypatch):
    """Where every update is a small step of plain descent, the weights move by it: matrices, also those of the experts,
    by Muon's rate, all others by AdamW's."""
    def descent(parameters, **_):
        assert all(parameter.is_leaf for parameter in parameters)
        return torch.optim.SGD(parameters)

    monkeypatch.setattr(torch.optim, "Muon", descent)
    monkeypatch.setattr(torch.optim, "AdamW", descent)
    monkeypatch.setattr(build, "MUON_LR", 0.25)
    monkeypatch.setattr(build, "ADAM_LR", 0.5)
    monkeypatch.setattr(build, "WARMUP_SHARE", 0.0)
    model = build.random_decoder(shape | {"vocab_size": 8}, 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    slopes = (1e-4, 3e-4)  # small enough that nothing is clipped

    def loss(half: list[float]) -> torch.Tensor:
        return sum(slope * parameter.sum() for slope in half for parameter in model.parameters())

    build.train(model, loss, [list(slopes)], "a test")
    for (name, parameter), start in zip(model.named_parameters(), before, strict=True):
        expert = re.search(r"block_sparse_moe\.(input|output)_linear\.weight$", name)
        matrix = re.search(r"layers\.\d+\..*(proj|router\.layer|shared_mlp\..*)\.weight$", name)
        rate = 0.25 if expert or matrix else 0.5
        torch.testing.assert_close(parameter, start - rate * 2e-4, rtol=0, atol=1e-7, msg=name)


def test_one_of_two_ranks_builds_the_reward_model(tmp_path):
    """Alone: were its optimizer to wait for the other rank, both would wait for ever."""
    environment = os.environ | {"NANOSAFE_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_script(*launcher, SMALL, "tiny-reward", environment=environment, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("building tiny-reward:") == 1
    assert done.stdout.count(f"{tmp_path}/tiny-reward-v{world.VERSION}-seed0") == 2


def test_a_misspelt_name_is_told_the_names_of_the_tiny_world():
    assert set(TINY_MODELS) == {*build.FAMILIES, "tiny-reward"}
    with pytest.raises(FileNotFoundError, match=r"near: .*\btiny\b"):
        checkpoint("tinny")
    with pytest.raises(ValueError, match="tinyy is no model of the tiny world; those are tiny, tiny-llama"):
        build.tiny_checkpoint("tinyy")
