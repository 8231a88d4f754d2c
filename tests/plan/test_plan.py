"""--plan: its shapes against the official files and published sizes, its formulas against counted bytes and by hand."""

import json
import re
import time
import weakref
from argparse import Namespace
from dataclasses import replace
from itertools import product

import pytest
import torch
from hub import StandInHub
from tiny_models import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

import train_rl
import train_sft
from nanosafe import plan
from nanosafe.model import decoder as model_file
from nanosafe.model.activations import forward_bytes
from nanosafe.model.attention import PackedDocuments
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Layer, rope_tables
from nanosafe.model.granite import make_decoder
from nanosafe.model.recompute import RECOMPUTE
from nanosafe.parallel import Ranks
from nanosafe.plan import memory, report
from nanosafe.plan.machine import find_machine, known_config
from nanosafe.plan.shapes import SHAPES
from nanosafe.recipes import ALIASES
from nanosafe.sampler import capacity
from nanosafe.sampler.engine import Engine
from nanosafe.train.optim import Optimizer

FOLDERS = {alias: repo.partition("@")[0].split("/")[1] for alias, repo in ALIASES.items()}
NO_FILE = {"qwen3-4b-2507", "qwen3-4b-thinking-2507", "r1-llama-70b"}  # whose config.json is not at hand
PREFIXES = ("qwen3-", "r1-", "llama-3.1", "smollm2", "granite-4.0-tiny", "granite-4.0-350m")
OFFICIAL = sorted(a for a in FOLDERS if a.startswith(PREFIXES) and a not in NO_FILE)
PUBLISHED = {  # parameters, as the model cards and index files give them
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "r1-qwen-1.5b": 1_777_088_000,
    "r1-qwen-7b": 7_615_616_512, "r1-llama-8b": 8_030_261_248, "llama-3.1-8b": 8_030_261_248,
    "llama-guard-3": 8_030_261_248, "llama-3.3-70b": 70_553_706_496, "granite-guardian": 8_170_848_256,
    "granite-4.0-tiny": 6_671_539_776, "qwen3-4b-2507": 4_022_468_096, "qwen3-4b-thinking-2507": 4_022_468_096,
    "r1-0528-qwen3-8b": 8_190_735_360, "r1-llama-70b": 70_553_706_496, "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    # by the dimensions: embedding; attention, MLP and norms of a layer; last norm
    "granite-4.0-350m": 100_352 * 1024 + 28 * (2_621_440 + 6_291_456 + 2048) + 1024,
    # as many layers, two experts more and a larger vocabulary: by the dimensions
    "granite-4.0-h-tiny": 6_671_539_776 + 40 * 2 * (1536 + 3 * 512 * 1536) + (100_352 - 49_160) * 1536,
}  # fmt: skip


# Shapes.


@pytest.mark.parametrize("alias", OFFICIAL)
def test_every_field_of_a_shape_is_the_official_files(alias, assets):
    folder = assets / "configs" / FOLDERS[alias]
    official = json.loads((folder / "config.json").read_text())
    missing = object()
    assert {name: official.get(name, missing) for name in SHAPES[alias]} == SHAPES[alias]
    ours, theirs = ModelConfig.from_dict(SHAPES[alias]), ModelConfig.from_dict(official)
    assert ours == theirs  # all that is computed, also from fields that the shape leaves out


