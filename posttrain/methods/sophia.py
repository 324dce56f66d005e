"""SOPHIA: the policy describes, a language model reasons from the description, and the policy learns both.

The policy looks at the pictures and writes descriptions; a frozen language model, which sees nothing but the text,
reasons from each of them several times. A verifier judges the answers, descriptions are worth what share of their
reasonings was right, and the policy learns good descriptions, each with its shortest right reasoning.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.needs import Needs
from posttrain.config.relative_paths import ModelPath
from posttrain.config.revisions import RevisionTemplate
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, Metric, OnlineMethod, Scored
from posttrain.methods.companions import DESCRIPTION, Reasoner
from posttrain.objectives.aggregation import count, masked
from posttrain.objectives.batch import GUIDED, LossSum, TokenBatch
from posttrain.objectives.sophia import propagated_rewards, semi_off_policy_loss


class SOPHIAConfig(MethodConfig):
    name: Literal["sophia"] = "sophia"
    reasoner: ModelPath = Field(
        description="folder or Hub id of the language model that reasons, with a vocabulary of its own"
    )
    reasonings: int = Field(
        4,
        ge=1,
        description="N, of each description; K of them make rollouts.samples_per_prompt = K N (paper's: not known)",
    )
    alpha_c: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="descriptions are learnt whose share of right reasonings is above (paper's: not known)",
    )
    right: float = Field(1.0, description="reward from which on a reasoning is right, R(y) = 1")
    description_end: str = Field("\n\n", min_length=1, description="what a description ends with")
    description_tokens: int | None = Field(
        None, ge=1, description="most tokens of a description; default: rollouts.max_new_tokens"
    )
    template: RevisionTemplate = Field(
        "{prompt}\n\n{answer}\n\n",
        description="what the reasoner reads: {prompt} without its pictures, and the description as {answer}",
    )
    reasoner_top_p: float = Field(1.0, gt=0, le=1, description="nucleus that the reasoner samples from")


class SOPHIA(OnlineMethod[SOPHIAConfig]):
    Config = SOPHIAConfig
    paper = "SOPHIA: semi-off-policy RL for slow-thinking vision-language models, arXiv 2507.16814"
    metrics = (
        Metric("sophia/description_logp", "Log-prob of the tokens of learnt descriptions (sophia).", "nats per token"),
        Metric(
            "sophia/reasoning_logp", "Log-prob of the reasoner's tokens under the policy (sophia).", "nats per token"
        ),
    )

    @property
    def needs(self) -> Needs:
        c = self.config
        reasoner = Reasoner(
            path=c.reasoner,
            number=c.reasonings,
            description_end=c.description_end,
            description_tokens=c.description_tokens,
            template=c.template,
            top_p=c.reasoner_top_p,
        )
        return Needs(data=("prompts",), rollouts=True, verifier=True, companions=(reasoner,))

    def advantages(self, scored: Scored) -> Tensor:
        """R(c, y): no baseline is taken off."""
        keys = list(zip(scored.groups.tolist(), (info.get(DESCRIPTION) for info in scored.infos), strict=True))
        descriptions = torch.tensor([keys.index(key) for key in keys], device=scored.groups.device)
        right = scored.rewards >= self.config.right
        return propagated_rewards(right, scored.known, scored.lengths, descriptions, self.config.alpha_c)

    def keep(self, scored: Scored) -> Tensor:
        return self.advantages(scored) > 0

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": count(batch.mask, "sequences")}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        n = self.counts(batch)["policy"]
        losses = semi_off_policy_loss(batch.logps, batch.advantages, batch.mask)
        parts = {"description": batch.mask}
        if GUIDED in batch.further:
            guided = batch.further[GUIDED]
            parts = {"description": batch.mask & ~guided, "reasoning": batch.mask & guided}
        sums = {name: (masked(batch.logps, part).sum().detach(), part.sum()) for name, part in parts.items()}
        means = {f"sophia/{name}_logp": total for name, total in sums.items()}
        return {"policy": LossSum(losses.sum(), "sequences", n, means)}
