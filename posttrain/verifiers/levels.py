"""How near an answer comes to the levels of several qualities that stand before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.section import Section
from posttrain.config.verifier import AnyVerifier, VerifierConfig
from posttrain.data.controllers import TEMPLATE, ControllerTemplate, read_controllers, read_sentences
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
        by_sentence: bool = Field(
            False,
            description="judge each part of an answer by the controllers before it, and give the mean: for `sentences` "
            "of `posttrain sample`; in training a policy could write controllers that it meets",
        )

        def inputs(self) -> list[str]:
            return [path for each in self.qualities.values() if each.reward for path in each.reward.inputs()]

    def __init__(self, config: LevelsVerifier.Config) -> None:
        self.config = config
        self._scorers = {name: _scorer(name, quality) for name, quality in config.qualities.items()}

    def verify(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer. Errors are those of the rewards."""
        names = list(self.config.qualities)
        parts = [self._parts(answer.text) for answer in answers]
        places = [place for place, each in enumerate(parts) for _ in each]
        asked = [one for each in parts for one in each]
        plain = [replace(answers[place], text=text) for place, (_, text) in zip(places, asked, strict=True)]
        scored = {name: self._scores(name, [problems[place] for place in places], plain) for name in names}
        judged = iter(zip(asked, zip(*scored.values(), strict=True), strict=True))
        return [self._verdict([next(judged) for _ in each]) for each in parts]

    def _parts(self, text: str) -> list[tuple[dict[str, float], str]]:
        """What was asked for, and what of the answer is judged by it."""
        names, template = list(self.config.qualities), self.config.template
        if self.config.by_sentence:
            return read_sentences(text, names, template)
        whole = read_controllers(text, names, template)
        return [] if whole is None else [whole]

    def _verdict(self, parts: Sequence[tuple[tuple[dict[str, float], str], Sequence[Verdict]]]) -> Verdict:
        if not parts:
            return Verdict(Status.SKIPPED, None, "no levels stand before the answer")
        weights = [each.weight for each in self.config.qualities.values()]
        scores, said = [], []
        for (levels, _), found in parts:
            unknown = next((one for one in found if one.score is None), None)
            if unknown is not None:
                return Verdict(unknown.status, None, unknown.detail)
            known = [one.score for one in found if one.score is not None]
            scores.append(level_reward(known, list(levels.values()), weights))
            gaps = zip(levels.items(), known, strict=True)
            said.append(", ".join(f"{name} {score:.2g} of {level:g}" for (name, level), score in gaps))
        score = fmean(scores)
        status = Status.CORRECT if score >= self.config.threshold else Status.WRONG
        return Verdict(status, score, "; ".join(said))

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
