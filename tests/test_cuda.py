"""What runs only on CUDA: decoding by graphs, products and attention in bfloat16, training.

On a GPU where there is one, else on a pretended device.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pretend_cuda import DEVICE, pretending
from test_train import rl_args, rows_of, sft_args, without_clock
from tiny import random_checkpoint
from world import write_world

import train_rl
import train_sft
from nanosafe import granite
from nanosafe.batches import pack, response_logprobs
from nanosafe.data import Document
from nanosafe.memory import KVCache
from nanosafe.sampler import SamplingParams, generate
from nanosafe.weights import load_model

cuda = nullcontext if torch.cuda.is_available() else pretending
only_pretended = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which cannot be pretended")
PROMPTS = [list(range(5, 55)), [5, 6, 7, 8], list(range(5, 30)) + [3, 4], [9, 10, 11], [3] * 20]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "granite4"])
def test_graphs_draw_what_the_cpu_draws(family, tmp_path, monkeypatch):
    """With small blocks, prefills in parts, shared prompts and too few blocks for all sequences."""
    random_checkpoint(tmp_path, family)
    params = [SamplingParams(max_new_tokens=20 + i, seed=i, n=2, ignore_eos=True, top_p=1 - i / 10) for i in range(5)]
    cpu = load_model(tmp_path, dtype=torch.float32)
    expected = generate(cpu, PROMPTS, params)
    if cuda is pretending:  # whose product for all experts takes float32 too
        monkeypatch.setattr(granite, "grouped_kernel_works", lambda weight, training: weight.is_cuda)
    slots = KVCache.bytes_per_slot(cpu.config, torch.float32)
    with cuda():
        model = load_model(tmp_path, device=DEVICE, dtype=torch.float32)
        found = generate(model, PROMPTS, params, block_size=8, prefill_tokens=32, max_batch=6,
                         cache_bytes=20 * 8 * KVCache.bytes_per_position(cpu.config, torch.float32) + 14 * slots)
    for ours, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@only_pretended
def test_the_host_looks_at_what_was_drawn_every_eighth_step(tmp_path):
    random_checkpoint(tmp_path, "qwen3")
    with pretending() as machine:
        model = load_model(tmp_path, device=DEVICE)
        machine.waits.clear()
        generate(model, [[3, 4, 5]], SamplingParams(max_new_tokens=20, ignore_eos=True))
    assert machine.graphs
    looks = 1 + 3  # after the prefill, which draws a token, and after 8, 8 and 3 steps of decoding
    assert machine.waits.pop("to the host") == 2 * looks  # for tokens and for log-probs
    assert machine.waits.pop("memory given back") == 2  # before the cache is made, and after it is gone
    assert set(machine.waits) == {"from the host"}


@pytest.mark.parametrize("tied", [False, True])
def test_in_bfloat16_the_sampler_has_the_logits_of_training(tied, tmp_path):
    """That is, not rounded to bfloat16."""
    random_checkpoint(tmp_path, "qwen3", tie_word_embeddings=tied)
    with cuda(), torch.no_grad():
        model = load_model(tmp_path, device=DEVICE, dtype=torch.bfloat16)
        packed = pack([Document([3, 4], [5, 6, 7]), Document([8], [9] * 5)], DEVICE)
        scored = response_logprobs(model, packed)[0]
        hidden = model.hidden(packed.tokens, packed.memory.positions, packed.memory)[packed.predicts]
        logprobs = model.logits(hidden).log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
        torch.testing.assert_close(logprobs.cpu(), scored.cpu(), atol=1e-6, rtol=0)


ARGS = {train_sft: sft_args, train_rl: rl_args}


def metrics_of(script, world: Path, device: str, *flags: str) -> list[dict]:
    """What a training script logged, without times and memory, and without what is not defined."""
    out = world / f"{script.__name__}-{device}"
    with cuda() if device == "cuda" else nullcontext():
        script.main(ARGS[script](world, out, "--device", device, *flags))
    return [{k: v for k, v in row.items() if v is not None} for row in without_clock(rows_of(out))]


@pytest.mark.parametrize("family", ["qwen3", "granite4"])
def test_training_on_cuda_is_that_on_the_cpu(family, tmp_path):
    world = write_world(tmp_path, family=family)
    for script in ARGS:
        on_cpu, on_cuda = (metrics_of(script, world, device, "--dtype", "float32") for device in ("cpu", "cuda"))
        assert on_cuda == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in on_cpu]


@pytest.mark.parametrize("flag", ["--no-recompute", "--low-memory"])
def test_training_in_bfloat16_on_cuda(flag, tmp_path):
    """Other kernels round elsewhere, so only the first step is nearly that of the CPU."""
    world = write_world(tmp_path)
    on_cpu, on_cuda = (metrics_of(train_sft, world, device, "--dtype", "bfloat16", flag) for device in ("cpu", "cuda"))
    assert on_cuda[0] == pytest.approx(on_cpu[0], rel=0.01)
    for row in metrics_of(train_rl, world, "cuda", flag):  # bfloat16 is the default there
        assert row["policy/skipped"] == 0 and 1e-5 < row["mismatch/mean"] < 0.01


@only_pretended
def test_on_blackwell_experts_train_one_by_one(monkeypatch):
    """Its grouped product gives experts without a token a gradient."""
    with pretending():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        weight = torch.zeros(2, 4, 4, device=DEVICE, dtype=torch.bfloat16)
        assert granite.grouped_kernel_works(weight, training=False)
        assert not granite.grouped_kernel_works(weight, training=True)


@only_pretended
def test_the_pretended_device_refuses_what_cuda_refuses():
    with pretending() as machine:
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="not all on one device"):
            there + here
        assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may come from the host
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, None, None):
            doubled = there * 2
            there += 1
            with pytest.raises(RuntimeError, match="not permitted"):
                there.sum().item()
            with pytest.raises(RuntimeError, match="not permitted"):
                here.to(DEVICE)
        for expected in ([4, 4, 4], [6, 6, 6]):
            graph.replay()
            assert doubled.tolist() == expected
        assert machine.waits["to the host"] == 3
