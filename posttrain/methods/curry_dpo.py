"""Curry-DPO: DPO on several pairs per prompt, from easy (large gap of scores) to hard, with a reference per stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.data.sample import Preference
from posttrain.errors import DataError
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.methods.scored import derived, ranked_pairs, scored_responses, source_id
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.preference import dpo_loss
from posttrain.objectives.sequences import log_ratios


class CurryDPOConfig(MethodConfig):
    name: Literal["curry_dpo"] = "curry_dpo"
    beta: float = Field(0.1, gt=0, description="weight of the KL (DPO's common value; the paper's is not known to us)")
    pairs: Literal["best", "all"] = Field(
        "best", description="pair the best response of a row with each other one, as in the paper, or every two"
    )
    curriculum: Literal["rank", "gap"] = Field(
        "rank",
        description="stage i holds the i-th easiest pair of each prompt, or pairs are cut by the size of their gap",
    )
    stages: int = Field(
        3, ge=1, description="equal parts that the pairs are cut into by their gap; curriculum gap only"
    )
    refresh_reference: bool = Field(
        True, description="the reference of a stage is the policy at its start; false keeps the starting policy"
    )

    @model_validator(mode="after")
    def _effective(self) -> CurryDPOConfig:
        if self.curriculum == "rank" and "stages" in self.model_fields_set:
            raise ValueError("stages has no effect with curriculum rank: there are as many as pairs of a prompt")
        return self


class CurryDPO(PairMethod[CurryDPOConfig]):
    Config = CurryDPOConfig
    paper = "Curry-DPO: Enhancing Alignment using Curriculum Learning & Ranked Preferences, arXiv 2403.07230"

    def __init__(self, config: CurryDPOConfig) -> None:
        super().__init__(config)
        self.stage = 0

    @property
    def refresh_reference(self) -> bool:
        return self.config.refresh_reference

    def prepare(self, rows: Sequence[Preference]) -> list[Preference]:
        """A row per pair, by falling gap within each prompt. Pairs of equal score are left out."""
        pairs = [pair for row in rows for pair in self._pairs(row)]
        if not pairs:
            where = rows[0].problem.where if rows else "data.preferences"
            raise DataError("no two responses of a row have different scores", where=where)
        return pairs

    def _pairs(self, row: Preference) -> list[Preference]:
        found = scored_responses(row)
        return [
            derived(
                row,
                f"{found[i].role}>{found[j].role}",
                chosen=found[i].text,
                rejected=found[j].text,
                scores={"chosen": found[i].score, "rejected": found[j].score},
            )
            for i, j in ranked_pairs([one.score for one in found], self.config.pairs)
        ]

    def order(self, rows: Sequence[Preference]) -> list[list[int]]:
        by_gap = sorted(range(len(rows)), key=lambda index: -gap(rows[index]))
        if self.config.curriculum == "gap":
            stages, n = self.config.stages, len(by_gap)
            if n < stages:
                raise DataError(f"{n} pairs do not make {stages} stages", where="data.preferences")
            return [by_gap[n * s // stages : n * (s + 1) // stages] for s in range(stages)]
        seen: dict[str, int] = {}
        found: list[list[int]] = []
        for index in by_gap:
            source = source_id(rows[index])
            stage = seen.get(source, 0)
            seen[source] = stage + 1
            if stage == len(found):
                found.append([])
            found[stage].append(index)
        if len(found) < 2:
            raise DataError(
                "every prompt has one pair, so there is one stage and no curriculum",
                where="data.preferences",
                hint="give more scored responses per row (data.preferences.others), or set method.curriculum to gap",
            )
        return found

    def begin_stage(self, stage: int) -> None:
        self.stage = stage

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = int(state["stage"])

    def compare(self, rows: PreferenceBatch) -> Compared:
        ratio_w, ratio_l = (log_ratios(rows.responses[role]) for role in ("chosen", "rejected"))
        losses = dpo_loss(ratio_w, ratio_l, self.config.beta)
        rewards: tuple[Tensor, Tensor] = (self.config.beta * ratio_w, self.config.beta * ratio_l)
        stage = torch.full_like(losses, float(self.stage)).detach()
        return Compared(losses, rewards, rewards[0] - rewards[1], {"stage": stage})


def gap(row: Preference) -> float:
    """How much better chosen was scored than rejected."""
    return row.scores["chosen"] - row.scores["rejected"]
