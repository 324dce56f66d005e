"""Preference losses, per row. Pure functions of log-probs; minimised.

Notation: s = log-prob of a response (the sum over its tokens, end token included), a = s / its number of tokens, r =
its log-prob under the reference, w chosen, l rejected. Tensors are (B,) unless said otherwise, and nothing is averaged
over rows: the shell divides sums.
"""

from __future__ import annotations

from typing import Literal

from posttrain.lazy import Tensor, functional, torch
from posttrain.objectives.divergences import log1mexp

PairLoss = Literal["sigmoid", "conservative", "robust", "ipo", "hinge"]

LARGEST_MEAN_LOGP = -1e-6
"""Mean log-probs of ASFT are clamped here: above, the odds p / (1 - p) leave float32."""


def same_shape(dim: int, **tensors: Tensor) -> None:
    """Check that all have the same shape, of `dim` dimensions.

    Raises:
        ValueError: they do not; names them.
    """
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != dim for shape in shapes.values()):
        raise ValueError(f"expected {dim} dimension(s) and equal shapes, got {shapes}")


def logistic_loss(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), (B,).

    e = 0: DPO (arXiv 2305.18290, eq. 7); e > 0: conservative DPO, for labels that are wrong with probability e.
    """
    if label_smoothing == 0:
        return -functional.logsigmoid(logits)
    return -(1 - label_smoothing) * functional.logsigmoid(logits) - label_smoothing * functional.logsigmoid(-logits)


def robust_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """[-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2e), (B,): unbiased under label flips (arXiv 2403.00409).

    Args:
        label_smoothing: e, the probability of a flipped label, below 1/2.
    """
    flipped = label_smoothing * functional.logsigmoid(-logits)
    return (flipped - (1 - label_smoothing) * functional.logsigmoid(logits)) / (1 - 2 * label_smoothing)


def hinge_loss(logits: Tensor) -> Tensor:
    """max(0, 1 - z), (B,) (SLiC, arXiv 2305.10425)."""
    return (1 - logits).clamp(min=0)


def ipo_loss(margins: Tensor, tau: float) -> Tensor:
    """(margin - 1 / (2 tau))^2, (B,) (IPO, arXiv 2310.12036, eq. 17)."""
    return (margins - 1 / (2 * tau)) ** 2


def dpo_loss(
    score_w: Tensor, score_l: Tensor, beta: float, loss: PairLoss = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Loss of the margin score_w - score_l, (B,).

    With scores t = s - r and loss `sigmoid` it is DPO (arXiv 2305.18290): -log sigmoid(beta (t_w - t_l)).

    Args:
        score_w, score_l: log-ratios, or f'(u) of them (`objectives.divergences`).
        beta: weight of the divergence from the reference; tau with loss `ipo`.
        label_smoothing: of `conservative` and `robust`; the others do not read it.
    """
    same_shape(1, score_w=score_w, score_l=score_l)
    margins = score_w - score_l
    if loss == "ipo":
        return ipo_loss(margins, beta)
    if loss == "hinge":
        return hinge_loss(beta * margins)
    if loss == "robust":
        return robust_loss(beta * margins, label_smoothing)
    return logistic_loss(beta * margins, label_smoothing if loss == "conservative" else 0.0)


def simpo_loss(
    mean_w: Tensor,
    mean_l: Tensor,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    loss: Literal["sigmoid", "hinge"] = "sigmoid",
) -> Tensor:
    """-log sigmoid(beta (a_w - a_l) - gamma), (B,) (SimPO, arXiv 2405.14734, eq. 6); also the contrast of TPO-L.

    Args:
        mean_w, mean_l: a, log-probs per token.
        gamma: the margin itself, not its ratio to beta.
        loss: `hinge` takes max(0, 1 - (beta (a_w - a_l) - gamma)).
    """
    same_shape(1, mean_w=mean_w, mean_l=mean_l)
    logits = beta * (mean_w - mean_l) - gamma
    return hinge_loss(logits) if loss == "hinge" else logistic_loss(logits, label_smoothing)


