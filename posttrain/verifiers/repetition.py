"""How little a completion repeats itself. Shapes the reward; says nothing of the answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.verdict import Status, Verdict


class RepetitionVerifier:
    """The share of the completion's n-grams of words that are different ones; 1 where it is shorter than one.

    After the repetition penalty of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (2502.03373), which is 1 less
    this share, scaled: `weight` is that scale.
    """

    name = "repetition"
    outcome = False

    class Config(VerifierConfig):
        """Shaping only: the share of n-grams that are new; 1 without repetition."""

        type: Literal["repetition"] = "repetition"
        n: int = Field(4, ge=1, description="words per n-gram")

        @property
        def judges_outcome(self) -> bool:
            return False

    def __init__(self, config: RepetitionVerifier.Config) -> None:
        self.n = config.n

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        words = completion.casefold().split()
        grams = list(zip(*(words[start:] for start in range(self.n)), strict=False))
        if not grams:
            return Verdict(Status.CORRECT, 1.0, f"fewer than {self.n} words")
        share = len(set(grams)) / len(grams)
        return Verdict(Status.CORRECT if share == 1.0 else Status.WRONG, share, f"{share:.2f} of {len(grams)} are new")
