"""RLGF: PPO around a guide, which writes where rollouts begin (roll-in) or how they end (roll-out).

| variant | roll-in | roll-out | policy loss on | value loss on |
| --- | --- | --- | --- | --- |
| `ppo_pp` (PPO++) | guide | policy | roll-out | roll-out |
| `aggrevated` (AggreVaTeD) | policy | guide | roll-in | roll-out |
| `lols` (LOLS) | each rollout is `ppo_pp` with probability `ppo_pp_share`, else `aggrevated` | | | |
| `d2lols` (D²LOLS) | `aggrevated` for `tau` rollouts, then `ppo_pp` | | | |

The guide is a model (`guide_model`) or, for roll-ins, the traces of `data.traces`. PPO++ without roll-ins is PPO.
With both kinds of rollouts in a run the critic has two heads: 0 for the policy's values, 1 for the guide's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from numpy.random import Generator, default_rng
from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.config.relative_paths import ModelPath
from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import Start
from posttrain.methods.companions import ValueHeads, Writer
from posttrain.methods.drpo import reset
from posttrain.methods.ppo import PPO, PPOConfig
from posttrain.objectives.aggregation import aggregate, masked
from posttrain.objectives.batch import GUIDED, LossSum, TokenBatch
from posttrain.objectives.expert import expert_nll

KIND_STREAM = 7
"""Tells the draw of a rollout's kind from others of the same seed and rollout (see `trainers.writer`)."""


class RLGFConfig(PPOConfig):
    name: Literal["rlgf"] = "rlgf"  # type: ignore[assignment]  # a method of its own
    variant: Literal["ppo_pp", "aggrevated", "lols", "d2lols"] = Field(
        "ppo_pp",
        description="the guide begins rollouts, ends them, either by chance, or ends the first and begins the rest",
    )
    guide_model: ModelPath | None = Field(
        None, description="folder or Hub id of the guide, of the policy's vocabulary; default: data.traces (ppo_pp)"
    )
    guide_top_p: float = Field(0.92, gt=0, le=1, description="nucleus that the guide samples from")
    rollin_share: float = Field(
        0.8, ge=0, le=1, description="beta: share of prompts (ppo_pp) or completions (aggrevated) with a roll-in"
    )
    ppo_pp_share: float = Field(0.8, ge=0, le=1, description="lols: probability that a rollout is of ppo_pp")
    tau: int | None = Field(None, ge=0, description="d2lols: rollouts of aggrevated before ppo_pp")
    nll_coef: float = Field(0.1, gt=0, description="weight of the negative log-likelihood of data.traces")
    expert_rows_per_step: int = Field(
        0, ge=0, description="traces per optimizer step for that likelihood (authors: one per prompt); 0: no such term"
    )
    gamma: float = Field(0.99, gt=0, le=1, description="discount per token")
    vf_coef: float = Field(0.5, gt=0, description="weight of the value loss")
    kl_coef: float = Field(0.001, ge=0, description="weight of the KL in the reward")
    whiten_advantages: bool = Field(False, description="mean 0 and variance 1 over the policy's tokens of a rollout")

    @model_validator(mode="after")
    def _guided(self) -> RLGFConfig:
        written = self.model_fields_set
        if self.variant != "ppo_pp" and self.guide_model is None:
            raise ValueError(f"{self.variant}: a guide that ends the policy's completions is a model: set guide_model")
        if self.guide_model is None and "guide_top_p" in written:
            raise ValueError("guide_top_p has no effect without guide_model")
        if (self.tau is None) == (self.variant == "d2lols"):
            raise ValueError("tau is for d2lols, which needs it (authors: 20, 100 or 200 rollouts)")
        if self.variant != "lols" and "ppo_pp_share" in written:
            raise ValueError("ppo_pp_share is for lols, which draws the kind of each rollout")
        if not self.expert_rows_per_step and "nll_coef" in written:
            raise ValueError("nll_coef has no effect without expert_rows_per_step")
        if self.kl_in == "loss":
            raise ValueError("rlgf has the KL in the reward: leave out kl_in")
        return self


class RLGF(PPO):
    Config = RLGFConfig
    config: RLGFConfig
    paper = "Learning to Generate Better Than Your LLM (RLGF), arXiv 2306.11816"

    def __init__(self, config: RLGFConfig) -> None:
        super().__init__(config)
        self.seed = 0  # `bind` gives the run's
        self.begin_step(0)

    @property
    def needs(self) -> Needs:
        c = self.config
        writer = () if c.guide_model is None else (Writer(c.guide_model, c.guide_top_p),)
        heads = (ValueHeads(2, self.value_head),) if c.variant in ("lols", "d2lols") else ()
        return replace(
            super().needs,
            data=("prompts", "traces") if c.guide_model is None or c.expert_rows_per_step else ("prompts",),
            expert_rows=c.expert_rows_per_step,
            companions=(*writer, *heads),
        )

    def bind(self, renderer: Renderer, seed: int) -> None:
        self.seed = seed

    def begin_step(self, step: int) -> None:
        c, rollout = self.config, step // self.updates_per_rollout
        if c.variant == "lols":
            self.guide_ends = default_rng([self.seed, rollout, KIND_STREAM]).random() >= c.ppo_pp_share
        elif c.variant == "d2lols":
            self.guide_ends = rollout < c.tau
        else:
            self.guide_ends = c.variant == "aggrevated"

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        if self.guide_ends:
            return Start(origin=Origin.GUIDED, handover=self.config.rollin_share)
        return reset(self.config.rollin_share, traces, draw)

    def policy_mask(self, batch: TokenBatch) -> Tensor:
        """The policy's tokens: all of them where it goes on from the guide, the roll-in where the guide goes on."""
        return batch.mask if GUIDED not in batch.further else batch.mask & ~batch.further[GUIDED]

    def value_mask(self, batch: TokenBatch) -> Tensor:
        """The roll-out: the guide's tokens where it wrote the end, so that values are those of the guide."""
        if GUIDED not in batch.further:
            return batch.mask
        ended = batch.further[GUIDED] & batch.mask
        return torch.where(ended.any(dim=1, keepdim=True), ended, batch.mask)

    def value_head(self, batch: TokenBatch) -> Tensor:
        """(B,): 1, the guide's, for rows that it ended."""
        guided = batch.further.get(GUIDED, torch.zeros_like(batch.mask))
        return guided.any(dim=1).long()

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        counts = super().counts(batch.rollouts)
        return counts | ({"expert": batch.experts.mask.sum()} if self.config.expert_rows_per_step else {})

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        terms = super().loss(batch.rollouts)
        if self.config.expert_rows_per_step:
            experts = batch.experts
            losses = expert_nll(experts.logps, torch.ones_like(experts.logps))
            total = aggregate(self.config.nll_coef * losses, experts.mask, "tokens")
            seen = {"expert/nll": (masked(losses.detach(), experts.mask).sum(), total.count)}
            terms["expert"] = LossSum(total.value, total.unit, total.count, seen)
        return terms
