"""The mathematics of REINFORCE++ (arXiv 2501.03262) as pure functions on tensors; there is no critic.

A rollout becomes `advantages` by way of `token_rewards`, `discounted_returns`, `global_moments` and `standardize`, and
every optimizer step takes `policy_loss`. To log the moments too, call `advantages` with normalize=False, then the last
two. B responses are right-padded to T tokens; `mask` [B, T] is true (or 1) on response tokens, EOS included, and what
lies off it, even NaN, reaches no result and no gradient. Half precision is computed in float32, wider types as they
are. `all_reduce` sums a float64 tensor over the ranks in place; None stands for a single rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ESTIMATORS = ("reinforce++", "reinforce++-baseline")
KL_KINDS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8 is far outside any clip range, and its square is still finite in float32
MIN_VARIANCE = 1e-8  # nearly equal values are scaled by at most 1e4, so that rounding noise does not become signal

AllReduce = Callable[[Tensor], object]


def _check(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")


def _valid(values: Tensor, mask: Tensor) -> Tensor:
    # Zeros off the mask by `where`, not by a product: 0 * NaN is NaN, in the gradient too.
    return torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate in nats of KL(policy || reference) from tokens the policy drew; any shape, differentiable.

    With d = logprobs - ref_logprobs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (J. Schulman, "Approximating KL
    divergence", 2020). Raises ValueError for another kind.
    """
    _check("KL kind", kind, KL_KINDS)
    d = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)) - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d  # expm1, because near d = 0 the terms of k3 cancel


def group_centered(rewards: Tensor, group: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """`rewards` [B] minus the mean reward of their group; float64 [B].

    `group` [B] holds each row's prompt number: small integers >= 0 that mean the same on every rank, for a prompt's
    samples may lie on several. Raises ValueError, on all ranks alike, for a group of one: its advantage would be 0.
    """
    rewards, group = rewards.double(), group.long()
    rows = torch.stack([rewards, torch.ones_like(rewards)])  # [2, B]: reward, count
    totals = rows.new_zeros(2, _group_count(group, all_reduce)).index_add_(1, group, rows)
    sums, counts = _over_ranks(totals, all_reduce)
    if (counts == 1).any():
        raise ValueError("reinforce++-baseline compares a prompt's samples: "
                         "set --samples-per-prompt to 2 or more")
    return rewards - (sums / counts.clamp(min=1))[group]


@torch.no_grad()
def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, *,
                  kl_coef: float, kl_kind: str = "k1", kl_clamp: float | None = None) -> Tensor:
    """r_t = -kl_coef * KL_t + [t is the last valid token] * score, 0 off the mask; for the arguments see `advantages`.

    scores [B] -> float64 [B, T], so that a KL of 1e-4 is not rounded away beside a score of 1e4.
    """
    mask = mask.bool()
    # [B, T]; all false in a row without valid tokens
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    result = torch.where(is_last, scores.double()[:, None], 0.0)
    if kl_coef == 0:
        return result
    if ref_logprobs is None:
        raise ValueError(f"--kl-coef is {kl_coef}, but there are no log-probs of a reference model")
    kl = token_kl(_valid(logprobs, mask), _valid(ref_logprobs, mask), kl_kind)
    if kl_clamp is not None:
        kl = kl.clamp(-kl_clamp, kl_clamp)
    return result - kl_coef * kl


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """A_t = r_t + gamma * A_{t+1} of token rewards [B, T] that are 0 off the mask; [B, T], 0 off the mask."""
    returns = torch.zeros_like(rewards)
    next_return = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        next_return = rewards[:, t] + gamma * next_return
        returns[:, t] = next_return
    return torch.where(mask.bool(), returns, 0.0)