def tpo_loss(logps_w: Tensor, logps_l: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (s_w - s_l)), (B,): the contrast of TPO (arXiv 2405.16681), without a reference.

    TPO adds alpha times the token-mean negative log-likelihood of a third, gold response.
    """
    same_shape(1, logps_w=logps_w, logps_l=logps_l)
    return logistic_loss(beta * (logps_w - logps_l))


def log_odds(mean_logps: Tensor) -> Tensor:
    """log p / (1 - p) for p = exp(a), of the shape of `mean_logps`; a is clamped to at most -1e-6."""
    clamped = mean_logps.clamp(max=LARGEST_MEAN_LOGP)
    return clamped - log1mexp(clamped)


def asft_loss(mean_w: Tensor, mean_l: Tensor, lam: float, b: float = 1.0) -> Tensor:
    """-a_w + lambda [-log sigmoid(b o_w) - log sigmoid(-b o_l)] with log-odds o, (B,) (ASFT, arXiv 2409.10571).

    For b = 1 it is -(1 + lambda) a_w - lambda log(1 - exp(a_l)): likelihood plus unlikelihood of whole sequences.

    Args:
        mean_w, mean_l: a, log-probs per token.
        b: tempering of the odds (arXiv 2502.01237); 1 in the method's paper.
    """
    same_shape(1, mean_w=mean_w, mean_l=mean_l)
    aligned = functional.softplus(-b * log_odds(mean_w)) + functional.softplus(b * log_odds(mean_l))
    return -mean_w + lam * aligned


def orpo_loss(mean_w: Tensor, mean_l: Tensor) -> Tensor:
    """-log sigmoid(o_w - o_l) with log-odds o, (B,): the odds ratio of ORPO (arXiv 2403.07691, eq. 7).

    ORPO adds it, times lambda, to the negative log-likelihood of the chosen response.

    Args:
        mean_w, mean_l: a, log-probs per token.
    """
    same_shape(1, mean_w=mean_w, mean_l=mean_l)
    return -functional.logsigmoid(log_odds(mean_w) - log_odds(mean_l))


def cpl_loss(advantage_w: Tensor, advantage_l: Tensor, lam: float, preference: Tensor | float = 1.0) -> Tensor:
    """-p log sigmoid(A_w - lambda A_l) - (1 - p) log sigmoid(A_l - lambda A_w), (B,) (CPL, arXiv 2310.13639).

    Args:
        advantage_w, advantage_l: A = alpha s.
        lam: conservative bias within (0, 1]; below 1 the loss depends on a common shift of both.
        preference: p, the probability that w is the better one; 0.5 for a tie.
    """
    same_shape(1, advantage_w=advantage_w, advantage_l=advantage_l)
    forward = functional.softplus(lam * advantage_l - advantage_w)
    return preference * forward + (1 - preference) * functional.softplus(lam * advantage_w - advantage_l)


def cpl_rank_loss(advantages: Tensor, scores: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """CPL over ranked responses: sum over pairs with score_j > score_i of softplus(lambda A_i - A_j), and their number.

    Pairs of equal score are left out. Each (B,).

    Args:
        advantages, scores: (B, n).
    """
    same_shape(2, advantages=advantages, scores=scores)
    better = scores.unsqueeze(2) > scores.unsqueeze(1)  # [b, j, i]: j is better than i
    losses = functional.softplus(lam * advantages.unsqueeze(1) - advantages.unsqueeze(2))
    kept = torch.where(better, losses, torch.zeros_like(losses))
    return kept.sum(dim=(1, 2)), better.sum(dim=(1, 2)).to(advantages.dtype)


def srpo_losses(
    generator_w: Tensor,
    generator_l: Tensor,
    w_given_l: Tensor,
    l_given_l: Tensor,
    w_given_w: Tensor,
    l_given_w: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The two regressions of SRPO (arXiv 2406.01660), each (B,): generator and reviser.

    - generator: (1 - beta [rho(w|l) + rho(w) - rho(l|w) - rho(l)])^2
    - reviser: (1/2 - beta [rho(w|l) - rho(l|l)])^2 + (1/2 - beta [rho(w|w) - rho(l|w)])^2

    The method minimises (1 - alpha) generator + alpha reviser.

    Args:
        generator_w, generator_l: rho(y), log-ratios to the reference given the prompt.
        w_given_l, ...: rho(y|z), log-ratios of answer y given the prompt and the earlier answer z.
    """
    same_shape(1, w=generator_w, l=generator_l, wl=w_given_l, ll=l_given_l, ww=w_given_w, lw=l_given_w)
    generator = (1 - beta * (w_given_l + generator_w - l_given_w - generator_l)) ** 2
    reviser = (0.5 - beta * (w_given_l - l_given_l)) ** 2 + (0.5 - beta * (w_given_w - l_given_w)) ** 2
    return generator, reviser


