"""A-LoL: likelihood of completions that are better than the reference policy's value, weighted by how much better.

| variant | weight of a completion | importance weight |
| --- | --- | --- |
| a_lol (arXiv 2305.14718) | A = max(R - V, 0) | clipped ratio of the sequence |
| seq | A | clipped ratio of each token |
| ref_free | A | 1 |
| kl | A | 1, plus beta (log pi - log pi_ref) |
| r_lol | R | clipped ratio of the sequence |
| w_bc | R | 1 |
| r_gold | R | max(pi(token), 0.1) |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Preference, Sample
from posttrain.errors import DataError
from posttrain.methods.base import MethodConfig, Metric, PreferenceMethod
from posttrain.methods.pairs import mean_shift
from posttrain.methods.scored import derived, number_of, scored_responses
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import LossSum, PreferenceBatch
from posttrain.objectives.leftover import Weighting, leftover_advantages, leftover_loss, leftover_weights
from posttrain.objectives.sequences import lengths, log_ratios, sequence_logps

WEIGHTING: dict[str, Weighting] = {
    "a_lol": "sequence_ratio",
    "seq": "token_ratio",
    "ref_free": "none",
    "kl": "none",
    "r_lol": "sequence_ratio",
    "w_bc": "none",
    "r_gold": "probability",
}
WITH_RATIO = ("a_lol", "seq", "r_lol")
WITHOUT_VALUE = ("r_lol", "w_bc", "r_gold")


class ALoLConfig(MethodConfig):
    name: Literal["a_lol"] = "a_lol"
    variant: Literal["a_lol", "seq", "ref_free", "kl", "r_lol", "w_bc", "r_gold"] = Field(
        "a_lol", description="what a completion weighs, and its importance weight"
    )
    epsilon: float = Field(0.9, gt=0, lt=1, description="clip range of the ratio around 1 (authors' code)")
    beta: float | None = Field(None, gt=0, description="weight of the log-ratio to the reference; kl needs it")
    value_column: str = Field(
        "value", description="column with V, what the starting policy's own answers score on average"
    )

    @model_validator(mode="after")
    def _effective(self) -> ALoLConfig:
        written, variant = self.model_fields_set, self.variant
        if variant not in WITH_RATIO and "epsilon" in written:
            raise ValueError(f"epsilon has no effect with variant {variant}: it takes no ratio")
        if variant in WITHOUT_VALUE and "value_column" in written:
            raise ValueError(f"value_column has no effect with variant {variant}: it takes the reward itself")
        if (self.beta is None) == (variant == "kl"):
            raise ValueError(
                "variant kl needs beta" if variant == "kl" else f"beta has no effect with variant {variant}"
            )
        return self


class ALoL(PreferenceMethod[ALoLConfig]):
    """Role `completion`. `prepare` makes a row of each scored response, as its `chosen`; its `rejected` is not read."""

    Config = ALoLConfig
    term = "policy"
    paper = "Leftover-Lunch: Advantage-based Offline Reinforcement Learning for Language Models, arXiv 2305.14718"
    metrics = (
        Metric("a_lol/advantage", "Mean advantage (or reward) of the trained completions.", "reward"),
        Metric("a_lol/weight", "Mean importance weight of trained tokens, after the clip.", "1"),
        Metric(
            "a_lol/clipped",
            "Share of trained tokens whose importance weight was clipped. They keep their gradient.",
            "share",
        ),
    )

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",), reference=self.config.variant in (*WITH_RATIO, "kl"))

    @property
    def columns(self) -> dict[str, float]:
        return {} if self.config.variant in WITHOUT_VALUE else {self.config.value_column: 0.3}

    def prepare(self, rows: Sequence[Preference]) -> list[Preference]:
        """One row per response with a positive weight; the others would give no gradient."""
        single = [
            derived(
                row,
                one.role,
                chosen=one.text,
                rejected=row.rejected if one.role == "chosen" else row.chosen,
                scores={"chosen": one.score},
            )
            for row in rows
            for one in scored_responses(row)
        ]
        kept = [row for row in single if (found := self.values(row))["reward"] > found["value"]]
        if not kept:
            raise DataError(
                f"none of {len(single)} completions scores above its value, so nothing is left to learn from",
                where=rows[0].problem.where if rows else "data.preferences",
                hint="check that scores and values are on the same scale",
            )
        return kept

    def responses(self, row: Preference, renderer: Renderer) -> dict[str, Sample]:
        return {"completion": renderer.sample(Example(row.problem, row.chosen))}

    def values(self, row: Preference) -> dict[str, float]:
        reward = row.scores["chosen"]
        if self.config.variant not in WITHOUT_VALUE:
            return {"reward": reward, "value": number_of(row, self.config.value_column)}
        if reward < 0:
            raise DataError(f"reward {reward} is negative, and it weighs a likelihood", where=row.problem.where)
        return {"reward": reward, "value": 0.0}

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        c, how = self.config, WEIGHTING[self.config.variant]
        rows, n = batch.rows(batch.usable), self.counts(batch)["policy"]
        tokens = rows.responses["completion"]
        advantages = leftover_advantages(rows.values["reward"], rows.values["value"]).to(tokens.logps)
        weights, clipped = leftover_weights(tokens.logps, tokens.mask, how, c.epsilon, tokens.ref_logps)
        losses = leftover_loss(tokens.logps, tokens.mask, weights, advantages)
        if c.beta is not None:
            losses = losses + c.beta * log_ratios(tokens)
        logps = sequence_logps(tokens).detach()
        sums = {"pairs/logps_chosen": (logps.sum(), n), "a_lol/advantage": (advantages.sum(), n)}
        if how != "none":
            sums["a_lol/weight"] = (masked(weights, tokens.mask).sum(), lengths(tokens).sum())
            sums["a_lol/clipped"] = (masked(clipped.to(weights.dtype), tokens.mask).sum(), lengths(tokens).sum())
        if tokens.ref_logps is not None:
            sums["pairs/chosen_shift"] = (mean_shift(tokens).sum(), n)
        return {"policy": LossSum(losses.sum(), "sequences", n, sums)}