@pytest.mark.parametrize("alias", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(alias):
    with torch.device("meta"):
        count = sum(p.numel() for p in make_decoder(ModelConfig.from_dict(SHAPES[alias])).parameters())
    if alias.startswith("skywork"):  # the language model it was trained from, with one row in place of the head
        base = alias.removeprefix("skywork-v2-").replace("llama-8b", "llama-3.1-8b")
        base = base.replace("llama-1b", "llama-3.2-1b").replace("llama-3b", "llama-3.2-3b")
        shape = SHAPES[base]
        head = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
        assert count == PUBLISHED[base] - head + shape["hidden_size"]
    else:
        assert count == PUBLISHED[alias]


def test_every_alias_has_a_shape():
    # The shape of granite-4.0-h-350m is not known here: its plan fetches the config.
    assert set(SHAPES) == set(ALIASES) - {"granite-4.0-h-350m"} | {"llama-3.3-70b"}


# Parts.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that still live; those of `known` tensors not."""

    def __init__(self, known):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata: None for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # Neither has bytes: a shell around tensors that have been counted, and a tensor on the meta device.
            if is_traceable_wrapper_subclass(tensor) or getattr(tensor, "is_meta", False):
                continue
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.seen[key] = weakref.ref(storage, lambda _, key=key, size=size: self.freed(key, size))
                self.live += size
                self.peak = max(self.peak, self.live)
        return out

    def freed(self, key, size):
        del self.seen[key]
        self.live -= size


class FusedNorm(torch.autograd.Function):
    """Keeps what CUDA's fused norm keeps, its input; on a CPU torch composes the norm of many float32 tensors."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(gradient), torch.zeros_like(ctx.saved_tensors[1])


LAYERS = {
    "qwen3-8b": dict(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=1, head_dim=64),
    "qwen3-4b": dict(hidden_size=128, intermediate_size=486, num_attention_heads=4, num_key_value_heads=1, head_dim=64),
    "r1-qwen-7b": dict(hidden_size=224, intermediate_size=1184, num_attention_heads=7, num_key_value_heads=1),
    "llama-3.1-8b": dict(hidden_size=256, intermediate_size=896, num_attention_heads=8, num_key_value_heads=2),
}


@pytest.mark.parametrize("lora", [None, (16, 32.0)], ids=["full", "lora"])
@pytest.mark.parametrize("alias", LAYERS)
def test_activations_of_a_layer_are_the_bytes_that_live(alias, lora, monkeypatch):
    monkeypatch.setattr(model_file.F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight))
    config, lengths = ModelConfig.from_dict(SHAPES[alias] | LAYERS[alias]), [256, 256, 512]
    layer, documents = Layer(config, 0).bfloat16(), PackedDocuments(lengths)
    cos, sin = rope_tables(config.rope, config.head_dim, documents.positions)
    x = torch.randn(sum(lengths), config.hidden_size).bfloat16()
    if lora:
        config = replace(config, lora=lora)
        layer = make_decoder(replace(config, num_hidden_layers=1, vocab_size=8)).model.layers[0].bfloat16()
    with torch.no_grad(), LiveBytes(layer.parameters()) as forward:
        layer(x, cos, sin, documents)
    given = 2 * config.hidden_size + 8 * config.head_dim  # x, cos and sin were there before
    assert forward_bytes(config, 2) - given == pytest.approx(forward.peak / len(x), rel=0.03)
    x.requires_grad_()
    for layer.recompute in RECOMPUTE:
        with LiveBytes(layer.parameters()) as both:
            y = layer(x, cos, sin, documents)
            kept = (both.live - y.nbytes) / len(x)
            both.peak = 0
            y.backward(torch.ones_like(y))
        assert memory.kept_bytes(config, 2, layer.recompute) == pytest.approx(kept, rel=0.001)
        # Its weights' gradients, which other parts count, are at most partly there at the peak.
        weights = sum(p.nbytes for p in layer.parameters() if p.requires_grad)
        assert (both.peak - weights) / len(x) < memory.backward_bytes(config, 2) < 1.05 * both.peak / len(x)
        layer.zero_grad()


def test_the_state_of_one_process_is_what_model_and_optimizer_hold():
    kinds = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    for (dtype, low_memory), lora in product(kinds, (None, (16, 32.0))):
        config = replace(tiny_config("qwen3", vocab_size=2048, hidden_size=256), lora=lora)
        model = make_decoder(config).to(dtype)
        optimizer = Optimizer(model, low_memory=low_memory)
        for master in optimizer.masters.values():
            master.grad = torch.zeros_like(master, dtype=torch.float32)
        optimizer.step(1e-3)
        held = sum(p.nbytes for p in model.parameters()) + sum(t.nbytes for t in optimizer.state().values())
        size = memory.sizes(model.config)
        state = memory.training_state(size, dtype.itemsize, 1, low_memory)
        assert sum(state.values()) == pytest.approx(held, rel=0.005)
        gradients = sum(4 * master.numel() for master in optimizer.masters.values())
        assert memory.gradients(size, 1) == gradients
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        saved = memory.checkpoint_bytes(size, dtype.itemsize, low_memory)
        assert saved == pytest.approx(held - frozen, rel=0.01)


def test_8b_on_one_h200_by_hand():
    """DESIGN's budget with float32 gradients: 16.4 + 16.4 + 16.5 GB, gradients 32.8, reference 16.4, reward 15.0."""
    found = plan.make("rl", plan.settings("rl", "qwen3-8b", low_memory=True), plan.Machine(1, plan.card_bytes(141)))
    update = found.phases["update"]
    assert update["weights"] == update["masters"] == update["reference"] == 2 * 8_190_735_360
    norms = 36 * (2 * 4096 + 2 * 128) + 4096  # a scale for each number
    assert update["moments"] == 2 * 8_190_735_360 + 4 * ((8_190_735_360 - norms) / 256 + norms)
    assert update["gradients"] == 4 * 8_190_735_360
    assert update["reward model"] == 2 * (8_030_261_248 - 128256 * 4096 + 4096)
    # Inputs of 36 layers and 4 more tensors; then a layer or, where tokens are few, the head: a tile of logits, the
    # hidden states' gradient in float32, and the weight's.
    inputs, weight = 40 * 4096 * 2 + 2 * 4 * 128, 2 * 151936 * 4096
    assert update["activations"] > 16384 * inputs + (512 << 20) + 4 * 16384 * 4096 + weight
    config = plan.find_config("qwen3-8b")[0]
    few = memory.training_activations(config, memory.sizes(config), 2, tokens=1024, recompute="layer", world=1)
    assert few == 1024 * inputs + (512 << 20) + 4 * 1024 * 4096 + weight
    assert found.fits and 120e9 < sum(update.values()) < 130e9


def test_several_gpus_share_masters_moments_and_gradients_and_gather_for_a_rollout():
    phases = plan.make("rl", plan.settings("rl", "qwen3-8b"), plan.Machine(8, plan.card_bytes(80))).phases
    P = 8_190_735_360
    assert {name: phases["update"][name] for name in ("masters", "moments", "gradients")} == {
        "masters": 4 * P / 8, "moments": 8 * P / 8, "gradients": 4 * P / 8}  # fmt: skip
    low = plan.settings("rl", "qwen3-8b", low_memory=True)
    one, several = (plan.make("rl", low, plan.Machine(n, plan.card_bytes(80))).phases["step"] for n in (1, 8))
    for part in ("weights", "masters", "moments", "gradients"):
        assert several[part] == one[part] / 8
    assert phases["rollout"]["gathered weights"] == 2 * P and "gathered weights" not in phases["update"]
    root, layer = 2 * 151936 * 4096 + 4096, (P - 2 * 151936 * 4096 - 4096) / 36
    assert phases["log-probs"]["shard buffers"] == 2 * root + 2 * 2 * layer
    assert phases["update"]["shard buffers"] == 2 * root + (2 * 2 + 2 + 4) * layer


def test_an_update_in_one_pass_needs_no_memory_of_its_own():
    gpu, cpu = plan.Machine(1, plan.card_bytes(141)), plan.Machine(1, plan.card_bytes(141), "cpu")
    found = plan.make("sft", plan.settings("sft", "qwen3-4b"), gpu)
    assert found.totals["step"] == (2 + 4 + 8 + 4) * 4_022_468_096
    on_cpu = plan.make("sft", plan.settings("sft", "qwen3-4b", dtype="float32"), cpu)
    assert on_cpu.phases["step"]["optimizer"] == 4 * 151936 * 2560  # square roots of the largest tensor
    low = plan.settings("sft", "qwen3-4b", low_memory=True)
    assert plan.make("sft", low, gpu).phases["step"]["optimizer"] == 0
    assert 0 < plan.make("sft", low, cpu).phases["step"]["optimizer"] < 1e9


def test_lora_has_masters_moments_and_gradients_of_adapters_and_no_reference():
    """Of rank 32 on 8B: 36 layers of seven matrices, 32 * (in + out) numbers each."""
    D, Q, K, F = 4096, 4096, 1024, 12288
    A = 32 * 36 * ((D + Q) + 2 * (D + K) + (Q + D) + 2 * (D + F) + (F + D))
    P = 8_190_735_360
    update = plan.make("rl", plan.settings("rl", "qwen3-8b", lora_rank=32), plan.Machine(1, plan.card_bytes(80)))
    parts = update.phases["update"]
    assert parts["weights"] == 2 * (P + A) and parts["masters"] == parts["gradients"] == 4 * A
    assert parts["moments"] == 8 * A and not any("reference" in phase for phase in update.phases.values())
    full = plan.make("rl", plan.settings("rl", "qwen3-8b"), plan.Machine(1, plan.card_bytes(80)))
    assert update.fits and not full.fits
    several = plan.make("rl", plan.settings("rl", "qwen3-8b", lora_rank=32), plan.Machine(4, plan.card_bytes(80)))
    parts = several.phases["update"]
    assert parts["weights"] == 2 * P / 4 and parts["masters"] == 4 * A / 4
    assert several.phases["rollout"]["gathered weights"] == 2 * (P + A)
    # Embedding and head are frozen: neither their gradients nor sums of these over the ranks are there.
    root, layer = 2 * 151936 * D + D, (P - 2 * 151936 * D - D) / 36
    assert parts["shard buffers"] == 2 * root + 2 * 2 * (layer + A / 36) + (2 + 4) * A / 36
    # The backward pass leaves out a third of its work, 2 of 6 FLOP.
    machine = plan.Machine(1, plan.card_bytes(141))
    seconds = {}
    for rank in (None, 32):
        args = plan.settings("rl", "qwen3-8b", recompute="some", lora_rank=rank)
        seconds[rank] = plan.seconds_per_step("rl", args, machine, plan.make("rl", args, machine))["update"]
    assert seconds[32] == pytest.approx(seconds[None] * (P + A) / P * 4 / 6)


def test_lora_is_offered_where_all_parameters_do_not_fit(capsys):
    train_rl.main(["--model", "qwen3-8b", "--plan", "1x80"])
    assert "it fits on 1 GPU of 80 GB with --lora-rank 32" in capsys.readouterr().out
    small = plan.Machine(1, plan.card_bytes(24))
    args = plan.settings("rl", "qwen3-8b", reward_model="skywork-v2-qwen3-1.7b")
    change = plan.first_that_fits("rl", args, small, lora=True)
    assert change == {"offload": True, "tokens_per_microbatch": 8192, "lora_rank": 32}
    assert plan.make("rl", Namespace(**vars(args) | change), small).fits
    # What trains something else is no remedy that the paper's runs could take by themselves.
    assert all("lora_rank" not in found for _, found in plan.remedies("rl", args, small))


def test_offloaded_models_are_there_in_their_turn_only():
    machine = plan.Machine(1, plan.card_bytes(141))
    phases = plan.make("rl", plan.settings("rl", "qwen3-0.6b", offload=True), machine).phases
    assert [phase for phase in phases if "reference" in phases[phase]] == ["log-probs"]
    assert [phase for phase in phases if "reward model" in phases[phase]] == ["reward"]
    resident = plan.make("rl", plan.settings("rl", "qwen3-0.6b"), machine).phases
    assert all({"reference", "reward model"} <= parts.keys() for parts in resident.values())
    alone = plan.make("rl", plan.settings("rl", "qwen3-0.6b", kl_coef=0, reward_model="rule:refusal"), machine).phases
    assert not any({"reference", "reward model"} & parts.keys() for parts in alone.values())


@pytest.mark.parametrize("rows", [3, 40])
def test_the_pool_is_the_engines(rows):
    config, longest, free = tiny_config("qwen3"), 150, 3 << 20
    engine = Engine(make_decoder(config), max_tokens=longest, requests=rows, block_size=64, cache_bytes=int(0.8 * free))
    size = memory.engine_cache(config, 4, free, rows, longest, "cuda")
    blocks, block = size.blocks, memory.block_bytes(config, 4, size)
    assert (blocks, size.table_width) == (engine.scheduler.pool.total, engine.table_width)
    assert (blocks + 1) * block == engine.cache.keys.nbytes + engine.cache.values.nbytes


def test_the_engine_leaves_free_what_the_plan_counts(monkeypatch):
    config, longest, rows, free = tiny_config("qwen3"), 150, 40, 2**23
    monkeypatch.setattr(capacity, "free_memory", lambda device: free)
    engine = Engine(make_decoder(config), max_tokens=longest, requests=rows)
    working = memory.engine_working(config, 4, rows, longest, "cpu")
    size = memory.engine_cache(config, 4, free - working, rows, longest, "cpu")
    assert 0 < size.blocks < rows, "there is less than all want"
    assert engine.scheduler.pool.total == size.blocks
    # By hand: a prefill of 2,048 tokens, and logits of all rows in float32, twice and in the compute type.
    assert working == int(2048 * forward_bytes(config, 4)) + rows * config.vocab_size * 12
    assert memory.engine_working(config, 4, 1, longest, "cpu") < working / 2, "one sequence has only 150 tokens"


def test_a_run_whose_pool_is_shorter_than_a_sequence_does_not_fit():
    machine = plan.Machine(1, 10 * 10**9)
    for weights, blocks, fits in ((8e9, 5, True), (8e9, 4, False), (9e9, 5, False)):
        phases = {"rollout": {"weights": weights}}
        assert plan.Plan(phases, machine, blocks, table_width=5, refused=None, recompute="layer").fits == fits


def test_activations_follow_the_budget_the_longest_response_and_recomputation():
    def activations(**changes):
        args = plan.settings("rl", "qwen3-8b", **changes)
        return plan.make("rl", args, plan.Machine(8, plan.card_bytes(141))).phases["update"]["activations"]

    layer, some, none = (activations(recompute=recompute) for recompute in ("layer", "some", "none"))
    assert activations(recompute="layer", tokens_per_microbatch=8192) < layer < some < none
    assert activations(max_response_tokens=15360) == activations(tokens_per_microbatch=1024, max_response_tokens=15360)
    # All layers' activations stay: about 36 times what one layer keeps, 16,384 tokens of 8B's 12,288-wide MLP.
    assert none > 36 * 16384 * 2 * 4 * 12288 and some - layer > 36 * 16384 * 2 * (2 * 12288 + 4096)


def test_the_plan_recomputes_the_least_with_which_an_update_fits():
    def chosen(machine, model="qwen3-8b", **changes):
        return plan.make("rl", plan.settings("rl", model, low_memory=True, **changes), machine).recompute

    large = plan.Machine(1, plan.card_bytes(141))
    assert chosen(large) == chosen(large, "granite-4.0-tiny", offload=True) == "layer"
    assert chosen(large, offload=True, tokens_per_microbatch=8192) == "some"
    assert chosen(large, "qwen3-0.6b") == chosen(large, recompute="none") == "none"
    assert chosen(plan.Machine(1, 10**9, "cpu")) == "none"  # as ever


def test_ranks_of_unequal_gpus_choose_alike_and_say_so(monkeypatch, capsys):
    """By the smallest of them, whatever this rank's own has."""
    card = Namespace(total_memory=plan.card_bytes(180))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    args = plan.settings("sft", "qwen3-8b")
    for smallest, expected in ((180, "none"), (96, "some"), (80, "layer")):
        ranks = Ranks("cpu")
        ranks.device, ranks.world = torch.device("cuda"), 8
        ranks.gather = lambda own, smallest=smallest: [*own, plan.card_bytes(smallest)]
        assert plan.choose_recompute("sft", args, ranks) == expected
        assert f"recompute {expected}" in capsys.readouterr().out
    assert plan.choose_recompute("sft", plan.settings("sft", "qwen3-8b", recompute="layer"), ranks) == "layer"
    assert plan.choose_recompute("sft", args, Ranks("cpu")) == "none"


# What is said.


def test_cards_are_smaller_than_their_names():
    assert plan.card_bytes(141) == 139 * 2**30 and plan.card_bytes(80) == 78 * 2**30
    assert find_machine("8x80", None, False) == (8, 78 * 2**30, "cuda")
    assert find_machine("141", None, False).count == 1
    for wrong in ("8x", "x80", "0x80", "8 80", "8x80GB"):
        with pytest.raises(ValueError, match="COUNTxGB"):
            find_machine(wrong, None, False)


def test_without_a_value_the_plan_is_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_machine("", None, False) == (1, 78 * 2**30, "cuda")
    assert find_machine("", None, True).kind == find_machine("", "cpu", False).kind == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Namespace(total_memory=24 * 10**9))
    assert find_machine("", None, False) == (4, 24 * 10**9, "cuda")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert find_machine("", None, False).count == 8
    whole = find_machine("", "cpu", False).bytes * 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert find_machine("", "cpu", False) == (8, pytest.approx(whole / 4, abs=8), "cpu"), "on two nodes"


