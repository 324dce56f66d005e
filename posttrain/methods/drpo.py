"""DR-PO: rollouts that may start from states inside offline responses, so that exploration happens around good data.

`optimizer: ppo` is the paper's; `group` compares the completions of one start with each other and has no critic.
Without resets (`reset_share: 0`) the method is PPO (with `whiten_rewards`), and with `optimizer: group` it is GRPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from numpy.random import Generator
from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.known_traces import KnownTrace
from posttrain.data.prefixes import CutRule, TurnCutter
from posttrain.data.sample import Origin, Problem
from posttrain.lazy import Tensor
from posttrain.methods.base import Scored, Start
from posttrain.methods.grpo import GRPO, GRPOConfig
from posttrain.methods.ppo import PPO, PPOConfig
from posttrain.objectives.batch import LossSum, TokenBatch

OF_PPO = frozenset({"value_clip", "vf_coef", "gamma", "lam", "kl_in", "kl_target", "kl_horizon"}) | {
    "whiten_rewards",
    "whiten_advantages",
    "missing_eos_reward",
}
"""Parameters that optimizer `group` does not have."""


class DRPOConfig(PPOConfig):
    name: Literal["drpo"] = "drpo"  # type: ignore[assignment]  # a method of its own
    reset_share: float = Field(
        1.0, ge=0, le=1, description="beta: share of prompts with a trace whose completions start inside of it"
    )
    boundary: Literal["token", "turn"] = Field(
        "token",
        description="where resets are; turn: traces are episodes, whose first turns are played again in the "
        "`environment`",
    )
    optimizer: Literal["ppo", "group"] = Field("ppo", description="PPO with a critic, or group-relative advantages")
    whiten_rewards: bool = Field(
        True,
        description="token rewards, KL included, divided by their deviation over a rollout; their mean stays "
        "(authors' default)",
    )

    @model_validator(mode="after")
    def _of_the_optimizer(self) -> DRPOConfig:
        idle = sorted(self.model_fields_set & OF_PPO) if self.optimizer == "group" else []
        if idle:
            raise ValueError(f"{', '.join(idle)}: no effect with optimizer group, which has no critic")
        return self


def reset(share: float, traces: Sequence[KnownTrace], draw: Generator) -> Start:
    """With probability `share` behind k tokens of a trace, k uniform on 1 .. length - 1 (authors' code).

    The length counts the end token, so at least that is left to the policy. One start per prompt: the completions of a
    group begin in the same state. The length limit is that of the whole answer, as in the authors' code.
    """
    usable = [trace for trace in traces if len(trace.ids) >= 2]
    if draw.random() >= share or not usable:
        return Start()
    trace = usable[int(draw.integers(len(usable)))]
    length = int(draw.integers(1, len(trace.ids)))
    return Start(tuple(trace.ids[:length]), Origin.RESET, {"reset_share": length / len(trace.ids)}, counted=True)


def turn_reset(share: float, traces: Sequence[KnownTrace], draw: Generator) -> Start:
    """With probability `share` behind k turns of an episode, k uniform on 1 .. turns - 1: `reset` for episodes."""
    cutters = [TurnCutter(trace, CutRule()) for trace in traces]
    usable = [cutter for cutter in cutters if cutter.turns >= 2]
    if draw.random() >= share or not usable:
        return Start()
    cutter = usable[int(draw.integers(len(usable)))]
    prefix = cutter.at(int(draw.integers(1, cutter.turns)) / cutter.turns)
    return Start(origin=Origin.RESET, info={"reset_share": prefix.fraction}, replay=prefix.replay)


class DRPO(PPO):
    Config = DRPOConfig
    config: DRPOConfig
    paper = "Dataset Reset Policy Optimization for RLHF, arXiv 2404.08495"

    def __init__(self, config: DRPOConfig) -> None:
        super().__init__(config)
        self.group: GRPO | None = None
        if config.optimizer == "group":
            self.group = GRPO(
                GRPOConfig(epsilon=config.epsilon, beta=config.kl_coef, updates_per_rollout=self.updates_per_rollout)
            )

    @property
    def needs(self) -> Needs:
        needs = replace(super().needs, data=("prompts", "traces"))
        if self.group is None:
            return needs
        return replace(needs, old_logps=False, critic=False, min_samples_per_prompt=2)

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        place = turn_reset if self.replays else reset
        return place(self.config.reset_share, traces, draw)

    @property
    def replays(self) -> bool:
        return self.config.boundary == "turn"

    def advantages(self, scored: Scored) -> Tensor:
        return super().advantages(scored) if self.group is None else self.group.advantages(scored)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return super().counts(batch) if self.group is None else self.group.counts(batch)

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        return super().loss(batch) if self.group is None else self.group.loss(batch)
