"""Nash-MD: the policy against a mixture of itself with its start, by how likely its completion is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from numpy.random import Generator
from pydantic import Field

from posttrain.config.metric import Metric
from posttrain.config.needs import Needs
from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Origin, Problem
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import ContrastMethod, MethodConfig, Scored, Start, Weighed
from posttrain.methods.companions import Writer
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.contrast import win_shares


class NashMDConfig(MethodConfig):
    name: Literal["nash_md"] = "nash_md"
    beta: float = Field(0.1, ge=0, description="weight of the KL to the start (TRL's former trainer: 0.1)")
    mixture_coef: float = Field(
        0.5, gt=0, le=1, description="share of the start's logits in what the opponent draws from; 1: the start alone"
    )
    preference: Literal["sigmoid", "better"] = Field(
        "sigmoid", description="probability of a win: of the difference of rewards, or 1, 1/2 or 0 by the larger one"
    )
    kl: Literal["sequence", "token"] = Field(
        "sequence", description="gradient of the KL of whole completions, or TRL's: each token's log-ratio for itself"
    )
    own: int = Field(
        1, ge=1, description="completions of a prompt that the policy writes; its opponent writes the rest"
    )


class NashMD(ContrastMethod[NashMDConfig]):
    """Term `policy` (unit: sequences): the policy's completions that have an opponent, whose own are not trained on.

    The loss is a surrogate: its gradient is right, its value means nothing.
    """

    Config = NashMDConfig
    paper = "Nash Learning from Human Feedback, arXiv 2312.00886"
    metrics = (
        Metric(
            "nash_md/preference",
            "Mean probability that the policy's completion is preferred to its opponent's; 1/2 if neither is better.",
            "share",
        ),
    )

    @property
    def needs(self) -> Needs:
        writer = Writer(None, 1.0, begins=False, share=self.config.mixture_coef)
        return Needs(
            data=("prompts",),
            rollouts=True,
            verifier=True,
            reference=True,
            min_samples_per_prompt=self.config.own + 1,
            companions=(writer,),
        )

    @property
    def linear_in_advantages(self) -> bool:
        return False

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        return Start(handover=0.0, own=self.config.own)

    def _wins(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """(N,) probabilities of a win, and bool: whose are meant, the policy's completions with an opponent."""
        theirs = torch.tensor([kind is Origin.GUIDED for kind in scored.kinds])
        known = scored.known & (scored.lengths > 0)
        return win_shares(scored.rewards, scored.groups, known & ~theirs, known & theirs, self.config.preference)

    def advantages(self, scored: Scored) -> Tensor:
        """Those of a policy that is its own reference."""
        zeros = torch.zeros_like(scored.rewards)
        return self.weigh(scored, zeros, zeros).advantages

    def keep(self, scored: Scored) -> Tensor:
        return self._wins(scored)[1]

    def weigh(self, scored: Scored, logps: Tensor, ref_logps: Tensor) -> Weighed:
        """A = P(y > y') - 1/2, less beta (log pi(y) - log pi_ref(y)) where the KL is that of whole completions."""
        wins, of_policy = self._wins(scored)
        gains = wins - 0.5
        if self.config.kl == "sequence":
            gains = gains - self.config.beta * (logps - ref_logps).to(gains)
        mean = (float(wins[of_policy].sum()), float(of_policy.sum()))
        return Weighed(torch.where(of_policy, gains, torch.zeros_like(gains)), {"nash_md/preference": mean})

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": batch.mask.any(dim=1).sum().float()}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        assert batch.logps is not None and batch.ref_logps is not None and batch.advantages is not None  # `needs`
        n = self.counts(batch)["policy"]
        apart = masked((batch.logps - batch.ref_logps).detach(), batch.mask)
        logps = masked(batch.logps, batch.mask)
        value = -(batch.advantages * logps.sum(dim=1)).sum()
        if self.config.kl == "token":
            value = value + self.config.beta * (apart * logps).sum()
        return {"policy": LossSum(value, "sequences", n, {"kl_sequence": (apart.sum(), n)})}
