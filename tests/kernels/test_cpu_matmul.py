"""Products by oneDNN: forced on any CPU that has it, against float64, and chosen only where they are meant."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_sampler import models
from tiny_models import decoder_like, tiny_raw

from nanosafe.kernels import cpu_matmul as products
from nanosafe.kernels.logprob import token_logprob_entropy

AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


def onednn_works() -> bool:
    try:
        products.onednn_linear(torch.ones(2, 32), torch.eye(32))
        return True
    except (AttributeError, RuntimeError):
        return False


@pytest.fixture
def forced(monkeypatch) -> list[torch.Size]:
    """All float32 products with weights go to oneDNN; the shapes of their results, as they are computed."""
    if not onednn_works():
        pytest.skip("this PyTorch has no oneDNN products on this CPU")
    found, real = [], torch.ops.mkldnn._linear_pointwise

    def multiply(x, weight, *rest):
        assert weight.is_contiguous() or weight.T.is_contiguous()  # else oneDNN takes a reference loop
        product = real(x, weight, *rest)
        found.append(product.shape)
        return product

    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=multiply))
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "SMALLEST", 1)
    return found


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, inputs, outputs", [
    ((1,), 5, 7), ((300,), 33, 64), ((300,), 64, 33), ((2, 3, 4), 16, 9)])  # fmt: skip
def test_linear_and_its_gradients_equal_float64(rows, inputs, outputs, bias, forced):
    x, upstream = random(*rows, inputs), random(*rows, outputs)
    weight, offset = random(outputs, inputs), random(outputs)
    results = []
    for dtype, product in ((torch.float32, products.linear), (torch.float64, F.linear)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, *([offset] if bias else []))]
        out = product(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
    assert len(forced) == 3  # the product and those of both gradients
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight, offset if bias else None), results[0][0])


def test_numbers_of_rows_share_products(forced, monkeypatch):
    """oneDNN compiles a product for each shape of its factors: 65 to 128 rows need one each for the result and for both
    gradients. Fewer rows, as sampling has them, are computed as they are."""
    factors, real = set(), products.onednn_linear

    def record(x, weight, bias=None):
        factors.add((*x.shape, *weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(products, "onednn_linear", record)
    weight = random(5, 8).requires_grad_()
    for rows in (65, 100, 127, 128):
        x = random(rows, 8).requires_grad_()
        products.linear(x, weight).sum().backward()
        assert x.grad.shape == (rows, 8)
    assert factors == {(128, 8, 5, 8), (128, 5, 8, 5), (5, 128, 8, 128)}
    factors.clear()
    products.linear(random(63, 8), weight.detach())
    assert factors == {(63, 8, 5, 8)}


def test_a_gradient_nobody_wants_is_not_computed(forced):
    x, weight = random(30, 8).requires_grad_(), random(6, 8)
    products.linear(x, weight).sum().backward()
    assert forced == [(30, 6), (30, 8)]
    forced.clear()
    products.linear(x.detach(), weight.requires_grad_()).sum().backward()
    assert forced[0] == (30, 6) and weight.grad.shape == (6, 8) and len(forced) == 2


def test_weights_with_gaps_between_rows_are_made_dense(forced):
    x, wide = random(9, 8), random(5, 20)
    torch.testing.assert_close(products.linear(x, wide[:, :8]), x @ wide[:, :8].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products.linear(x, wide.T[:8].T), x @ wide[:, :8].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "granite", "granite4"])
def test_a_model_and_its_gradients_are_those_of_float64(family, forced):
    model = decoder_like(models(family)[0], tiny_raw(family)) if family != "granite4" else models(family)[1]
    ids = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        twin = type(model)(model.config).to(dtype)
        twin.load_state_dict(model.state_dict())
        logits = twin(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append({name: weight.grad for name, weight in twin.named_parameters()})
    assert len(forced) > 20
    for name, exact in gradients[1].items():
        torch.testing.assert_close(gradients[0][name].double(), exact, rtol=1e-3, atol=1e-5, msg=name)


def test_the_head_equals_float64(forced):
    hidden, weight, targets = random(210, 24), random(100, 24), torch.arange(210) % 100
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        logprobs, entropies = token_logprob_entropy(*leaves, targets, columns=70)
        results.append([logprobs, entropies, *torch.autograd.grad((logprobs + 0.3 * entropies).sum(), leaves)])
    # The logits of both tiles, and in backward before the hidden states' gradient once more; 210 rows filled up to 256.
    assert forced == [(256, 70), (256, 30), (256, 70), (256, 24), (256, 30), (256, 24)]
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("maker, capability, works, slow", [
    (AMD, "AVX512", True, True),
    (INTEL, "AVX512", True, False),  # MKL uses all of it
    (AMD, "AVX2", True, False),  # there is no more to use
    (None, "AVX512", True, False),  # not Linux: nobody knows the maker
    (AMD, "AVX512", False, False),
])  # fmt: skip
def test_only_where_mkl_leaves_avx512_unused(maker, capability, works, slow, monkeypatch, tmp_path):
    def refuse(*_):
        raise RuntimeError("no oneDNN here")

    info = tmp_path / "cpuinfo"
    if maker:
        info.write_text(maker)
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    functions = SimpleNamespace(_linear_pointwise=(lambda x, *_: x) if works else refuse)
    monkeypatch.setattr(torch.ops, "mkldnn", functions)
    products.mkl_is_slow.cache_clear()
    try:
        assert products.mkl_is_slow() == slow
    finally:
        products.mkl_is_slow.cache_clear()


def test_what_stays_with_torch(monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    x, weight = torch.ones(64, 128), torch.ones(256, 128)  # 2**21 multiplications
    assert products.prefers_onednn(x, weight) and not products.prefers_onednn(x[:-1], weight)
    assert not products.prefers_onednn(x.double(), weight.double())
    assert not products.prefers_onednn(x.bfloat16(), weight.bfloat16())  # torch gives these to oneDNN by itself
    assert not products.prefers_onednn(x.to("meta"), weight.to("meta"))