def global_moments(values: Tensor, mask: Tensor,
                   all_reduce: AllReduce | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of values[mask] over all ranks: two float64 scalars, 0 and 0 if there are no values.

    Two passes, for E[x^2] - E[x]^2 loses every digit when the mean is large. The second also corrects the mean (Chan,
    Golub and LeVeque, 1983), which makes the mean of equal values exact and their deviations exactly 0.
    """
    valid = values[mask.bool()].double()
    sums = torch.stack([valid.new_tensor(valid.numel()), valid.sum()])
    count, total = _over_ranks(sums, all_reduce)
    count = count.clamp(min=1)
    deviation = valid - total / count
    sums = torch.stack([deviation.sum(), deviation.square().sum()])
    shift, square = _over_ranks(sums, all_reduce) / count
    return total / count + shift, (square - shift.square()).clamp(min=0)


def standardize(values: Tensor, mask: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(values - mean) / sqrt(max(variance, 1e-8)) of [B, T], computed in float64; 0 off the mask, dtype of `values`."""
    result = (values.double() - mean) / variance.clamp(min=MIN_VARIANCE).sqrt()
    return torch.where(mask.bool(), result, 0.0).to(values.dtype)


def advantages(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, *,
               kl_coef: float, gamma: float = 1.0, estimator: str = "reinforce++",
               group: Tensor | None = None, reward_clip: tuple[float, float] | None = None,
               kl_kind: str = "k1", kl_clamp: float | None = None, normalize: bool = True,
               all_reduce: AllReduce | None = None) -> Tensor:
    """REINFORCE++ advantages [B, T] of a whole rollout, before it is cut into mini-batches; 0 off the mask.

    rewards: [B], finite (a loop skips other rollouts on every rank), after the rule for truncated responses. A row
        without valid tokens still counts in its group's mean.
    logprobs, ref_logprobs: [B, T], of the policy before the update and of the reference model (None if unused).
    kl_coef, kl_kind, kl_clamp: a token's reward is lowered by kl_coef * KL_t, with |KL_t| bounded by kl_clamp.
    estimator: reinforce++-baseline subtracts from R its group's mean and has no KL in the reward: the caller adds
        kl_coef * `kl_loss` to the loss. (For both at once, give reinforce++ the `group_centered` rewards.)
    group: [B], prompt numbers for reinforce++-baseline; see `group_centered`.
    reward_clip: (low, high), of R after its group's mean is subtracted.
    normalize: `standardize` by the `global_moments` of all valid tokens of all ranks; without, these are the returns.
    all_reduce: if given, every rank must call with the same options, also with B = 0.

    float32, or float64 for float64 logprobs. Raises ValueError for a negative kl_coef, an unknown estimator or KL
    kind, missing ref_logprobs or group, and a group of one sample.
    """
    _check("estimator", estimator, ESTIMATORS)
    _check("KL kind", kl_kind, KL_KINDS)
    if kl_coef < 0:
        raise ValueError(f"--kl-coef is {kl_coef}, but a negative one rewards moving away "
                         "from the reference model")
    if estimator == "reinforce++-baseline":
        if group is None:
            raise ValueError("reinforce++-baseline needs `group`, the prompt number of each row")
        rewards, kl_coef = group_centered(rewards, group, all_reduce), 0.0
    if reward_clip is not None:
        rewards = rewards.clamp(*reward_clip)
    per_token = token_rewards(rewards, logprobs, ref_logprobs, mask, kl_coef=kl_coef,
                              kl_kind=kl_kind, kl_clamp=kl_clamp)
    result = discounted_returns(per_token, mask, gamma)
    if normalize:
        result = standardize(result, mask, *global_moments(result, mask, all_reduce))
    return result.to(torch.promote_types(logprobs.dtype, torch.float32))


def policy_loss(new_logprobs: Tensor, old_logprobs: Tensor, adv: Tensor, mask: Tensor, *,
                clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None,
                reduction: str = "token", denominator: Tensor | float | None = None,
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss (arXiv 1707.06347), -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), of [B, T] inputs.

    rho = exp(new_logprobs - old_logprobs), log-ratios bounded by +-20. dual_clip: c > 1 bounds the loss of a token with
    A < 0 by c |A| (arXiv 1912.09729). reduction: `token` divides the sum over tokens by `denominator`, the token count
    of the whole optimizer step; `sequence` the sum of the rows' token means by the step's count of non-empty rows. So
    micro-batches and ranks add up to the loss of one batch; None counts this batch alone.

    Returns the scalar loss, whose gradient flows to new_logprobs only, and float64 scalars that ranks can add:
    `loss_sum` (the loss's numerator), `clip_count` (tokens whose clipped term is the smaller), `ppo_kl_sum` (of old -
    new), `tokens`, `rows` (non-empty ones). Raises ValueError for an unknown reduction or dual_clip <= 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"--dual-clip is {dual_clip}, but it bounds rho and must be greater than 1")
    mask = mask.bool()
    log_ratio = _valid(new_logprobs, mask) - _valid(old_logprobs.detach(), mask)
    adv = _valid(adv.detach(), mask).to(log_ratio.dtype)
    rho = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free, clipped = rho * adv, rho.clamp(1 - clip_low, 1 + clip_high) * adv
    objective = torch.minimum(free, clipped)
    if dual_clip is not None:
        objective = torch.where(adv < 0, torch.maximum(objective, dual_clip * adv), objective)
    loss, loss_sum = _reduce(-objective, mask, reduction, denominator)
    stats = {"loss_sum": loss_sum, "clip_count": (clipped < free).sum(),
             "ppo_kl_sum": -log_ratio.sum(), "tokens": mask.sum(), "rows": mask.any(1).sum()}
    return loss, {name: value.detach().double() for name, value in stats.items()}


def _reduce(losses: Tensor, mask: Tensor, reduction: str,
            denominator: Tensor | float | None) -> tuple[Tensor, Tensor]:
    # Losses [B, T], 0 off the mask -> (loss, its numerator): 0 for an empty batch, but still with a graph behind it.
    _check("reduction", reduction, ("token", "sequence"))
    counted = mask
    if reduction == "sequence":
        losses = losses / mask.sum(1, keepdim=True).clamp(min=1)
        counted = mask.any(1)  # the rows that hold a token
    count = torch.as_tensor(counted.sum() if denominator is None else denominator, device=losses.device)
    return losses.sum() / count.to(losses.dtype).clamp(min=1), losses.sum()


def kl_loss(new_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *,
            kl_clamp: float | None = None, reduction: str = "token",
            denominator: Tensor | float | None = None) -> Tensor:
    """The KL term of reinforce++-baseline, to be added kl_coef times: k2 of [B, T] log-probs, reduced as `policy_loss`.

    k2 only: on tokens the policy drew, its gradient estimates that of KL(policy || reference) without bias, while k1's
    has mean 0. Tokens with k2 above kl_clamp give no gradient.
    """
    mask = mask.bool()
    kl = token_kl(_valid(new_logprobs, mask), _valid(ref_logprobs.detach(), mask), "k2")
    if kl_clamp is not None:
        kl = kl.clamp(max=kl_clamp)
    return _reduce(kl, mask, reduction, denominator)[0]


def _over_ranks(sums: Tensor, all_reduce: AllReduce | None) -> Tensor:
    if all_reduce is not None:
        all_reduce(sums)
    return sums


def _group_count(group: Tensor, all_reduce: AllReduce | None) -> int:
    # A power of two above all group ids, the same on all ranks, which can only add: each marks the bit length of its
    # largest id, and the highest mark on any rank decides.
    marks = torch.zeros(64, dtype=torch.float64, device=group.device)
    marks[int(group.max()).bit_length() if len(group) else 0] = 1
    return 2 ** int(_over_ranks(marks, all_reduce).nonzero().max())
