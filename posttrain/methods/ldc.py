"""LDC: GRPO on answers that begin with levels of several qualities, drawn for each prompt.

The verifier `levels` rewards those that meet them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from numpy.random import Generator
from pydantic import Field

from posttrain.data.controllers import TEMPLATE, ControllerTemplate, Level, controllers
from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem
from posttrain.methods.base import Start
from posttrain.methods.grpo import GRPO, GRPOConfig


class LDCConfig(GRPOConfig):
    """The policy gradient has all parameters of `grpo`."""

    name: Literal["ldc"] = "ldc"  # type: ignore[assignment]  # a method of its own
    controllers: dict[str, Annotated[list[Level], Field(min_length=1)]] = Field(
        min_length=1, description="quality -> levels in [0, 1] of which one is drawn for each prompt"
    )
    template: ControllerTemplate = Field(
        TEMPLATE, description="how a controller is written, with {level} and {name}; as in the verifier `levels`"
    )


class LDC(GRPO):
    """As `grpo`, behind controllers that the policy did not write and that are not trained on."""

    Config = LDCConfig
    paper = "LDC: research ideas with dynamic control, arXiv 2412.14626"
    config: LDCConfig

    def bind(self, renderer: Renderer, seed: int) -> None:
        self._tokenizer = renderer.tokenizer

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        """Levels of the prompt's group: all its completions are asked for the same."""
        c = self.config
        levels = {name: known[int(draw.integers(len(known)))] for name, known in c.controllers.items()}
        ids = self._tokenizer(controllers(levels, c.template), add_special_tokens=False)["input_ids"]
        return Start(tuple(ids), Origin.PREFIX)
