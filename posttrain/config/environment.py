"""What the section of every environment says. Each environment has its own beside its class: `Config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, WrapValidator, model_validator

from posttrain.config.registered import RegisteredSection, by_type
from posttrain.environments import ENVIRONMENTS


class EnvironmentConfig(RegisteredSection):
    """Base of all sections of environments. Subclasses set `type` to a Literal."""

    max_turns: int = Field(8, ge=1, description="actions of an episode at most")
    episode_tokens: int = Field(
        1024, ge=2, description="tokens of an episode at most: prompt, actions and observations; within the positions"
    )
    observation_tokens: int = Field(
        512, ge=32, description="tokens of an observation; of a longer one the middle is left out"
    )
    invalid_in_a_row: int = Field(3, ge=1, description="actions in a row that are not understood, which end an episode")
    template_drift: Literal["refuse", "keep"] = Field(
        "refuse",
        description="a chat template that shows earlier turns otherwise than they were sampled: refuse it, or train "
        "and sample with the turns as they were, which is not what a chat server would show",
    )
    max_unknown_share: float = Field(
        0.5, ge=0, le=1, description="stop if the environment fails in a larger share of the episodes of a rollout"
    )
    workers: int = Field(1, ge=0, description="processes for environments; 0: in this one, where nothing ends a hang")
    step_seconds: float = Field(10.0, gt=0, description="seconds of wall clock for an action")
    reset_seconds: float = Field(60.0, gt=0, description="seconds of wall clock for the beginning of an episode")
    memory_mb: int = Field(4096, ge=256, description="MiB of data that one process may hold")
    sandbox: bool = Field(
        False,
        description="files can be read, but written only in a folder of each episode's own, and there is no network; "
        "by bubblewrap",
    )

    table = ENVIRONMENTS

    @model_validator(mode="after")
    def _confined_in_a_process(self) -> EnvironmentConfig:
        if self.sandbox and not self.workers:
            raise ValueError("`sandbox` is of a process of its own: set `workers` to 1 or more")
        return self

    def check_installed(self) -> None:
        """Look for the package that the environment comes from; nothing is imported.

        Raises:
            WorldError: it is not there, or in a version that cannot be played.
        """

    @property
    def rewards(self) -> bool:
        """Whether the environment may reward by itself, so that no verifier is needed."""
        return True

    @property
    def judged(self) -> bool:
        """Whether a verifier may judge the last action."""
        return False

    @property
    def forks(self) -> bool:
        """Whether it may show the policy another history than its own, so that an episode is several rows."""
        return False


AnyEnvironment = Annotated[SerializeAsAny[EnvironmentConfig], WrapValidator(by_type(ENVIRONMENTS))]
"""A section of any environment, by its `type`."""
