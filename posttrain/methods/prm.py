"""Process reward model: a classifier of steps, trained on solutions whose steps are each labelled right or wrong."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Literal

from pydantic import Field

from posttrain.config.needs import Needs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Sample, Stepwise
from posttrain.data.steps import StepCutter, last_tokens
from posttrain.errors import DataError
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, Metric, StepwiseMethod
from posttrain.objectives.batch import LossSum, PreferenceBatch
from posttrain.objectives.process import step_losses


class PRMConfig(MethodConfig):
    name: Literal["prm"] = "prm"
    separator: str = Field(
        "\n", min_length=1, description="text between two steps; the score of a step is read at its last token"
    )
    train_on: Literal["all", "until_wrong", "last"] = Field(
        "all",
        description="steps with a loss: all; up to the first wrong one; the last one, which makes an outcome model",
    )


class PRM(StepwiseMethod[PRMConfig]):
    """Role `solution`, whose loss mask has the last token of each step; term `steps` (unit: steps)."""

    Config = PRMConfig
    paper = "Solving math word problems with process- and outcome-based feedback, arXiv 2211.14275"
    metrics = (
        Metric("prm/accuracy", "Share of trained steps whose score is on their label's side of 0.", "share"),
        Metric("prm/right_share", "Share of trained steps that are labelled right.", "share"),
        Metric(
            "prm/first_error",
            "Of the solutions with a wrong step, the share whose first wrong step is the first one with a score of 0 "
            "or less.",
            "share",
        ),
    )

    @property
    def needs(self) -> Needs:
        return Needs(data=("stepwise",), classifier=True)

    def responses(self, row: Stepwise, renderer: Renderer) -> dict[str, Sample]:
        """Steps with the separator between them, as a policy writes them: none stands behind the last one.

        Raises:
            DataError: a step holds the separator, or one token the ends of two steps.
        """
        separator, where = self.config.separator, row.problem.where
        for number, step in enumerate(row.steps):
            if separator in step:
                raise DataError(
                    f"step {number} holds {separator!r}, which separates steps",
                    where=where,
                    hint="set method.separator to a text that no step holds",
                )
        whole = renderer.conversation(Example(row.problem, separator.join(row.steps)))
        ends = [end - len(separator) * (i == len(row.steps) - 1) for i, end in enumerate(self._ends(row))]
        places = last_tokens(whole, StepCutter(renderer.text, None), renderer.stop_ids, ends)
        if len(places) != len(row.steps):
            raise DataError(
                f"the ends of {len(row.steps)} steps fall into {len(places)} tokens, so not each has its own score",
                where=where,
                hint="set method.separator to a text that this tokenizer keeps apart from the steps",
            )
        mask = [0] * len(whole.ids)
        for place in places:
            mask[place] = 1
        return {"solution": replace(whole, loss_mask=mask)}

    def _ends(self, row: Stepwise) -> list[int]:
        """Characters up to the end of each step, its separator included."""
        return list(accumulate(len(step) + len(self.config.separator) for step in row.steps))

    def values(self, row: Stepwise) -> dict[str, float | list[float]]:
        return {"labels": [float(label) for label in row.labels]}

    def counts(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        rows = batch.rows(batch.usable)
        return {"steps": self._trained(rows)[0].sum().float()}

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        rows = batch.rows(batch.usable)
        trained, right = self._trained(rows)
        scores = rows.responses["solution"].scores[trained]
        losses, n = step_losses(scores, right[trained]), trained.sum()
        said = scores.detach() > 0
        sums = {
            "prm/accuracy": ((said == right[trained]).sum(), n),
            "prm/right_share": (right[trained].sum(), n),
            **self._first_error(rows),
        }
        return {"steps": LossSum(losses.sum(), "steps", n.float(), sums)}

    def _trained(self, rows: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """(B, T) bool: the tokens with a loss, and which steps are right, at their last tokens."""
        mask, labels = rows.responses["solution"].mask, rows.values["labels"]
        number = (mask.cumsum(dim=1) - 1).clamp(min=0, max=labels.size(1) - 1)
        right = labels.gather(1, number) > 0.5
        if self.config.train_on == "last":
            return mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)), right
        if self.config.train_on == "until_wrong":
            wrong = (mask & ~right).cumsum(dim=1)
            return mask & ((wrong == 0) | (~right & (wrong == 1))), right
        return mask, right

    def _first_error(self, rows: PreferenceBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Share of the rows with a wrong step whose first one the scores name, among all that the mask has."""
        tokens = rows.responses["solution"]
        _, right = self._trained(rows)
        places = torch.arange(tokens.mask.size(1), device=tokens.mask.device)
        beyond = tokens.mask.size(1)

        def first(wrong: Tensor) -> Tensor:
            return torch.where(tokens.mask & wrong, places, beyond).amin(dim=1)

        there = first(~right)
        found = (first(tokens.scores.detach() <= 0) == there) & (there < beyond)
        return {"prm/first_error": (found.sum(), (there < beyond).sum())}
