"""SALMON: a reward model that follows the principles in its prompt; in RL the verifier `principled` asks it by them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.config.principles import TEMPLATE, Principle, PrincipleTemplate
from posttrain.data.principles import draw_principles, scores_of, surest, variances_of, with_principles
from posttrain.data.sample import Preference
from posttrain.errors import DataError
from posttrain.methods.base import MethodConfig
from posttrain.methods.reward import Reward, RewardConfig
from posttrain.methods.scored import derived


class SalmonConfig(RewardConfig):
    name: Literal["salmon"] = "salmon"  # type: ignore[assignment]  # a method of its own
    principles: dict[str, Principle] = Field(min_length=1, description="name -> {text, negative}")
    column: str = Field(
        "principles", description="column with {name: [score, score]} of chosen over rejected, one for each order"
    )
    template: PrincipleTemplate = Field(TEMPLATE, description="prompt with {prompt} and {principles}, one a line")
    number: float = Field(0.2, gt=0, le=1, description="p of the geometric law of how many are drawn; authors' value")
    negated: float = Field(0.5, ge=0, le=1, description="probability that one is negated; authors' value")
    passes: int = Field(4, ge=1, description="draws for each row, each a row of its own; authors' value")
    label_noise: float = Field(0.1, ge=0, lt=0.5, description="share of labels turned; authors' value")
    draw_seed: int = Field(0, ge=0, description="of principles and noise: all seeds of a run have the same rows")


class Salmon(Reward):
    """As `reward`, on prompts with principles; which response is chosen follows from these."""

    Config: ClassVar[type[MethodConfig]] = SalmonConfig
    config: SalmonConfig
    paper = "SALMON, arXiv 2310.05910"

    @property
    def columns(self) -> dict[str, Any]:
        return {**super().columns, self.config.column: {name: [0.5, 0.3] for name in self.config.principles}}

    def prepare(self, rows: Sequence[Preference]) -> list[Preference]:
        """For each row `passes` draws of principles, without those by which neither response is better.

        Raises:
            DataError: a row has no scores by principle, or no draw of any row says which response is better.
        """
        c, names = self.config, list(self.config.principles)
        scores = [scores_of(row.problem, c.column, names) for row in super().prepare(rows)]
        variances = variances_of(scores, names)
        found: list[Preference] = []
        for row, of_row in zip(rows, scores, strict=True):
            for number in range(c.passes):
                key = f"{c.draw_seed}/{row.problem.id}/{number}"
                drawn = draw_principles(names, c.number, c.negated, key)
                score = surest(of_row, variances, drawn)
                if score == 0:
                    continue
                turned = random.Random(f"{key}/noise").random() < c.label_noise  # nosec B311 # no secret
                pair = (row.chosen, row.rejected) if (score > 0) != turned else (row.rejected, row.chosen)
                one = derived(row, str(number), chosen=pair[0], rejected=pair[1])
                found.append(replace(one, problem=with_principles(one.problem, c.principles, drawn, c.template)))
        if not found and rows:
            raise DataError(
                "by no principle is one response of a row better than the other",
                where=f"column {c.column!r}",
                hint="the scores of the two orders must agree in sign; those of a judge that looks at the order differ",
            )
        return found
