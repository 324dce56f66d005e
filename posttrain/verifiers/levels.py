"""How near an answer comes to the levels of several qualities that stand before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.section import Section
from posttrain.config.verifier import AnyVerifier, VerifierConfig
from posttrain.data.controllers import TEMPLATE, ControllerTemplate, read_controllers
from posttrain.data.sample import Problem
from posttrain.objectives.control import level_reward
from posttrain.verifiers import VERIFIERS
from posttrain.verifiers.pattern import compile_pattern
from posttrain.verifiers.verdict import Answer, Status, Verdict


class Quality(Section):
    """Where the score of a quality comes from."""

    reward: AnyVerifier | None = Field(
        None, description="a verifier that takes whole batches (reward_model, principled, judge, length): its score"
    )
    pattern: str | None = Field(None, description="regular expression: the share of characters in its matches")
    weight: float = Field(1.0, gt=0, description="of the squared gap to the level")

    @model_validator(mode="after")
    def _one(self) -> Quality:
        if (self.reward is None) == (self.pattern is None):
            raise ValueError("give either reward or pattern")
        if self.reward is not None and not hasattr(VERIFIERS[self.reward.type], "verify"):
            raise ValueError(f"{self.reward.type} runs in workers; a quality is scored here, in batches")
        return self


class LevelsVerifier:
    """1 less the mean squared gap between the scores of the qualities and the levels that the answer begins with.

    Correct from the threshold on. Controllers are taken out before anything is scored; an answer without them was asked
    for nothing, and is not judged.
    """

    name = "levels"
    outcome = True

    class Config(VerifierConfig):
        """Several rewards, and how near an answer comes to the level of each that it was asked for (method `ldc`)."""

        type: Literal["levels"] = "levels"
        qualities: dict[str, Quality] = Field(min_length=1, description="name -> reward or pattern, as controllers are")
        template: ControllerTemplate = Field(TEMPLATE, description="how controllers are written, as in the method")
        threshold: float = Field(0.95, ge=0, le=1, description="scores of at least this much count as correct")

        def inputs(self) -> list[str]:
            return [path for each in self.qualities.values() if each.reward for path in each.reward.inputs()]

    def __init__(self, config: LevelsVerifier.Config) -> None:
        self.config = config
        self._scorers = {name: _scorer(name, quality) for name, quality in config.qualities.items()}

    def verify(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer. Errors are those of the rewards."""
        names = list(self.config.qualities)
        read = [read_controllers(answer.text, names, self.config.template) for answer in answers]
        verdicts = [Verdict(Status.SKIPPED, None, "no levels stand before the answer") for _ in answers]
        places = [place for place, one in enumerate(read) if one is not None]
        asked = [one for one in read if one is not None]
        plain = [replace(answers[place], text=text) for place, (_, text) in zip(places, asked, strict=True)]
        scored = {name: self._scores(name, [problems[place] for place in places], plain) for name in names}
        weights = [each.weight for each in self.config.qualities.values()]
        for number, place in enumerate(places):
            found = [scored[name][number] for name in names]
            unknown = next((one for one in found if one.score is None), None)
            if unknown is not None:
                verdicts[place] = Verdict(unknown.status, None, unknown.detail)
                continue
            levels = [asked[number][0][name] for name in names]
            score = level_reward([one.score for one in found if one.score is not None], levels, weights)
            status = Status.CORRECT if score >= self.config.threshold else Status.WRONG
            gaps = zip(names, found, levels, strict=True)
            said = ", ".join(f"{name} {one.score:.2g} of {level:g}" for name, one, level in gaps)
            verdicts[place] = Verdict(status, score, said)
        return verdicts

    def close(self) -> None:
        """Give the memory of the rewards back."""
        for scorer in self._scorers.values():
            if hasattr(scorer, "close"):
                scorer.close()

    def _scores(self, name: str, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        scorer = self._scorers[name]
        if not isinstance(scorer, re.Pattern):
            return scorer.verify(problems, answers)
        shares = [sum(len(found[0]) for found in scorer.finditer(one.text)) / max(len(one.text), 1) for one in answers]
        return [Verdict(Status.CORRECT if share > 0 else Status.WRONG, share) for share in shares]


def _scorer(name: str, quality: Quality) -> Any:
    if quality.reward is not None:
        return VERIFIERS[quality.reward.type](quality.reward)
    where = f"verifier.levels.qualities.{name}.pattern"
    return compile_pattern(quality.pattern or "", where=where, flags=re.DOTALL, groups=0)
