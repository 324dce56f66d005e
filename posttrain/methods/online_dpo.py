"""Online DPO: pairs of the policy's own completions, ranked by the verifier, and DPO's loss in the same step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import ContrastMethod, MethodConfig, Scored, Weighed
from posttrain.methods.pairs import TIE
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.contrast import contrasted, group_pairs, group_shares
from posttrain.objectives.preference import dpo_loss


class OnlineDPOConfig(MethodConfig):
    name: Literal["online_dpo"] = "online_dpo"
    beta: float = Field(0.1, gt=0, description="weight of the KL (TRL's default)")
    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="function of the margin")
    tau: float = Field(0.1, gt=0, description="weight of the KL in IPO, in the place of beta; ipo only")
    pairs: Literal["extremes", "all"] = Field(
        "extremes", description="pairs of a prompt: its best completion with its worst, or every two that differ"
    )
    margin: float = Field(0.0, ge=0, description="least difference of the rewards of a pair; equal ones make none")
    mask_truncated: bool = Field(False, description="completions cut at the length limit are in no pair")

    @model_validator(mode="after")
    def _effective(self) -> OnlineDPOConfig:
        if self.loss == "ipo" and "beta" in self.model_fields_set:
            raise ValueError("beta has no effect with loss ipo: set tau")
        if self.loss != "ipo" and "tau" in self.model_fields_set:
            raise ValueError(f"tau has no effect with loss {self.loss}: set beta")
        return self


class OnlineDPO(ContrastMethod[OnlineDPOConfig]):
    """Term `pairs` (unit: sequences): the mean over prompts that have a pair of the mean over their pairs."""

    Config = OnlineDPOConfig
    paper = "Direct Language Model Alignment from Online AI Feedback, arXiv 2402.04792"

    @property
    def needs(self) -> Needs:
        return Needs(data=("prompts",), rollouts=True, verifier=True, reference=True, min_samples_per_prompt=2)

    @property
    def linear_in_advantages(self) -> bool:
        return False

    @property
    def strength(self) -> float:
        """beta, or tau with loss ipo."""
        return self.config.tau if self.config.loss == "ipo" else self.config.beta

    def usable(self, scored: Scored) -> Tensor:
        """(N,) bool: completions that may be in a pair."""
        usable = scored.known & (scored.lengths > 0)
        return usable & scored.finished if self.config.mask_truncated else usable

    def pairs(self, scored: Scored) -> Tensor:
        """(P, 2) places of better and worse completions."""
        c = self.config
        return group_pairs(scored.rewards, scored.groups, self.usable(scored), c.pairs, c.margin)

    def advantages(self, scored: Scored) -> Tensor:
        """Those of a policy that is its own reference."""
        zeros = torch.zeros_like(scored.rewards)
        return self.weigh(scored, zeros, zeros).advantages

    def keep(self, scored: Scored) -> Tensor:
        kept = torch.zeros_like(scored.known)
        kept[self.pairs(scored).flatten()] = True
        return kept

    def weigh(self, scored: Scored, logps: Tensor, ref_logps: Tensor) -> Weighed:
        pairs = self.pairs(scored)
        if not len(pairs):
            return Weighed(torch.zeros_like(scored.rewards))
        shares, ratios = group_shares(scored.groups[pairs[:, 0]]), (logps - ref_logps).to(scored.rewards)
        losses, advantages = contrasted(
            ratios, pairs, shares, lambda better, worse: dpo_loss(better, worse, self.strength, self.config.loss)
        )
        # The shell divides by the number of trained completions; the mean is to be over groups.
        groups, rows = shares.sum(), int(self.keep(scored).sum())
        rewards = self.strength * ratios[pairs]
        margins, n = rewards[:, 0] - rewards[:, 1], len(pairs)
        sums = {
            "pairs/loss": (float((shares * losses).sum()), float(groups)),
            "pairs/reward_chosen": (float(rewards[:, 0].sum()), n),
            "pairs/reward_rejected": (float(rewards[:, 1].sum()), n),
            "pairs/margin": (float(margins.sum()), n),
            "pairs/accuracy": (float((margins > TIE).sum()), n),
            "pairs/ties": (float((margins.abs() <= TIE).sum()), n),
            "pairs/length_difference": (float((scored.lengths[pairs[:, 0]] - scored.lengths[pairs[:, 1]]).sum()), n),
        }
        return Weighed(advantages * (rows / groups), sums)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"pairs": batch.mask.any(dim=1).sum().float()}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        logps = masked(batch.logps, batch.mask).sum(dim=1)
        sums = {
            "kl_sequence": (
                masked((batch.logps - batch.ref_logps).detach(), batch.mask).sum(),
                self.counts(batch)["pairs"],
            )
        }
        return {"pairs": LossSum(-(batch.advantages * logps).sum(), "sequences", self.counts(batch)["pairs"], sums)}
