"""REINFORCE++ mathematics against a slow float64 reference in plain Python, OpenRLHF's outputs, two real processes."""

import itertools
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.testing import assert_close

import nanosafe.train.reinforce as rl
from nanosafe.train.metrics import gap_stats

LENGTHS = [5, 1, 0, 7, 3, 9, 2, 4]  # response tokens of each row
GROUP = [0, 3, 0, 3, 0, 5, 5, 3]


def rollout(seed: int, lengths: list[int], dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random ragged rows; off the mask every tensor is NaN or infinite, so that each use of this checks the masking."""
    gen = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 2)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    old, ref, new, roll, adv = torch.randn(5, *shape, generator=gen, dtype=torch.float64)
    data = {"old": old, "ref": old + 0.3 * ref, "new": old + 0.3 * new, "roll": old + 0.3 * roll, "adv": adv}
    garbage = itertools.cycle([math.nan, math.inf, -math.inf])
    data = {name: torch.where(mask, value, next(garbage)).to(dtype) for name, value in data.items()}
    return data | {"mask": mask, "rewards": 3 * torch.randn(len(lengths), generator=gen)}


def slow_kl(logprob: float, ref: float, kind: str) -> float:
    d = logprob - ref
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


def slow_advantages(data, *, kl_coef, gamma=1.0, group=None, reward_clip=None, kl_kind="k1", kl_clamp=None,
                    normalize=True):
    rewards, rows = data["rewards"].tolist(), []
    for i, length in enumerate(data["mask"].sum(1).tolist()):
        score = rewards[i]
        if group is not None:
            mates = [r for r, g in zip(rewards, group, strict=True) if g == group[i]]
            score -= sum(mates) / len(mates)
        if reward_clip is not None:
            score = min(max(score, reward_clip[0]), reward_clip[1])
        row = []
        for t in range(length):
            kl = slow_kl(data["old"][i, t].item(), data["ref"][i, t].item(), kl_kind)
            if kl_clamp is not None:
                kl = min(max(kl, -kl_clamp), kl_clamp)
            row.append((score if t == length - 1 else 0.0) - (0.0 if group is not None else kl_coef * kl))
        rows.append([sum(r * gamma ** (u - t) for u, r in enumerate(row) if u >= t) for t in range(length)])
    if normalize:
        values = [a for row in rows for a in row]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(max(math.fsum((a - mean) ** 2 for a in values) / len(values), 1e-8))
        rows = [[(a - mean) / std for a in row] for row in rows]
    width = data["mask"].shape[1]
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def slow_policy_loss(data, *, clip_low=0.2, clip_high=0.2, dual_clip=None, reduction="token"):
    rows, clipped, ppo_kl = [], 0, 0.0
    for i, length in enumerate(data["mask"].sum(1).tolist()):
        row = []
        for t in range(length):
            new, old, adv = (data[name][i, t].item() for name in ("new", "old", "adv"))
            rho = math.exp(min(max(new - old, -20), 20))
            bounded = min(max(rho, 1 - clip_low), 1 + clip_high)
            clipped += bounded * adv < rho * adv
            ppo_kl += old - new
            loss = -min(rho * adv, bounded * adv)
            row.append(min(loss, -dual_clip * adv) if dual_clip is not None and adv < 0 else loss)
        rows.append(row)
    tokens, means = sum(rows, []), [sum(row) / len(row) for row in rows if row]
    parts = tokens if reduction == "token" else means
    return sum(parts) / len(parts), {"loss_sum": sum(parts), "clip_count": clipped, "ppo_kl_sum": ppo_kl,
                                     "tokens": len(tokens), "rows": len(means)}


def loss_and_grad(function, new, *args, **kwargs):
    new = new.clone().requires_grad_()
    out = function(new, *args, **kwargs)
    loss = out[0] if isinstance(out, tuple) else out
    return loss.detach(), torch.autograd.grad(loss, new)[0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_token_kl_and_its_gradient_match_the_formulas(kind):
    logprobs = torch.tensor([-1.0, -0.5, -3.0, -2.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -1.5, -0.1, -2.0 - 1e-5], dtype=torch.float64)
    kl = rl.token_kl(logprobs, ref, kind)
    assert_close(kl, torch.tensor([slow_kl(a, b, kind) for a, b in zip(logprobs.tolist(), ref.tolist(), strict=True)],
                                  dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: rl.token_kl(x, ref, kind), logprobs)
    # k3 near 0 is d^2 / 2; in float32, exp(-d) - 1 + d without expm1 has no correct digit there.
    tiny = rl.token_kl(torch.tensor([1e-4]), torch.tensor([0.0]), "k3")
    assert_close(tiny, torch.tensor([5e-9]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("options", [
    {}, {"kl_coef": 0.0}, {"gamma": 0.9}, {"kl_kind": "k2"}, {"kl_kind": "k3", "gamma": 0.97}, {"kl_clamp": 0.1},
    {"reward_clip": (-2.0, 1.0)}, {"normalize": False, "gamma": 0.5}, {"group": GROUP},
    {"group": GROUP, "reward_clip": (-1.0, 0.5), "gamma": 0.99}, {"group": GROUP, "normalize": False},
])
def test_advantages_match_the_slow_reference(options):
    options = {"kl_coef": 0.2} | options
    grouped = {"group": torch.tensor(GROUP), "estimator": "reinforce++-baseline"} if "group" in options else {}
    for seed in range(3):
        data = rollout(seed, LENGTHS)
        expected = slow_advantages(data, **options)
        args = data["rewards"], data["old"], data["ref"], data["mask"]
        assert_close(rl.advantages(*args, **options | grouped), expected, rtol=1e-11, atol=1e-11)
        if options.get("normalize", True):  # the way of a loop that logs the moments
            returns = rl.advantages(*args, **options | grouped, normalize=False)
            parts = rl.standardize(returns, data["mask"], *rl.global_moments(returns, data["mask"]))
            assert_close(parts, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"clip_high": 0.4}, {"clip_low": 0.05}, {"dual_clip": 1.3}])
def test_policy_loss_stats_and_gradient_match_the_slow_reference_and_finite_differences(options, reduction):
    data = rollout(5, LENGTHS)
    new, old, adv, mask = (data[name] for name in ("new", "old", "adv", "mask"))
    loss, stats = rl.policy_loss(new, old, adv, mask, reduction=reduction, **options)
    slow_loss, slow_stats = slow_policy_loss(data, reduction=reduction, **options)
    assert loss.item() == pytest.approx(slow_loss, rel=1e-12)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(slow_stats, rel=1e-12)
    assert stats["clip_count"] > 0 and all(value.dtype == torch.float64 for value in stats.values())
    grad = loss_and_grad(rl.policy_loss, new, old, adv, mask, reduction=reduction, **options)[1]
    assert (grad[~mask] == 0).all()
    finite = torch.where(mask, new, 0.0).requires_grad_()  # finite differences need finite points
    assert torch.autograd.gradcheck(
        lambda x: rl.policy_loss(x, old, adv, mask, reduction=reduction, **options)[0], finite)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_kl_loss_is_the_reduced_k2_and_gives_no_gradient_beyond_the_clamp(reduction):
    data = rollout(6, LENGTHS)
    new, ref, mask = data["new"], data["ref"], data["mask"]
    for clamp in (None, 0.02):
        loss, grad = loss_and_grad(rl.kl_loss, new, ref, mask, kl_clamp=clamp, reduction=reduction)
        rows = [[slow_kl(a.item(), b.item(), "k2") for a, b in zip(n[m], r[m], strict=True)]
                for n, r, m in zip(new, ref, mask, strict=True) if m.any()]
        rows = [[min(kl, clamp or math.inf) for kl in row] for row in rows]
        parts = sum(rows, []) if reduction == "token" else [sum(row) / len(row) for row in rows]
        assert loss.item() == pytest.approx(sum(parts) / len(parts), rel=1e-12)
        free = mask if clamp is None else mask & ((new - ref) ** 2 / 2 < clamp)
        assert ((grad != 0) == free).all() and free.sum() > 5
        assert (grad.sign() == (new - ref).sign())[free].all()  # descending pulls the policy towards the reference


def test_gap_stats_match_the_formulas_and_an_empty_batch_is_zero():
    data = rollout(7, LENGTHS)
    gaps = (data["roll"] - data["old"])[data["mask"]].tolist()
    expected = {"k1_sum": sum(gaps), "k3_sum": sum(slow_kl(d, 0, "k3") for d in gaps), "abs_max": max(map(abs, gaps)),
                "abs_sum": sum(map(abs, gaps)), "tokens": len(gaps)}
    stats = {name: value.item() for name, value in gap_stats(data["roll"], data["old"], data["mask"]).items()}
    assert stats == pytest.approx(expected, rel=1e-12)
    assert all(value == 0 for value in gap_stats(*torch.zeros(2, 0, 3), torch.zeros(0, 3)).values())


@pytest.fixture(scope="module")
def oracle(assets):
    """{case: (its options, its tensors)} and the tolerance for each kind of output."""
    info = json.loads((assets / "oracle" / "vectors.json").read_text())
    tensors = load_file(assets / "oracle" / "vectors.safetensors")
    cases = {case: (spec, {key.removeprefix(f"{case}/"): value for key, value in tensors.items()
                           if key.startswith(f"{case}/")}) for case, spec in info["cases"].items()}
    return cases, {name: {"rtol": 0.0} | spec for name, spec in info["tolerance"].items() if isinstance(spec, dict)}


def test_oracle_kl_token_rewards_returns_and_advantages(oracle):
    cases, tolerances = oracle
    for case, (spec, tensors) in cases.items():
        rewards, old, ref, group = (tensors[f"in/{name}"] for name in ("rewards", "old_logp", "ref_logp", "group"))
        mask, gamma, kl_coef = tensors["in/mask"].bool(), spec["gamma"], spec["kl_coef"]

        def same(actual, key, kind="default", mask=mask, tensors=tensors):
            assert_close(actual.float()[mask], tensors[f"openrlhf/{key}"][mask], **tolerances[kind])

        for kind in ("k1", "k2", "k3"):
            same(rl.token_kl(old, ref, kind).clamp(-10, 10), f"kl_{kind}")
        equal = case == "equal_rewards_zero_kl"  # its tolerance is for OpenRLHF's amplified noise; ours must be 0
        options = {"kl_coef": kl_coef, "gamma": gamma, "kl_clamp": 10.0, "reward_clip": spec["clip_range"]}
        runs = {"reinforce": rewards}
        if spec["group"] > 1:
            # OpenRLHF's reinforce_baseline has the KL in the reward; ours is its variant with a KL loss.
            runs["reinforce_baseline"] = rl.group_centered(rewards, group)
            adv = rl.advantages(rewards, old, ref, mask, **options, estimator="reinforce++-baseline", group=group)
            same(adv, "reinforce_baseline_klloss/advantages", "group_advantages")
        for name, scores in runs.items():
            adv = rl.advantages(scores, old, ref, mask, **options)
            kind = "advantages" if name == "reinforce" else "group_advantages"
            same(adv, f"{name}/advantages", case if equal else kind)
            assert adv.dtype == torch.float32 and (adv[~mask] == 0).all() and (not equal or (adv == 0).all())
            scores = scores.clamp(*spec["clip_range"])
            per_token = rl.token_rewards(scores, old, ref, mask, kl_coef=kl_coef, kl_clamp=10.0)
            returns = rl.discounted_returns(per_token, mask, gamma)
            same(per_token, f"{name}/token_reward")
            same(returns, f"{name}/returns")
            if name == "reinforce":
                same(returns - rl.global_moments(returns, mask)[0], f"{name}/advantages_no_std", "advantages")


def test_oracle_policy_losses_gradients_and_metrics(oracle):
    cases, tolerances = oracle
    names = ("old_logp", "ref_logp", "new_logp", "loss_advantages", "mask")
    token = "loss_lo0.2_hi0.2_dualNone_token"
    for _, tensors in cases.values():
        old, ref, new, adv, mask = (tensors[f"in/{name}"] for name in names)
        expected = {key.removeprefix("openrlhf/"): value for key, value in tensors.items()}
        ppo = (rl.policy_loss, old, adv, mask)
        for name, (function, *args), options in (
            (token, ppo, {}),
            ("loss_lo0.2_hi0.2_dualNone_seq", ppo, {"reduction": "sequence"}),
            ("loss_lo0.2_hi0.28_dual3.0_token", ppo, {"clip_high": 0.28, "dual_clip": 3.0}),
            ("klloss_k2", (rl.kl_loss, ref, mask), {"kl_clamp": 10.0}),
        ):
            loss, grad = loss_and_grad(function, new, *args, **options)
            assert_close(loss, expected[f"{name}/loss"], **tolerances["losses"])
            assert_close(grad, expected[f"{name}/grad"], **tolerances["losses"])
        stats = rl.policy_loss(new, old, adv, mask)[1]
        for ours, theirs in (("clip_count", "clip_ratio"), ("ppo_kl_sum", "ppo_kl")):
            mean = (stats[ours] / stats["tokens"]).float()
            assert_close(mean, expected[f"{token}/{theirs}"], **tolerances["default"])
        # Two ranks with half of the rows each, whose losses are averaged and not added: hence the factor 2.
        parts = [2 * rl.policy_loss(new[r], old[r], adv[r], mask[r], denominator=int(mask.sum()))[0]
                 for r in (slice(len(mask) // 2), slice(len(mask) // 2, None))]
        assert_close(torch.stack(parts), expected["loss_sharded_parts"], **tolerances["losses"])


@pytest.mark.parametrize("reward", [0.1, 0.7, -1234.567, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_advantages(reward, dtype):
    data = rollout(8, [7, 3, 0, 11, 13, 1, 9])
    rewards = torch.full((7,), reward, dtype=dtype)
    adv = rl.advantages(rewards, data["old"], data["old"], data["mask"], kl_coef=0.01)
    assert (adv == 0).all()
    adv = rl.advantages(rewards.float(), data["old"], None, data["mask"], kl_coef=0.0, estimator="reinforce++-baseline",
                        group=torch.tensor([1, 0, 1, 0, 1, 0, 1]))
    assert (adv == 0).all()


def test_huge_mean_and_small_spread_stay_accurate():
    data = rollout(9, LENGTHS, dtype=torch.float32)
    data["rewards"] = 1e4 + torch.arange(len(LENGTHS)) * 2.0**-9
    actual = rl.advantages(data["rewards"], data["old"], data["ref"], data["mask"], kl_coef=0.001)
    assert actual.dtype == torch.float32
    assert_close(actual.double(), slow_advantages(data, kl_coef=0.001), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4), (0, 4), (2, 0), (0, 0)])
def test_without_valid_tokens_advantages_losses_and_gradients_are_zero(shape):
    garbage, mask = torch.full(shape, math.nan), torch.zeros(shape)
    assert (rl.advantages(torch.ones(shape[0]), garbage, garbage, mask, kl_coef=0.1, gamma=0.9) == 0).all()
    for reduction in ("token", "sequence"):
        for args in ((rl.policy_loss, garbage, garbage, garbage), (rl.kl_loss, garbage, garbage)):
            loss, grad = loss_and_grad(*args, mask, reduction=reduction)
            assert loss == 0 and (grad == 0).all() and grad.shape == shape


def test_a_log_ratio_of_1000_gives_finite_loss_and_gradient():
    new, old, adv = torch.tensor([[0.0, -1000.0]]), torch.tensor([[-1000.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    loss, grad = loss_and_grad(rl.policy_loss, new, old, adv, torch.ones(1, 2))
    assert loss.item() == pytest.approx(math.exp(20) / 2, rel=1e-5) and (grad == 0).all()
    assert rl.policy_loss(new, old, adv, torch.ones(1, 2), dual_clip=3.0)[0].item() == pytest.approx(1.5)


def test_half_precision_is_computed_in_float32_and_other_float64_inputs_do_not_change_that():
    data = rollout(11, LENGTHS, dtype=torch.bfloat16)
    new, old, ref, adv, mask = (data[name] for name in ("new", "old", "ref", "adv", "mask"))
    denominator = torch.tensor(sum(LENGTHS), dtype=torch.float64)
    for function, *args in ((rl.policy_loss, old, adv), (rl.kl_loss, ref)):
        loss, grad = loss_and_grad(function, new, *args, mask)
        args[-1] = args[-1].double() if function is rl.policy_loss else args[-1]
        wide_loss, wide_grad = loss_and_grad(function, new.float(), *args, mask, denominator=denominator)
        assert loss.dtype == wide_loss.dtype == torch.float32
        assert loss == wide_loss and torch.equal(grad, wide_grad.bfloat16())
    actual = rl.advantages(data["rewards"], old, ref, mask, kl_coef=0.1)
    assert actual.dtype == torch.float32
    assert_close(actual.double(), slow_advantages(data, kl_coef=0.1), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_new_logprobs_only():
    data = rollout(16, LENGTHS)
    new, old, ref, adv = leaves = [data[name].requires_grad_() for name in ("new", "old", "ref", "adv")]
    assert not rl.advantages(data["rewards"], old, ref, data["mask"], kl_coef=0.1).requires_grad
    loss = rl.policy_loss(new, old, adv, data["mask"])[0] + rl.kl_loss(new, ref, data["mask"])
    assert [g is not None for g in torch.autograd.grad(loss, leaves, allow_unused=True)] == [True, False, False, False]


def test_a_prefix_and_a_gap_in_the_mask_hold_zeros():
    mask, zeros = torch.tensor([[0, 1, 0, 1, 0]]), torch.zeros(1, 5)
    returns = rl.advantages(torch.tensor([8.0]), zeros, None, mask, kl_coef=0.0, gamma=0.5, normalize=False)
    assert returns.tolist() == [[0.0, 2.0, 0.0, 8.0, 0.0]]


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_micro_batches_add_up_to_the_single_batch(reduction):
    data = rollout(12, LENGTHS)
    denominator = sum(LENGTHS) if reduction == "token" else sum(length > 0 for length in LENGTHS)
    for function, keys in ((rl.policy_loss, ("new", "old", "adv", "mask")), (rl.kl_loss, ("new", "ref", "mask"))):
        whole, whole_grad = loss_and_grad(function, *(data[key] for key in keys), reduction=reduction)
        for cuts in ([0, 1, 8], [0, 2, 3, 3, 6, 8], list(range(9))):  # one part is [0, T], one all masked
            parts = [loss_and_grad(function, *(data[key][a:b] for key in keys), reduction=reduction,
                                   denominator=denominator) for a, b in itertools.pairwise(cuts)]
            assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=1e-14)
            assert_close(torch.cat([grad for _, grad in parts]), whole_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("message, options", [
    ("--kl-coef is -0.1", {"kl_coef": -0.1}),
    ("no log-probs of a reference model", {"ref_logprobs": None}),
    ("'k4'; valid: k1, k2, k3", {"kl_coef": 0.0, "kl_kind": "k4"}),
    ("'grpo'; valid: reinforce[+]{2}, reinforce[+]{2}-baseline", {"estimator": "grpo"}),
    ("needs `group`", {"estimator": "reinforce++-baseline"}),
    ("--samples-per-prompt to 2", {"estimator": "reinforce++-baseline", "group": torch.tensor([1, 0, 1])}),
    ("'mean'; valid: token, sequence", {"reduction": "mean"}),
    ("--dual-clip is 0.9", {"dual_clip": 0.9}),
])
def test_wrong_options_are_refused_with_the_cure_in_the_message(message, options):
    logprobs, mask = torch.zeros(3, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match=message):
        if {"reduction", "dual_clip"} & options.keys():
            rl.policy_loss(logprobs, logprobs, logprobs, mask, **options)
        rl.advantages(**{"rewards": torch.ones(3), "logprobs": logprobs, "ref_logprobs": logprobs, "mask": mask,
                         "kl_coef": 0.1} | options)


# Which rows each rank holds: unequal counts, one rank without rows, groups split across ranks with unlike largest ids.
SPLITS = [([0, 1, 2, 3, 4], [5, 6, 7]), ([], list(range(8))), ([5, 6, 2], [7, 1, 4, 3, 0]), (list(range(8)), [])]
RANK_OPTIONS = [{"kl_coef": 0.1, "gamma": 0.95}, {"kl_coef": 0.1, "estimator": "reinforce++-baseline"}]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # two processes, and other tests may run beside them
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    shapes, results = [], []

    def all_reduce(tensor):
        assert tensor.dtype == torch.float64
        shapes.append(tuple(tensor.shape))
        dist.all_reduce(tensor)

    data, group = rollout(14, LENGTHS), torch.tensor(GROUP)
    for split, options in itertools.product(SPLITS, RANK_OPTIONS):
        rows = torch.tensor(split[rank], dtype=torch.long)
        rewards, old, ref, new, mask = (data[name][rows] for name in ("rewards", "old", "ref", "new", "mask"))
        adv = rl.advantages(rewards, old, ref, mask, group=group[rows], all_reduce=all_reduce, **options)
        loss, stats = rl.policy_loss(new, old, adv, mask, denominator=sum(LENGTHS))
        totals = torch.stack([loss.double(), *stats.values()])
        dist.all_reduce(totals)
        results.append((adv, totals))
    try:  # rank 1 alone holds the prompt with one sample
        rl.advantages(torch.ones(2), *torch.zeros(2, 2, 3), torch.ones(2, 3), kl_coef=0.0, all_reduce=all_reduce,
                   estimator="reinforce++-baseline", group=torch.tensor([[0, 0], [0, 9]][rank]))
        message = "none"
    except ValueError as error:
        message = str(error)
    torch.save((shapes, results, message), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_advantages_and_loss_of_one(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    outputs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert outputs[0][0] == outputs[1][0]  # the same collectives in the same shapes, whatever a rank holds
    assert all("--samples-per-prompt" in message for _, _, message in outputs)
    data = rollout(14, LENGTHS)
    for i, (split, options) in enumerate(itertools.product(SPLITS, RANK_OPTIONS)):
        slow_options = {"kl_coef": 0.1, "group": GROUP} if "estimator" in options else options
        expected = slow_advantages(data, **slow_options)
        for rank in range(2):
            assert_close(outputs[rank][1][i][0], expected[split[rank]], rtol=1e-11, atol=1e-11)
        slow_loss, slow_stats = slow_policy_loss(data | {"adv": expected})
        assert outputs[0][1][i][1].tolist() == pytest.approx([slow_loss, *slow_stats.values()], rel=1e-10)
