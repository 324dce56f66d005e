"""What the methods share that compare two responses of a row: counting, summing, diagnostics."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from posttrain.lazy import Tensor
from posttrain.methods.base import C, PreferenceMethod
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import LossSum, PreferenceBatch, TokenBatch
from posttrain.objectives.sequences import lengths, log_ratios, sequence_logps

SATURATED = 4.6
"""Logits above which the gradient weight sigmoid(-z) is below 1%."""

TIE = 1e-6
"""Rewards that differ by no more are equal: rounding alone parts those of a policy that is its own reference."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What a method makes of B rows; all (B,).

    Attributes:
        losses: with gradient.
        rewards: of the chosen and of the rejected response, as the loss compares them.
        logits: what the loss saturates in; None where it does not.
        further: name of a metric -> its value per row.
    """

    losses: Tensor
    rewards: tuple[Tensor, Tensor]
    logits: Tensor | None = None
    further: dict[str, Tensor] = field(default_factory=dict)


class PairMethod(PreferenceMethod[C]):
    """A loss per row that compares `chosen` and `rejected`, and optionally the likelihood of one response.

    Terms: what `term` says (unit: pairs), and with a `likelihood` also `nll` (unit: tokens).
    """

    @abstractmethod
    def compare(self, rows: PreferenceBatch) -> Compared:
        """The loss of each row; every response of every row has a trained token. There may be no row."""

    @property
    def likelihood(self) -> tuple[str, float]:
        """Role and weight of a response whose negative log-likelihood is added; weight 0 is off."""
        return "chosen", 0.0

    def counts(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        counts, (role, weight) = super().counts(batch), self.likelihood
        if weight > 0:
            counts["nll"] = lengths(batch.responses[role].rows(batch.usable)).sum()
        return counts

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        rows = batch.rows(batch.usable)
        compared = self.compare(rows)
        n = self.counts(batch)[self.term]
        sums = {name: (values.detach().sum(), n) for name, values in pair_metrics(rows, compared).items()}
        terms = {self.term: LossSum(compared.losses.sum(), "pairs", n, sums)}
        role, weight = self.likelihood
        if weight > 0:
            tokens = rows.responses[role]
            nll = -masked(tokens.logps, tokens.mask).sum()
            terms["nll"] = LossSum(weight * nll, "tokens", tokens.mask.sum())
        return terms


def pair_metrics(rows: PreferenceBatch, compared: Compared) -> dict[str, Tensor]:
    """Metrics of the registry per row, (B,)."""
    chosen, rejected = rows.responses["chosen"], rows.responses["rejected"]
    found = {"pairs/logps_chosen": sequence_logps(chosen), "pairs/logps_rejected": sequence_logps(rejected)}
    found |= reward_metrics(rows, compared.rewards)
    if chosen.ref_logps is not None:
        found["pairs/chosen_shift"] = mean_shift(chosen)
    if compared.logits is not None:
        found["pairs/saturated"] = (compared.logits.detach() > SATURATED).to(compared.logits.dtype)
    return found | compared.further


def reward_metrics(rows: PreferenceBatch, rewards: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Metrics of the rewards of chosen and rejected, (B,), whatever they are made of."""
    reward_w, reward_l = (reward.detach() for reward in rewards)
    return {
        "pairs/reward_chosen": reward_w,
        "pairs/reward_rejected": reward_l,
        "pairs/margin": reward_w - reward_l,
        "pairs/accuracy": (reward_w - reward_l > TIE).to(reward_w.dtype),
        "pairs/ties": ((reward_w - reward_l).abs() <= TIE).to(reward_w.dtype),
        "pairs/length_difference": lengths(rows.responses["chosen"]) - lengths(rows.responses["rejected"]),
    }


def mean_shift(tokens: TokenBatch) -> Tensor:
    """Log-ratio to the reference per token, (B,), without gradient."""
    return (log_ratios(tokens) / lengths(tokens).clamp(min=1)).detach()