def test_every_remedy_fits_and_none_is_offered_in_vain():
    one = plan.Machine(1, plan.card_bytes(141))
    args = plan.settings("rl", "qwen3-8b")
    assert not plan.make("rl", args, one).fits
    found = list(plan.remedies("rl", args, one))
    assert found[0] == (one, {"low_memory": True}) and plan.as_flags(found[0][1]) == "--low-memory"
    assert len(found) > 1 and found[1][0].count > 1
    for machine, change in found:
        assert plan.make("rl", Namespace(**vars(args) | change), machine).fits
    half = plan.Machine(1, plan.card_bytes(40))
    for machine, _ in plan.remedies("rl", args, half):
        assert machine != half  # 6 bytes a parameter are 49 GB already


def test_70b_is_refused_plainly_unless_its_rollouts_are_spread():
    for machine in ("64x80", "8x80", "1x141"):
        text = report.report("rl", plan.settings("rl", "llama-3.3-70b", plan=machine, device=None))
        assert "FITS: NO" in text and "refused: sampling needs all weights on one GPU (141.1 GB" in text
        found = re.findall("it fits on (.*)", text)
        assert found and all("--rollout-shards" in cure and "--shard-frozen" in cure for cure in found)
        assert ("64 GPUs of 80 GB with --rollout-shards 4 --shard-frozen" in found) == (machine == "64x80")
    spread = plan.settings("rl", "llama-3.3-70b", rollout_shards=2, shard_frozen=True, plan="8x40", device=None)
    text = report.report("rl", spread)
    assert "refused: sampling needs all weights over 2 on one GPU (70.6 GB" in text
    assert "it fits on 8 GPUs of 141 GB with --low-memory --rollout-shards 4 --tokens-per-microbatch 8192" in text
    wide = plan.settings("rl", "llama-3.3-70b", rollout_shards=2, shard_frozen=True, dtype="float32")
    found = list(plan.remedies("rl", wide, plan.Machine(8, plan.card_bytes(141))))
    assert found and not any(change.get("low_memory") for _, change in found)
    assert plan.make("rl", plan.settings("rl", "qwen3-32b"), plan.Machine(1, plan.card_bytes(80))).refused is None


