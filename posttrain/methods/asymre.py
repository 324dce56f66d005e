"""AsymRE: REINFORCE with a baseline a little below the group's mean, for rollouts of any age."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.methods.base import MethodConfig
from posttrain.methods.rec import REC, RECConfig


class AsymREConfig(MethodConfig):
    name: Literal["asymre"] = "asymre"
    baseline_shift: float = Field(
        0.1, ge=0, description="how far the baseline lies below the group's mean; in the paper -delta_V"
    )
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts")


class AsymRE(REC):
    """Advantage r - (mean - c), no clip and no ratio.

    Computed as REINFORCE plus -c l on every token (`rec` with `clip: none`, `regularizer: forward_kl`), which is the
    same loss: a positive c weighs the gradients of good rows more than those of bad ones, and pulls towards the data.
    """

    Config = AsymREConfig
    paper = "Asymmetric REINFORCE for off-Policy Reinforcement Learning, arXiv 2506.20520"

    def __init__(self, config: AsymREConfig) -> None:
        super().__init__(
            RECConfig(
                clip="none",
                regularizer="forward_kl",
                coefficient=config.baseline_shift,
                updates_per_rollout=config.updates_per_rollout,
            )
        )
