"""What `posttrain eval --rewards` is told: the two kinds of reward, and the pairs that they are compared on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.schema import FileSource, Section


class ImplicitReward(Section):
    """beta (log policy - log reference), summed over the response: the reward that DPO trains without saying so."""

    policy: str = Field(description="folder or Hub id of the trained policy")
    reference: str = Field(description="folder or Hub id of the model it was trained from")
    beta: float = Field(0.1, gt=0, description="of the training; scales the margins, changes no accuracy")


class ExplicitReward(Section):
    """A sequence classifier with one output, as the method `reward` trains it."""

    path: str = Field(description="folder or Hub id")


class RewardData(FileSource):
    """Rows of preference pairs."""

    shift: Literal["id", "prompt", "response"] = Field(
        "id", description="how the rows differ from the training data: not; other prompts; responses of other models"
    )


class RewardsConfig(Section):
    """One implicit and one explicit reward, compared on the same rows. One of them alone is measured by itself."""

    implicit: ImplicitReward | None = None
    explicit: ExplicitReward | None = None
    data: dict[str, RewardData] = Field(min_length=1, description="name -> rows; those with shift `id` come first")
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; default: no limit but the models'")
    max_length: int | None = Field(None, ge=2, description="tokens of prompt and response; default: the models'")
    too_long: Literal["drop", "cut"] = Field("drop", description="what happens to longer ones, for both rewards")
    max_lost_share: float = Field(0.1, ge=0.0, le=1.0, description="stop if a larger share of rows is lost")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = Field(16, ge=1, description="sequences per forward pass; no effect on the result but rounding")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: as torch chooses")

    @model_validator(mode="after")
    def _some_reward(self) -> RewardsConfig:
        if self.implicit is None and self.explicit is None:
            raise ValueError("give `implicit` (policy and reference), `explicit` (a reward model), or both")
        return self