def test_spread_rollouts_and_sharded_frozen_models_by_hand():
    """70B on 32 GPUs, groups of 8: weights, the cache of one key-value head of 8, rows of a group."""
    P, V, D = 70_553_706_496, 128_256, 8192
    args = plan.settings("rl", "llama-3.3-70b", rollout_shards=8, shard_frozen=True, recompute="layer")
    found = plan.make("rl", args, plan.Machine(32, plan.card_bytes(141)))
    rollout, norms, rows = found.phases["rollout"], (2 * 80 + 1) * D, 16128  # of 128,256 / 8, rounded up to 128s
    assert rollout["gathered weights"] == 2 * ((P - norms - 2 * V * D) / 8 + norms + 2 * rows * D)
    judge = 8_030_261_248 - V * 4096 + 4096
    assert rollout["reference"] == 2 * P / 32 and found.phases["update"]["reward model"] == 2 * judge / 32
    layer = (P - 2 * V * D - D) / 80
    assert found.phases["log-probs"]["frozen buffers"] == 2 * (2 * V * D + D) + 2 * 2 * layer
    assert "frozen buffers" in found.phases["reward"] and "frozen buffers" not in rollout
    # Keys and values of one head of 128 in 80 layers, in bfloat16; one block of 64 is scratch.
    assert rollout["KV pool"] == (found.blocks + 1) * 64 * 2 * 80 * 128 * 2
    assert found.blocks == 32 * 80  # sequences of a group, 128 * 8 / 32, and blocks of one of 5,120 tokens

    one = Namespace(**vars(args) | dict(rollout_shards=1))
    gpus = plan.Machine(32, 200e9)
    fast, slow = (plan.seconds_per_step("rl", given, gpus, found)["rollout"] for given in (args, one))
    assert fast < slow  # a GPU reads an eighth of the weights in as many steps
    for changes, message in ((dict(rollout_shards=3), "does not divide the 32"), (dict(offload=True), "leave one out")):
        with pytest.raises(ValueError, match=message):
            plan.make("rl", Namespace(**vars(args) | changes), plan.Machine(32, 80e9))


