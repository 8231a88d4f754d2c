"""What runs only on CUDA: decoding by graphs, products and attention in bfloat16, training.

With NANOSAFE_TEST_GPU=1 on the GPU, where there is one; else on a pretended device.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pretend_cuda import DEVICE, pretending
from test_train import rl_args, rows_of, sft_args, without_clock
from tiny_models import random_checkpoint
from world import write_world

import train_rl
import train_sft
from nanosafe.kernels import split_adam
from nanosafe.kernels.row_product import row_product
from nanosafe.model import decode, granite
from nanosafe.model.attention import KVCache, PackedDocuments
from nanosafe.model.decode import joined
from nanosafe.model.weights import StoredTensors, save_tensors
from nanosafe.names import load_model
from nanosafe.parallel import Ranks, choose_device, join_group, shard, unsharded
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams
from nanosafe.text.data import Document
from nanosafe.train.optim import Optimizer
from nanosafe.train.packing import pack, response_logprobs

cuda = nullcontext if torch.cuda.is_available() else pretending
only_pretended = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which cannot be pretended")
ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "granite"])
def test_decoding_multiplies_by_joined_weights(family, tmp_path):
    random_checkpoint(tmp_path, family)
    with cuda():
        model = load_model(tmp_path, device=DEVICE, dtype=torch.float32)
        before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        generate(model, [[3, 4, 5]], SamplingParams(max_new_tokens=2, ignore_eos=True))
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            assert joined([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]) is not None
            assert joined([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.cpu(), before[name])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "granite"])
def test_a_single_sequence_draws_the_same_by_products_of_one_row(family, tmp_path, monkeypatch):
    random_checkpoint(tmp_path, family)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, seed=3)
    [[expected]] = generate(load_model(tmp_path, dtype=torch.float32), [[3, 4, 5]], params)
    calls = []
    monkeypatch.setattr(decode, "ROW_PRODUCTS", True)
    monkeypatch.setattr(decode, "row_product", lambda *args, **kw: calls.append(1) or row_product(*args, **kw))
    with cuda():
        [[found]] = generate(load_model(tmp_path, device=DEVICE, dtype=torch.float32), [[3, 4, 5]], params)
    assert len(calls) == 2 * 2 * 4  # once before the capture and once in it: four products of each of two layers
    assert found.token_ids == expected.token_ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


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


@only_pretended
def test_rows_go_to_the_device_only_when_they_have_changed(tmp_path):
    """17 tokens more are two looks more: nothing is sent, or where a block is new, the tables alone."""
    random_checkpoint(tmp_path, "qwen3")
    sent = []
    with pretending() as machine:
        model = load_model(tmp_path, device=DEVICE)
        for new, block_size in ((18, 64), (35, 64), (18, 32), (35, 32)):
            machine.waits.clear()
            generate(model, [[3, 4, 5]], SamplingParams(max_new_tokens=new, ignore_eos=True), block_size=block_size)
            sent.append(machine.waits["from the host"])
    assert sent[1] == sent[0] and sent[3] == sent[2] + 1


@only_pretended
def test_a_batch_that_shrinks_is_decoded_by_few_graphs(tmp_path):
    random_checkpoint(tmp_path, "qwen3")
    params = [SamplingParams(max_new_tokens=2 + i, ignore_eos=True, seed=i) for i in range(50)]
    with pretending() as machine:
        generate(load_model(tmp_path, device=DEVICE), [[3, 4, 5]] * 50, params)
    assert len(machine.graphs) == 8  # of 64, 48, 32, 16, 8, 4, 2 and 1 rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_heads_that_share_a_key_head_attend_as_on_the_cpu(dtype):
    generator, lengths = torch.Generator().manual_seed(0), [5, 1, 130, 5]
    q, k, v, grad = (torch.randn(sum(lengths), heads, 32, generator=generator) for heads in (8, 2, 2, 8))
    inputs = [x.to(dtype).float().requires_grad_() for x in (q, k, v)]
    expected = PackedDocuments(lengths).attend(0, *inputs, 32**-0.5)
    expected.backward(grad)
    with cuda():
        there = [x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs]
        out = PackedDocuments(lengths, DEVICE).attend(0, *there, 32**-0.5)
        out.backward(grad.to(DEVICE, dtype))
        found = [x.detach().cpu().float() for x in (out, *(x.grad for x in there))]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, (expected, *(x.grad for x in inputs)), strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


@only_pretended
def test_the_low_memory_update_on_cuda_is_the_kernel(monkeypatch):
    with pretending():
        model = torch.nn.Linear(8, 4, bias=False, device=DEVICE, dtype=torch.bfloat16)
        optimizer = Optimizer(model, low_memory=True)
        model.weight.grad = torch.ones(4, 8, device=DEVICE)
        before = model.weight.detach().cpu()
        monkeypatch.setattr(split_adam, "plain_update", None)
        optimizer.step(1.0)
        assert (model.weight.detach().cpu() < before).all()


def test_adamw_on_cuda_is_fused_and_goes_on_from_its_state(tmp_path):
    """It counts its steps on the device; what is saved there must come back there."""
    ends = []
    with cuda():
        for interrupted in (False, True):
            model = torch.nn.Linear(8, 4, device=DEVICE)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(0.5)
            optimizer = Optimizer(model)
            for step in range(4):
                if interrupted and step == 2:
                    save_tensors(optimizer.state(), tmp_path, "optimizer")
                    optimizer = Optimizer(model)
                    optimizer.load_state(StoredTensors(tmp_path, "optimizer"))
                for parameter in model.parameters():
                    parameter.grad = parameter.detach() * (step + 1)
                optimizer.step(0.1)
            assert optimizer.adam.defaults["fused"]
            assert all(state["step"].device == DEVICE for state in optimizer.adam.state.values())
            ends.append([parameter.detach().cpu() for parameter in model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


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
        # Entropies of all rows on both; by default a CPU in float32 scores those of the first mini-batch alone.
        flags = ["--dtype", "float32", *(["--old-logprobs", "trainer"] if script is train_rl else [])]
        on_cpu, on_cuda = (metrics_of(script, world, device, *flags) for device in ("cpu", "cuda"))
        assert on_cuda == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in on_cpu]


@pytest.mark.parametrize("family, flag", [("qwen3", "--recompute=some"), ("qwen3", "--low-memory"),
                                          ("granite4", "--recompute=layer")])  # fmt: skip
def test_training_in_bfloat16_on_cuda(family, flag, tmp_path):
    """Other kernels round elsewhere, so only the first step is nearly that of the CPU."""
    world = write_world(tmp_path, family=family)
    on_cpu, on_cuda = (metrics_of(train_sft, world, device, "--dtype", "bfloat16", flag) for device in ("cpu", "cuda"))
    norms = [row[0].pop("sft/grad_norm") for row in (on_cpu, on_cuda)]
    assert norms[1] == pytest.approx(norms[0], rel=0.03)
    assert on_cuda[0] == pytest.approx(on_cpu[0], rel=0.01)
    for row in metrics_of(train_rl, world, "cuda", flag):  # bfloat16 is the default there
        assert row["policy/skipped"] == 0 and 1e-5 < row["mismatch/mean"] < 0.01


def test_a_group_of_one_rank_trains_a_sharded_model_as_without_a_group(tmp_path):
    """Over nccl on a GPU, over gloo elsewhere: what several ranks do, as far as one device can show it."""
    random_checkpoint(tmp_path, "qwen3")
    ranks = Ranks("cuda" if torch.cuda.is_available() else "cpu", alone=True)
    documents = [Document([3, 4], [5, 6, 7]), Document([8], [9] * 5)]
    ends = []
    join_group(ranks.device, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            model = load_model(tmp_path, device=ranks.device, dtype=torch.float32)
            if sharded:
                shard(model, ranks, torch.float32)
            optimizer = Optimizer(model)
            for _ in range(2):
                train_sft.backward(model, documents, 4, ranks)
                norm = optimizer.step(1e-2)
            with unsharded(model, torch.float32) as whole:
                ends.append([norm, *(parameter.detach().cpu() for parameter in whole.parameters())])
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_nccl_is_told_the_rank_s_device(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    join_group(DEVICE)
    join_group(torch.device("cpu"))
    [(cuda_args, cuda_options), (cpu_args, cpu_options)] = calls
    assert cuda_args == ("nccl",) and cuda_options["device_id"] == DEVICE
    assert cpu_args == ("gloo",) and "device_id" not in cpu_options


@only_pretended
def test_products_in_bfloat16_add_up_in_float32():
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    with pretending():
        Ranks("cuda")
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_a_model_without_a_multiplier_multiplies_nothing(tmp_path):
    random_checkpoint(tmp_path, "qwen3")
    model, seen = load_model(tmp_path, dtype=torch.float32), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.tensor([[3, 4]]))
    assert seen[0] is seen[1]


@only_pretended
@pytest.mark.parametrize("capability, samples, trains", [
    ((8, 0), False, False),
    ((9, 0), True, True),
    ((10, 0), True, False),  # It gives experts without a token a gradient.
    ((12, 0), False, False),  # It reads the experts' numbers of rows on the host.
])  # fmt: skip
def test_where_one_product_is_of_all_experts(capability, samples, trains, monkeypatch):
    with pretending():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        weight = torch.zeros(2, 4, 4, device=DEVICE, dtype=torch.bfloat16)
        assert granite.grouped_kernel_works(weight, training=False) == samples
        assert granite.grouped_kernel_works(weight, training=True) == trains


@only_pretended
@pytest.mark.parametrize("device, capability, problem", [
    (None, (7, 5), "a Tesla T4 of compute capability 7.5.* use --device cpu"),
    ("cuda:0", (7, 0), "capability 7.0"),
    ("cuda:1", (9, 0), "no cuda:1, for PyTorch sees 1 GPU here"),
    ("cuda", (9, 0), "no cuda:3, .* --nproc_per_node"),  # of the fourth process on this node
])  # fmt: skip
def test_a_gpu_that_is_missing_or_too_old_is_refused(device, capability, problem, monkeypatch):
    with pretending():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setenv("LOCAL_RANK", "3" if device == "cuda" else "0")
        with pytest.raises(ValueError, match=problem):
            choose_device(device)
        assert choose_device("cpu").type == "cpu"


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
