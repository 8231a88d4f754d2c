"""What CUDA compiles in training: when it is compiled, how often, and that compiled code computes what plain code does.

Run by tests/kernels/test_compiled.py.
"""

import shutil

import pytest
import torch
from pretend_cuda import DEVICE, pretending
from test_decoder import LENGTHS, random_documents
from tiny_models import tiny_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from nanosafe.kernels import compiled
from nanosafe.kernels.scan import within
from nanosafe.model import decoder
from nanosafe.model.attention import PackedDocuments
from nanosafe.model.decoder import add_norm, rotate, swiglu
from nanosafe.model.granite import make_decoder
from nanosafe.model.recompute import RECOMPUTE

FUNCTIONS = {"rotate": rotate, "swiglu": swiglu, "add_norm": add_norm}
WEIGHT = torch.nn.Parameter(torch.linspace(-2, 2, 48).bfloat16())


def arguments(name: str, N: int, scale: float = 1.0) -> tuple:
    """Of N tokens, with gradients wanted as in training."""
    generator = torch.Generator().manual_seed(N)
    rows, others = (torch.randn(N, 48, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    if name == "add_norm":
        return rows, others, WEIGHT, 1e-5, scale
    if name == "swiglu":
        return rows, others
    angles = torch.randn(N, 1, 16, generator=generator)
    return rows.detach().unflatten(1, (3, 16)).requires_grad_(), angles.cos(), angles.sin()


def results(function, inputs: tuple) -> list[torch.Tensor]:
    """Outputs and the gradients of what wants one, from gradients of the outputs that are not uniform."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [x.detach().sin() for x in outputs])]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_compilation_without_a_break_serves_every_number_of_tokens(name):
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend("aot_eager")
    function = torch.compile(FUNCTIONS[name].__wrapped__, dynamic=True, backend=backend)
    seen = set()
    for N in (37, 2, 48, 1000, 3, 16):
        inputs = arguments(name, N)
        for found, expected in zip(results(function, inputs), results(FUNCTIONS[name], inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        seen.add(backend.frame_count)
    assert len(seen) == 1 and not counters["graph_break"]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU inductor needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_bfloat16_compiled_code_rounds_as_plain_code(name):
    plain = FUNCTIONS[name].__wrapped__
    torch._dynamo.reset()
    inputs = arguments(name, 37)
    assert all(map(torch.equal, results(compiled.compiled(plain), inputs), results(plain, inputs)))


@needs_compiler
def test_a_scaled_sum_is_rounded_once_and_its_product_once_more():
    """Granite's: plain code on a CPU rounds the scale itself, on CUDA nothing but the sum."""
    x, update, *_ = arguments("add_norm", 37)
    found = compiled.compiled(add_norm.__wrapped__)(x, update, WEIGHT, 1e-5, 0.22)[0].double()
    product = 0.22 * update.double()
    exact = x.double() + product
    half_a_step = 2**-8  # of bfloat16, relative
    assert ((found - exact).abs() <= half_a_step * (exact.abs() + 1.01 * product.abs())).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which cannot be pretended")
def test_only_training_on_cuda_compiles(monkeypatch):
    made = []
    with pretending():
        monkeypatch.setattr(compiled, "compiled", lambda function: made.append(function) or function)
        for N, gradients in ((5, True), (5, False), (1, True), (0, True)):
            with torch.set_grad_enabled(gradients):
                x = torch.ones(N, 4, device=DEVICE)
                swiglu(x, x)
    with torch.enable_grad():
        swiglu(torch.ones(5, 4), torch.ones(5, 4))
    assert made == [swiglu.__wrapped__]


def test_compiled_functions_are_recomputed_with_the_layer(monkeypatch):
    """Selective recomputation sees no operation in them, and must get its gradients right all the same."""
    for name, function in FUNCTIONS.items():
        twin = torch.compile(function.__wrapped__, dynamic=True, backend="aot_eager")
        monkeypatch.setattr(decoder, name, twin)
    torch.manual_seed(0)
    model, documents = make_decoder(tiny_config("qwen3")), random_documents()
    packed = PackedDocuments(LENGTHS)
    gradients = []
    for recompute in RECOMPUTE:
        model.recompute(recompute)
        model.hidden(torch.cat(documents), packed.positions, packed).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


def test_the_work_of_a_chunk_compiles_as_a_whole_for_any_shape():
    """Traced as on CUDA, forward and backward; the compiler's own code generation is left out, which takes a minute."""
    compiled = torch.compile(within, dynamic=True, fullgraph=True, backend="aot_eager")
    for c, L, H, P, G, S in ((5, 16, 4, 8, 2, 4), (3, 7, 4, 8, 1, 6)):
        torch.manual_seed(c)
        given = [torch.randn(c, L, H, P), torch.rand(c, L, H), -3 * torch.rand(H), *torch.randn(2, c, L, G, S)]
        found = []
        for way in (within, compiled):
            inputs = [tensor.clone().requires_grad_() for tensor in given]
            outputs = way(*inputs)
            sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs).backward()
            found.append([*outputs, *(tensor.grad for tensor in inputs)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
