"""Runs the Triton kernels' tests in the interpreter (NANOSAFE_TEST_GPU=1: on the GPU), and compiles them for sm_90."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from own_process import ROOT, check_passes
from test_paged_attention import paged_case
from test_sample import settings

from nanosafe.kernels import decode_step, row_product, scan, split_adam
from nanosafe.kernels import logprob as head
from nanosafe.kernels import paged_attention as decode
from nanosafe.kernels.row_product import Affine, Norm, Residual, triton_row_product
from nanosafe.kernels.sample_triton import triton_draw

triton = pytest.importorskip("triton", reason="the kernels need Triton; only their plain twins are tested")
FILES = sorted((ROOT / "tests" / "helpers").glob("interpreted_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_on_the_gpu_or_interpreted(file):
    """In a process of its own, because Triton chooses its interpreter when it is imported."""
    check_passes(file, TRITON_INTERPRET="0" if torch.cuda.is_available() else "1")


class Hopper:
    """Stands for the driver of an H100 or H200, so that Triton compiles for one where there is none."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return -1  # never a real device, whose compiled kernels would be mixed up with these

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A list that kernels are compiled into, to machine code for sm_90, when they would be launched.

    So a function that launches kernels can be called with tensors on the CPU; its outputs stay uninitialised.
    """
    if decode.INTERPRETED:
        pytest.skip("Triton's interpreter is on")
    kernels = []

    def bind(kernel, grid):
        return lambda *args, **options: kernels.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", bind)
    triton.runtime.driver.set_active(Hopper())
    yield kernels
    if torch.cuda.is_available():  # else there is no driver to go back to
        triton.runtime.driver.reset_active()


def stack_bytes(kernel, folder: Path) -> int:
    """What each thread has in local memory: 0 unless its registers are too few."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_kernels_compile_for_sm_90(compiled, dtype):
    arguments, _ = paged_case([33, 64], group=4, block_size=16, head_dim=128, dtype=dtype)
    for splits in (1, 3):
        decode.triton_paged_attention(*arguments, splits=splits)
    assert [kernel.metadata.name for kernel in compiled] == ["_attend_share", "_attend_share", "_combine_shares"]
    for attend in compiled[:2]:
        assert "cp.async" in attend.asm["ptx"]  # the next tiles are read while one is used
        assert ("mma.sync" in attend.asm["ptx"]) == (dtype == torch.bfloat16)  # tensor cores
        # Bytes of a processor: three programs fit. One fits the 99 KiB of small cards, from RTX 30 to 50.
        assert 3 * attend.metadata.shared <= 227 * 1024


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("plain", [False, True], ids=["norm and RoPE", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_between_products_compile_for_sm_90(compiled, dtype, plain):
    """In the shapes of Qwen3-8B; in one that neither normalises nor rotates heads, those arguments are None."""
    q, kv, pool = (torch.zeros(shape, dtype=dtype) for shape in ((2, 32, 128), (2, 8, 128), (3, 8, 64, 128)))
    weight, angles, places = torch.zeros(4096, dtype=dtype), torch.zeros(2, 1, 128), torch.zeros(2, dtype=torch.int64)
    norms = None if plain else decode_step.HeadNorms(weight[:128], weight[:128], 1e-6)
    pages = decode_step.Pages(pool, pool, places, places)
    decode_step.triton_rotate_and_write(q, kv, kv, norms, None if plain else (angles, angles), pages)
    x = torch.zeros(2, 4096, dtype=dtype)
    decode_step.triton_add_norm(x, x, weight, 1e-6, 1.0)
    decode_step.triton_swiglu(*torch.zeros(2, 2 * 12_288, dtype=dtype).chunk(2, dim=1))
    assert [kernel.metadata.name for kernel in compiled] == ["_rotate_and_write", "_add_norm", "_swiglu"]
    for kernel in compiled[1:]:
        assert "ld.global.v" in kernel.asm["ptx"]  # wide reads
    for kernel in compiled:
        assert "st.local" not in kernel.asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("early", [False, True], ids=["", "dependent launch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_products_of_one_row_compile_for_sm_90(compiled, dtype, early, monkeypatch, tmp_path):
    """In the shapes of an 8B: q, k and v with biases; gate and up; the two that are added to the residual."""
    monkeypatch.setattr(row_product, "DEPENDENT_LAUNCH", early)
    D, wide, qkv = 4096, 12_288, 4096 + 2 * 1024
    x, y, weight = torch.zeros(1, D, dtype=dtype), torch.zeros(1, wide, dtype=dtype), torch.zeros(wide, D, dtype=dtype)
    norm, residual = Norm(x[0], 1e-6), Residual(x, 1.0)
    triton_row_product(x, Affine(weight[:qkv], y[0, :qkv]), norm=norm)
    triton_row_product(x, Affine(weight, None), Affine(weight, None), norm)
    triton_row_product(x, Affine(weight[:D], None), residual=residual)
    triton_row_product(y, Affine(weight.view(D, wide), None), residual=residual)
    assert [kernel.metadata.name for kernel in compiled] == 4 * ["_row_product"]
    for kernel in compiled:
        before, wait, after = kernel.asm["ptx"].partition("griddepcontrol.wait")
        assert "ld.global" in before and bool(wait) == early == ("ld.global" in after)
        assert ".v4.b32" in before  # 16 bytes a thread
        assert stack_bytes(kernel, tmp_path) == 0 and kernel.metadata.launch_pdl == early


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_scan_kernel_compiles_for_sm_90(compiled, dtype):
    x, B = torch.zeros(2, 48, 64, dtype=dtype), torch.zeros(2, 1, 128, dtype=dtype)  # Granite 4's
    states, slots = torch.zeros(3, 48, 64, 128), torch.zeros(2, dtype=torch.int64)
    scan.triton_scan_step(x, torch.zeros(2, 48), torch.zeros(48), B, B, states, slots)
    [kernel] = compiled
    assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]  # 16 bytes a thread


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_drawing_kernels_compile_for_sm_90(compiled, tmp_path):
    for rows in (63, 64):
        triton_draw(torch.zeros(rows, 151_936), settings(rows))
    assert [kernel.metadata.name for kernel in compiled] == ["_draw_part", "_draw_row", "_draw_row"]
    assert stack_bytes(compiled[0], tmp_path) == 0


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_kernels_compile_for_sm_90(compiled, dtype):
    logits, targets, numbers = torch.zeros(2, 8192), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 2)
    head.triton_row_statistics(logits, targets, 0.6, numbers[:4])
    head.triton_row_gradients(logits, logits.view(dtype)[:, :8192], targets, 0.6, numbers)
    assert [kernel.metadata.name for kernel in compiled] == ["_row_statistics", "_row_gradients"]
    for kernel in compiled:
        assert "ld.global.v4.b32" in kernel.asm["ptx"]  # 16 bytes a thread


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("shape", [(64, 4096), (4096,)], ids=str)
def test_the_optimizer_kernel_compiles_for_sm_90(compiled, shape):
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    step = split_adam.Step.of(1, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    split_adam.triton_update(weight, torch.zeros(shape), split_adam.new_state(weight), step)
    [kernel] = compiled
    if len(shape) == 2:  # rows of whole blocks are read 16 bytes a thread
        assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]
