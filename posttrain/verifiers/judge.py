"""A recipe's verifiers together: one that judges the outcome, any number that shape the reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from posttrain.config.schema import VerifierConfig, VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import RecipeError
from posttrain.verifiers import VERIFIERS
from posttrain.verifiers.pool import VerifierPool
from posttrain.verifiers.verdict import Judge, Judgement, Verdict, Verifier


def build_judge(configs: Sequence[VerifierConfig], pool: VerifierPoolConfig) -> Judge:
    """The judge of a recipe's `verifier` section.

    Raises:
        RecipeError: not exactly one verifier judges the outcome, or one has a bad pattern.
        StackError: a package that a verifier needs is not installed.
    """
    verifiers = [VERIFIERS[config.type](config) for config in configs]
    outcomes = [verifier.name for verifier in verifiers if verifier.outcome]
    if len(outcomes) != 1:
        known = sorted(name for name, verifier in VERIFIERS.items() if verifier.outcome)
        raise RecipeError(
            f"exactly one verifier must judge the outcome, not {len(outcomes)} ({', '.join(outcomes) or 'none'})",
            where="verifier",
            hint="verifiers that do: " + ", ".join(known),
        )
    # Stable: the outcome verifier first, the others in recipe order.
    pairs = sorted(zip(verifiers, configs, strict=True), key=lambda pair: not pair[0].outcome)
    return PooledJudge([verifier for verifier, _ in pairs], [config.weight for _, config in pairs], pool)


class PooledJudge:
    """Combines the verdicts of a pool.

    The first verifier is the outcome. The reward is the sum of weight times score over all verifiers. If the outcome
    is unknown, so is the reward. If only a shaping verifier could not judge (timeout, crash), the outcome is kept, for
    logs and evaluation, but the reward is None: a sum without that part would not compare with the others of its group.
    """

    def __init__(self, verifiers: Sequence[Verifier], weights: Sequence[float], pool: VerifierPoolConfig) -> None:
        self.labels = _labels([verifier.name for verifier in verifiers])
        self.weights = list(weights)
        self.pool = VerifierPool(verifiers, pool)

    def judge(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Judgement]:
        """One judgement for each completion, in their order.

        Raises:
            ValueError: different numbers of problems and completions.
        """
        return [self._combine(verdicts) for verdicts in self.pool.verify(problems, completions)]

    def close(self) -> None:
        """Stop the workers. Further calls do nothing."""
        self.pool.close()

    def _combine(self, verdicts: list[Verdict]) -> Judgement:
        scores = [verdict.score for verdict in verdicts]
        reward = None
        if None not in scores:
            reward = sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
        return Judgement(dict(zip(self.labels, verdicts, strict=True)), outcome=scores[0], reward=reward)


def _labels(names: list[str]) -> list[str]:
    """Names made unique: the second `format` is `format_2`."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return labels