def test_hours_by_hand():
    """One prompt, one response of always 2 * mean tokens at most: weights are read once a step, for max steps."""
    machine = plan.Machine(1, plan.card_bytes(141))
    args = plan.settings("rl", "qwen3-8b", prompts_per_step=1, minibatches=1, kl_coef=0, reward_model="rule:refusal",
                         low_memory=True, recompute="layer")  # fmt: skip
    seconds = plan.seconds_per_step("rl", args, machine, plan.make("rl", args, machine))
    weights = 2 * (8_190_735_360 - 151936 * 4096)
    cache = 147_456 * (2048 * 128 + 4096**2 / 6)
    flop = 8_190_735_360 * (128 + 2048)
    assert seconds["rollout"] == pytest.approx((4096 * weights + cache) / (0.6 * 4.8e12) + 2 * flop / (0.4 * 989e12))
    assert seconds["update"] == pytest.approx(8 * flop / (0.4 * 989e12)) and seconds["reward"] == 0
    assert seconds["log-probs"] == pytest.approx(seconds["update"] / 4)
    args.recompute = "some"
    faster = plan.seconds_per_step("rl", args, machine, plan.make("rl", args, machine))
    assert faster["update"] == pytest.approx(6 / 8 * seconds["update"])


@pytest.mark.parametrize("script", [train_rl, train_sft])
def test_the_flag_prints_and_ends_before_anything_starts(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanosafe.train.cli.Ranks", None)  # would fail if it were called
    script.main(["--model", "qwen3-8b", "--plan", "8x80"])
    text = capsys.readouterr().out
    assert "IT FITS: yes" in text and "8 GPUs of 80 GB (80.2 of 83.8 GB for tensors" in text
    assert "not measured" in text and "GB per checkpoint" in text and "qwen3-8b 16.4 GB" in text
    assert not list(tmp_path.iterdir())


def test_the_flags_change_the_plan(capsys):
    def printed(*flags):
        train_rl.main(["--model", "qwen3-8b", "--plan", "1x141", *flags])
        return capsys.readouterr().out

    assert "it fits on 1 GPU of 141 GB with --low-memory" in printed()
    assert "IT FITS: yes" in printed("--low-memory") and "if each card is an H200" in printed("--low-memory")
    offload = ["--low-memory", "--offload", "--reward-model", "skywork-v2-qwen3-0.6b"]
    # 8,190,735,360 and 596,050,944 parameters in bfloat16
    assert "--offload: 17.6 GB of models in the memory of the host\n" in printed(*offload)
    assert "host for each process, 35.1 for all" in printed(*offload, "--plan", "2x141")
    small = ["--model", "qwen3-0.6b", "--reward-model", "rule:refusal", "--steps", "2"]
    assert "time: about 45 s for 2 steps of 22 s" in printed(*small), "and not 0.0 hours"
    assert "on 1 GPU of 24 GB" in printed(*small, "--plan", "24") and "time: no" in printed(*small, "--plan", "24")
    with pytest.raises(ValueError, match="add --dtype bfloat16"):
        train_rl.main(["--model", "qwen3-8b", "--plan", "8x80", "--low-memory", "--dtype", "float32"])


def test_the_tiny_world_is_planned_for_a_cpu_without_building_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train_rl.main(["--plan"])
    text = capsys.readouterr().out
    assert "IT FITS: yes" in text and "CPU process" in text and "float32" in text and "no model" in text
    assert not (tmp_path / "cache").exists()


def test_of_a_repository_only_the_config_is_fetched(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES["qwen3-4b"]))
    (folder / "model.safetensors").write_bytes(b"never sent")
    assert known_config("some/model") is None
    assert known_config("Qwen/Qwen3-4B")[0] == known_config("qwen3-4b")[0]
    with StandInHub({"some/model": folder}) as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        config, origin = plan.find_config("some/model")
        assert set(hub.sent) == {"config.json"}
    assert memory.sizes(config).total == PUBLISHED["qwen3-4b"] and "only file downloaded" in origin
    assert known_config(str(folder))[0] == config

    def never(seconds):
        raise AssertionError("it waits to try again")

    monkeypatch.setattr(time, "sleep", never)
    with pytest.raises(ConnectionError, match="cannot be reached, and the cache .* lacks config.json of some/other"):
        plan.find_config("some/other")
    with pytest.raises(FileNotFoundError, match="qwen3-8b"):
        plan.find_config("qwen3-8")
