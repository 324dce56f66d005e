"""OPD: distillation on the policy's own samples, each token graded by a teacher; with traces beside them it is GKD.

| variant | parameters |
| --- | --- |
| on-policy distillation by policy gradient | the defaults |
| reverse KL of whole completions (MiniLLM's objective, arXiv 2306.08543) | `discount: 1` |
| full vocabulary, reverse KL | `objective: full` |
| GKD (arXiv 2306.13649) | `objective: full`, `beta: 0.5`, `on_policy_share: 0.5`, `expert_rows_per_step` |
| top-k with the rest as one outcome | `objective: top_k` |
| with a task reward beside it | `outcome_coef`, and a `verifier` |
| a teacher on a server | `server` |
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.config.relative_paths import ModelPath
from posttrain.config.teacher_server import TeacherServer
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import Scored
from posttrain.methods.companions import DIVERGENCE, Scorer, ServedScorer
from posttrain.methods.distilled import Distilled, DistilledConfig
from posttrain.objectives.aggregation import count
from posttrain.objectives.batch import LossSum, TokenBatch


class OPDConfig(DistilledConfig):
    name: Literal["opd"] = "opd"
    teacher: ModelPath = Field(description="folder or Hub id of the teacher; the policy's vocabulary")
    server: TeacherServer | None = Field(
        None, description="has the teacher's weights; of `teacher` tokenizer and config.json are then read"
    )
    on_policy_share: float = Field(
        1.0, gt=0, le=1, description="lambda: weight of the policy's own samples; traces have the rest"
    )
    expert_rows_per_step: int = Field(0, ge=0, description="traces per optimizer step, with on_policy_share below 1")

    @model_validator(mode="after")
    def _of_the_mixture(self) -> OPDConfig:
        if (self.on_policy_share < 1) != (self.expert_rows_per_step > 0):
            raise ValueError("on_policy_share below 1 and expert_rows_per_step above 0 go together")
        if self.objective == "policy_gradient" and self.expert_rows_per_step:
            raise ValueError(
                "a trace is no sample of the policy, so its tokens give no policy gradient: set objective: full"
            )
        if self.server is not None:
            self._of_the_server(self.server)
        return self

    def _of_the_server(self, server: TeacherServer) -> None:
        if self.objective == "full":
            raise ValueError("a server gives no distribution over the whole vocabulary: set objective: top_k")
        if self.objective == "top_k" and self.support == "policy":
            raise ValueError("a server gives the teacher's likeliest tokens: set support: teacher")
        if self.objective == "top_k" and server.protocol == "openai":
            raise ValueError(
                "echo with logprobs names the likeliest tokens by texts, which several ids may share: take protocol: "
                "vllm, or objective: policy_gradient"
            )


class OPD(Distilled[OPDConfig]):
    Config = OPDConfig
    paper = "GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543"

    @property
    def needs(self) -> Needs:
        c = self.config
        return Needs(
            data=("prompts", "traces") if c.expert_rows_per_step else ("prompts",),
            rollouts=True,
            verifier=c.outcome_coef > 0,
            min_samples_per_prompt=2 if c.outcome_coef > 0 else 1,
            expert_rows=c.expert_rows_per_step,
            companions=(self._scorer, *self.compared),
        )

    @property
    def _scorer(self) -> Scorer | ServedScorer:
        c = self.config
        if c.server is None:
            return Scorer(c.teacher)
        return ServedScorer(c.teacher, c.server, c.top_k if c.objective == "top_k" else 0)

    def keep(self, scored: Scored) -> Tensor:
        """All rows where nothing is verified: the teacher grades every one."""
        return scored.known if self.needs.verifier else torch.ones_like(scored.known)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        n = {"policy": count(batch.rollouts.mask, self.config.aggregation)}
        mixes = self.config.expert_rows_per_step > 0
        return n | ({"expert": count(batch.experts.mask, self.config.aggregation)} if mixes else {})

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        c, rollouts = self.config, batch.rollouts
        losses, seen = self.on_samples(rollouts)
        terms = {"policy": self.term(c.on_policy_share * losses, seen, rollouts.mask)}
        if c.expert_rows_per_step:
            experts = batch.experts
            apart = experts.further[DIVERGENCE]
            losses = (1 - c.on_policy_share) * c.coef * apart
            terms["expert"] = self.term(losses, {"expert/divergence": apart}, experts.mask)
        return terms