def brain_loss(
    logps: Tensor, prior_logps: Tensor, rewards: Tensor, tau: float, proposal_logps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(target || policy) over the n responses of each row (BRAIn, arXiv 2402.02479).

    target = softmax(log prior + reward / tau - log proposal), without gradient;
    policy = softmax(log pi - log proposal). The gradient is -sum_i (target_i - policy_i) grad log pi_i.

    Args:
        logps, prior_logps, rewards: (B, n).
        tau: temperature of the reward.
        proposal_logps: (B, n) under the policy that sampled the responses; None: they come from the prior.

    Returns:
        loss (B,), target weights (B, n), policy weights (B, n).
    """
    same_shape(2, logps=logps, prior_logps=prior_logps, rewards=rewards)
    proposal = prior_logps if proposal_logps is None else proposal_logps
    log_target = (prior_logps + rewards / tau - proposal).detach().log_softmax(dim=1)
    log_policy = (logps - proposal.detach()).log_softmax(dim=1)
    target = log_target.exp()
    # A weight that underflows to 0 has log -inf only if a log-prob has; 0 * finite is 0.
    return (target * (log_target - log_policy)).sum(dim=1), target, log_policy.detach().exp()


def token_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """beta (log pi - log pi_ref) of each token, any shape: the implicit reward of DPO, token by token.

    In the token MDP whose optimal policy is pi it is the advantage r_t + V(s_t+1) - V(s_t) (arXiv 2404.12358); over a
    response it sums to beta times the log-ratio.

    Args:
        logps, ref_logps: at the same temperature, 1.
    """
    if logps.shape != ref_logps.shape:
        raise ValueError(f"log-probs of shape {tuple(logps.shape)} and {tuple(ref_logps.shape)}")
    return beta * (logps - ref_logps)


def online_kl_weights(logps: Tensor, ref_logps: Tensor, groups: Tensor, *, leave_one_out: bool = True) -> Tensor:
    """Detached weights of HyPO's online term, (N,): k = s - r, minus the mean k of the group's other samples (RLOO).

    A sample alone in its group has nothing to be compared with and keeps k, which has the same mean gradient.

    Args:
        logps, ref_logps: (N,) of samples from the current policy, at temperature 1 and without top-p or top-k.
        groups: (N,) int; samples of one prompt share a number. All samples of a group must be here.
        leave_one_out: False gives k.
    """
    same_shape(1, logps=logps, ref_logps=ref_logps, groups=groups)
    k = (logps - ref_logps).detach()
    if not leave_one_out or not k.numel():
        return k
    _, index = groups.unique(return_inverse=True)
    zeros = k.new_zeros(int(index.max()) + 1)
    sizes = zeros.index_add(0, index, torch.ones_like(k))[index]
    # Measured from the group's smallest value: equal samples then give exactly 0.
    lowest = zeros.scatter_reduce(0, index, k, "amin", include_self=False)[index]
    above = k - lowest
    others = (zeros.index_add(0, index, above)[index] - above) / (sizes - 1).clamp(min=1)
    return torch.where(sizes > 1, above - others, k)


def online_kl_surrogate(logps: Tensor, weights: Tensor) -> Tensor:
    """sg[weight] s, (N,): its gradient, averaged over samples of the policy, is that of KL(policy || reference).

    HyPO, arXiv 2406.01462: grad KL = E[k grad log pi], because E[grad log pi] = 0. The value means nothing.
    """
    same_shape(1, logps=logps, weights=weights)
    return weights.detach() * logps
