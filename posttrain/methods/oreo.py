"""OREO: a value model and a policy made consistent with each other on rewarded traces, right and wrong ones.

| `level` | an action is |
| --- | --- |
| token | a token (the authors' default) |
| step | what `delimiter` ends, a line by default |
| turn | a turn of an episode, all its tokens |
| response | the whole completion |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.known_traces import KnownTrace
from posttrain.data.steps import StepRule
from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig, Metric, OfflineMethod, Regression
from posttrain.methods.companions import DIVERGENCE, Divergence
from posttrain.objectives.aggregation import aggregate, count, masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.next_token import reverse_kl
from posttrain.objectives.oreo import (
    by_step,
    one_step_losses,
    policy_losses,
    response_steps,
    token_steps,
    value_losses,
    value_targets,
)
from posttrain.objectives.policy_gradient import kl_k3, out_of_bounds


class OREOConfig(MethodConfig):
    name: Literal["oreo"] = "oreo"
    level: Literal["token", "step", "turn", "response"] = Field("token", description="what is one action")
    delimiter: str | None = Field(
        "\n", min_length=1, description="text that ends a step; null: the traces' own `step_ends`; level step"
    )
    beta: float = Field(0.03, gt=0, description="weight of the KL that defines the optimum, in units of the reward")
    kl_reg: float = Field(0.01, ge=0, description="alpha: weight of a further KL to the reference; 0: none")
    unbiased_kl: bool = Field(
        True,
        description="that KL is over the whole vocabulary; false: k3 on the traces' tokens, which is cheaper and blind "
        "to what no trace holds",
    )
    single_step_actor_loss: bool = Field(
        False, description="the policy fits one step of the soft-Bellman equation instead of all that follow"
    )
    reward_scale: float = Field(1.0, description="R = reward_scale * outcome + reward_shift (rew_mul in the code)")
    reward_shift: float = Field(0.0, description="rew_add in the code")
    balance: int | None = Field(
        4, ge=1, description="per problem, at most so many wrong traces and no more right ones than wrong; null: all"
    )
    actor_freeze_steps: int = Field(0, ge=0, description="optimizer steps at the start that train the critic only")

    @model_validator(mode="after")
    def _effective(self) -> OREOConfig:
        if self.level != "step" and "delimiter" in self.model_fields_set:
            raise ValueError(f"delimiter has no effect with level {self.level}: set level: step")
        if self.kl_reg == 0 and "unbiased_kl" in self.model_fields_set:
            raise ValueError("unbiased_kl has no effect with kl_reg 0")
        return self


class OREO(OfflineMethod[OREOConfig]):
    Config = OREOConfig
    paper = "Offline Reinforcement Learning for LLM Multi-Step Reasoning, arXiv 2412.16145"
    metrics = (
        Metric("oreo/policy_loss", "Squared soft-Bellman residual, mean over states, then rows.", "squared reward"),
        Metric("oreo/log_ratio", "Log-ratio of policy to reference on the tokens of traces.", "nats per token"),
        Metric("oreo/value_start", "Mean value of the prompts. Should come near their mean reward.", "reward"),
        Metric("oreo/right_share", "Share of the step's rows with a reward above the lowest.", "share"),
    )

    def __init__(self, config: OREOConfig) -> None:
        super().__init__(config)
        self.frozen = config.actor_freeze_steps > 0

    @property
    def needs(self) -> Needs:
        c = self.config
        whole = (Divergence(reverse_kl),) if c.kl_reg > 0 and c.unbiased_kl else ()
        first = c.actor_freeze_steps
        return Needs(data=("traces",), reference=True, critic=True, critic_first=first, companions=whole)

    @property
    def steps(self) -> StepRule | None:
        if self.config.level == "turn":
            return StepRule(None, turns=True)
        return StepRule(self.config.delimiter) if self.config.level == "step" else None

    def begin_step(self, step: int) -> None:
        self.frozen = step < self.config.actor_freeze_steps

    def prepare(self, traces: Sequence[KnownTrace]) -> list[KnownTrace]:
        return list(traces) if self.config.balance is None else balanced(traces, self.config.balance)

    def reward(self, trace: KnownTrace) -> float:
        return self.config.reward_scale * trace.verified + self.config.reward_shift

    def regression(self, batch: TokenBatch) -> Regression:
        """V of every state and R - beta D of the log-ratios as they are."""
        states = by_step(batch.logps, batch.ref_logps, batch.values, batch.mask, token_steps(batch.mask))
        return Regression(states.values.detach(), value_targets(states, batch.rewards, self.config.beta), states.exists)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        n = count(batch.mask, "sequences")
        return {"value": n, "policy": n} | ({"kl": n} if self.config.kl_reg > 0 else {})

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        c, n = self.config, count(batch.mask, "sequences")
        numbers = {"token": token_steps, "response": response_steps}
        steps = batch.steps if c.level in ("step", "turn") else numbers[c.level](batch.mask)
        found = by_step(batch.logps, batch.ref_logps, batch.values, batch.mask, steps)
        weight = 0.0 if self.frozen else 1.0  # the shell drops the policy's gradients, where they are not sharded
        # The value model learns every state, whatever an action is: a search asks it about finished texts too.
        states = by_step(batch.logps, batch.ref_logps, batch.values, batch.mask, token_steps(batch.mask))
        value = value_losses(states, batch.rewards, c.beta)
        policy = (one_step_losses if c.single_step_actor_loss else policy_losses)(found, batch.rewards, c.beta)
        tokens = batch.mask.sum()
        ratios = masked((batch.logps - batch.ref_logps).detach(), batch.mask)
        right = (batch.rewards > c.reward_shift) & (batch.mask.sum(dim=1) > 0)
        first = found.values.detach()[:, 0]
        terms = {
            "value": LossSum(value.sum(), "sequences", n, {"critic/loss": (value.detach().sum(), n)}),
            "policy": LossSum(
                weight * policy.sum(),
                "sequences",
                n,
                {
                    "oreo/policy_loss": (policy.detach().sum(), n),
                    "oreo/log_ratio": (ratios.sum(), tokens),
                    "oreo/value_start": (first.sum(), n),
                    "oreo/right_share": (right.sum().to(n), n),
                },
            ),
        }
        if c.kl_reg > 0:
            per_token = batch.further[DIVERGENCE] if c.unbiased_kl else kl_k3(batch.logps, batch.ref_logps)
            kl = aggregate(per_token, batch.mask, "sequences")
            seen = {"kl": (kl.value.detach(), kl.count)}
            if not c.unbiased_kl:
                seen["ratio_clamped_share"] = (out_of_bounds(ratios).sum(), tokens)
            terms["kl"] = LossSum(weight * c.kl_reg * kl.value, kl.unit, kl.count, seen)
        return terms


def balanced(traces: Sequence[KnownTrace], most: int) -> list[KnownTrace]:
    """Per problem the first `most` wrong traces, and as many right ones at most, but at least one (authors' code)."""
    by_problem: dict[str, tuple[list[KnownTrace], list[KnownTrace]]] = {}
    for trace in traces:
        by_problem.setdefault(trace.problem.id, ([], []))[trace.verified > 0].append(trace)
    kept = []
    for wrong, right in by_problem.values():
        kept += [*wrong[:most], *right[: max(1, min(len(wrong), most))]]
    return kept
