"""Policy-gradient surrogates, per token. Pure functions of log-probs; minimised.

Notation: l = log-prob under the current policy, l_old under the one that sampled, A = advantage, rho = exp(l - l_old).
All tensors (B, T) aligned to tokens, A (B,) or (B, T).
"""

from __future__ import annotations

from typing import Literal

from posttrain.lazy import Tensor, torch
from posttrain.objectives.aggregation import masked

RatioLevel = Literal["token", "sequence", "trajectory"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within this of 0 before they are exponents (as CHORD's code has it). Beyond 88 exp overflows in
float32, and the gradient of a clipped token, whose loss is a constant, is 0 * inf. Beyond the bound there is none."""


def per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages as (B, T)."""
    return advantages.unsqueeze(1).expand_as(like) if advantages.dim() == 1 else advantages


def bounded(log_ratio: Tensor) -> Tensor:
    """The exponent that every ratio here is made with: `log_ratio` within `MAX_LOG_RATIO` of 0, of the same shape."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def out_of_bounds(log_ratio: Tensor) -> Tensor:
    """1 where `bounded` changed something and took the gradient away, else 0; without gradient."""
    return (log_ratio.detach().abs() > MAX_LOG_RATIO).to(log_ratio.dtype)


def log_ratio(logps: Tensor, old_logps: Tensor | None, mask: Tensor, level: RatioLevel = "token") -> Tensor:
    """Logarithm of `importance_ratio` before it is bounded, (B, T), with gradient; arguments as there."""
    difference = masked(logps - (logps.detach() if old_logps is None else old_logps), mask)
    if level == "token":
        return difference
    summed = difference.sum(dim=1, keepdim=True)
    if level == "sequence":
        summed = summed / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return summed.expand_as(logps)


def importance_ratio(logps: Tensor, old_logps: Tensor | None, mask: Tensor, level: RatioLevel = "token") -> Tensor:
    """Importance ratio of the current to the sampling policy, (B, T), with gradient.

    - `token`: exp(l_t - l_old_t) (PPO, GRPO).
    - `sequence`: exp of the mean log-ratio over the row's trained tokens, the same at each of them
      (GSPO, arXiv 2507.18071, eq. 7).
    - `trajectory`: exp of the summed log-ratio (REINFORCE on whole completions, RLOO, arXiv 2402.14740).

    Its logarithm is `bounded`.

    Args:
        old_logps: None when the sampling policy is the current one: the ratio is 1 in value and keeps its gradient.
    """
    return bounded(log_ratio(logps, old_logps, mask, level)).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's clipped surrogate per token: max(-A rho, -A clip(rho, 1 - e_low, 1 + e_high)).

    Equal bounds: PPO (arXiv 1707.06347, eq. 7); e_high > e_low: DAPO's clip-higher (arXiv 2503.14476, eq. 8).

    Args:
        dual_clip: c > 1 bounds the loss of tokens with A < 0 at c |A| (arXiv 1912.09729, eq. 5); None is off.
    """
    advantages = per_token(advantages, ratio)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - epsilon_low, 1 + epsilon_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def clipped_shares(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> tuple[Tensor, Tensor]:
    """Per token, 1 where the clip takes the gradient away at the lower and at the upper bound; each (B, T)."""
    advantages = per_token(advantages, ratio)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return low.to(ratio.dtype), high.to(ratio.dtype)


def soft_surrogate(ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Tensor:
    """SAPO per token: -A (4 / tau) sigmoid(tau (rho - 1)), tau by the sign of A (arXiv 2511.20347; TRL's `sapo`).

    Instead of a clip the gradient fades, as 4 sigma (1 - sigma): 1 at rho = 1, and alike on both sides of it.
    """
    advantages = per_token(advantages, ratio)
    positive, negative = ((4 / tau) * torch.sigmoid(tau * (ratio - 1)) for tau in (tau_positive, tau_negative))
    return -advantages * torch.where(advantages > 0, positive, negative)


def truncated_importance_loss(logps: Tensor, ratio: Tensor, advantages: Tensor, cap: float) -> Tensor:
    """CISPO per token: -sg(min(rho, cap)) A l (arXiv 2506.13585, eq. 4 and 5). No token loses its gradient.

    Args:
        cap: absolute upper bound of the weight, not an excess over 1.
    """
    return -ratio.detach().clamp(max=cap) * per_token(advantages, logps) * logps


def covariances(logps: Tensor, advantages: Tensor, mean_logp: float, mean_advantage: float) -> Tensor:
    """(l - mean l) (A - mean A) of each token, (B, T), without gradient: its part in the covariance of log-prob and
    advantage, by which one step of a policy gradient lowers the entropy (arXiv 2505.22617).

    Args:
        mean_logp, mean_advantage: over all trained tokens of the rollouts.
    """
    return ((logps - mean_logp) * (per_token(advantages, logps) - mean_advantage)).detach()


WeightLevel = Literal["token", "sequence", "geometric"]


def engine_weights(
    logps: Tensor,
    engine_logps: Tensor,
    mask: Tensor,
    high: float,
    *,
    low: float = 0.0,
    level: WeightLevel = "token",
    keeps_extremes: bool = True,
) -> Tensor:
    """Importance weights (B, T) of trainer to engine, exp(l - l_engine), within bounds; 1 outside of the mask.

    Both log-probs are at the weights that sampled, so that only the rounding of the two programs is between them. The
    bounds limit the variance (truncated importance sampling: Ionides, J. Comp. Graph. Stat. 17(2), 2008, eq. 3).

    Args:
        low, high: bounds of a weight.
        level: of each token; of the whole completion, a product, which long ones leave the bounds with more often; or
            its geometric mean per token.
        keeps_extremes: a weight beyond a bound becomes the bound; else it becomes 0 (IcePop, arXiv 2510.18855, for
            tokens).
    """
    levels: dict[WeightLevel, RatioLevel] = {"token": "token", "sequence": "trajectory", "geometric": "sequence"}
    ratio = bounded(log_ratio(logps, engine_logps, mask, levels[level])).exp()
    if keeps_extremes:
        weights = ratio.clamp(low, high)
    else:
        weights = torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
    return torch.where(mask, weights, torch.ones_like(weights))


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) per sampled token: exp(d) - d - 1 with d = l_ref - l `bounded`; >= 0.

    Source: Schulman, "Approximating KL divergence" (2020); GRPO eq. 4.
    """
    difference = bounded(ref_logps - logps)
    return difference.exp() - difference - 1


def soft_overlong_penalty(lengths: Tensor, max_length: int | Tensor, cache: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), (N,) in [-1, 0].

    0 up to `max_length - cache` tokens, then falling linearly to -1 at `max_length`, which is one for all or (N,): what
    was cut gets -1 whatever its limit.
    """
    return ((max_length - cache - lengths.to(torch.get_default_dtype())) / cache).clamp(-1.0, 0.0)
