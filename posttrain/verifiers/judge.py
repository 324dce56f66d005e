"""A recipe's verifiers together: one that judges the outcome, any number that shape the reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from posttrain.config.schema import CodeVerifierConfig, VerifierConfig, VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import RecipeError
from posttrain.verifiers import VERIFIERS
from posttrain.verifiers.pool import VerifierPool
from posttrain.verifiers.verdict import Answer, BatchVerifier, Judge, Judgement, Status, Verdict, Verifier

CODE_MARGIN = 3.0
"""Seconds that a worker has beyond the limit of tested code."""


def build_judge(configs: Sequence[VerifierConfig], pool: VerifierPoolConfig) -> Judge:
    """The judge of a recipe's `verifier` section.

    Raises:
        RecipeError: not exactly one verifier judges the outcome, one has a bad pattern, or the pool's time limit is too
            short for one.
        StackError: a package that a verifier needs is not installed.
    """
    verifiers: list[Verifier | BatchVerifier] = [VERIFIERS[config.type](config) for config in configs]
    outcomes = [verifier.name for verifier in verifiers if verifier.outcome]
    if len(outcomes) != 1:
        known = sorted(name for name, verifier in VERIFIERS.items() if verifier.outcome is not False)
        raise RecipeError(
            f"exactly one verifier must judge the outcome, not {len(outcomes)} ({', '.join(outcomes) or 'none'})",
            where="verifier",
            hint="verifiers that do: " + ", ".join(known),
        )
    _check_time(configs, pool)
    # Stable: the outcome verifier first, the others in recipe order.
    pairs = sorted(zip(verifiers, configs, strict=True), key=lambda pair: not pair[0].outcome)
    return PooledJudge([verifier for verifier, _ in pairs], [config for _, config in pairs], pool)


class PooledJudge:
    """Combines the verdicts of worker processes and of verifiers that take whole batches here.

    The first verifier is the outcome. The reward is the sum of weight times score over all verifiers; where a gate
    (`gate: true`) is not correct, it is 0. If the outcome is unknown, so is the reward. If only a shaping verifier
    could not judge (timeout, crash), the outcome is kept, for logs and evaluation, but the reward is None: a sum
    without that part would not compare with the others of its group.
    """

    def __init__(
        self,
        verifiers: Sequence[Verifier | BatchVerifier],
        configs: Sequence[VerifierConfig],
        pool: VerifierPoolConfig,
    ) -> None:
        self.labels = _labels([verifier.name for verifier in verifiers])
        self.weights = [config.weight for config in configs]
        self.gates = [config.gate for config in configs]
        self.batched = {index: v for index, v in enumerate(verifiers) if hasattr(v, "verify")}
        self.pooled = [index for index in range(len(verifiers)) if index not in self.batched]
        self.pool = VerifierPool([verifiers[index] for index in self.pooled], pool)

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], tokens: Sequence[int] | None = None
    ) -> list[Judgement]:
        """One judgement for each completion, in their order.

        Raises:
            ValueError: different numbers of problems, completions and tokens.
            VerifierError: a verifier that cannot go on, such as a judge without budget.
        """
        if tokens is not None and len(tokens) != len(completions):
            raise ValueError(f"{len(completions)} completions but {len(tokens)} token counts")
        if len(problems) != len(completions):
            raise ValueError(f"{len(problems)} problems but {len(completions)} completions")
        columns: dict[int, list[Verdict]] = {}
        if self.pooled:
            rows = self.pool.verify(problems, completions)
            columns = {index: [row[place] for row in rows] for place, index in enumerate(self.pooled)}
        lengths = [None] * len(completions) if tokens is None else tokens
        for index, verifier in self.batched.items():
            outcomes = columns.get(0, [None] * len(completions))
            answers = [Answer(*parts) for parts in zip(completions, lengths, outcomes, strict=True)]
            columns[index] = verifier.verify(problems, answers)
        by_verifier = [columns[index] for index in range(len(self.labels))]
        return [self._combine(verdicts) for verdicts in zip(*by_verifier, strict=True)]

    def close(self) -> None:
        """Stop the workers. Further calls do nothing."""
        self.pool.close()
        for verifier in self.batched.values():
            if isinstance(verifier, Closes):
                verifier.close()

    def _combine(self, verdicts: Sequence[Verdict]) -> Judgement:
        scores = [verdict.score for verdict in verdicts]
        reward = None
        if None not in scores:
            reward = sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
            if any(gate and v.status is not Status.CORRECT for gate, v in zip(self.gates, verdicts, strict=True)):
                reward = 0.0
        return Judgement(dict(zip(self.labels, verdicts, strict=True)), outcome=scores[0], reward=reward)


@runtime_checkable
class Closes(Protocol):
    """A batch verifier that holds something to give back."""

    def close(self) -> None: ...


def _check_time(configs: Sequence[VerifierConfig], pool: VerifierPoolConfig) -> None:
    """The sandbox must be able to end code by its own limit, which is wrong; the pool's limit says nothing of it."""
    for config in configs:
        if isinstance(config, CodeVerifierConfig) and pool.workers and config.timeout + CODE_MARGIN > pool.timeout:
            raise RecipeError(
                f"tested code may take {config.timeout:g} s, and workers are stopped after {pool.timeout:g} s",
                where="verifier_pool.timeout",
                hint=f"set it to at least {config.timeout + CODE_MARGIN:g}, or lower the code verifier's `timeout`",
            )


def _labels(names: list[str]) -> list[str]:
    """Names made unique: the second `format` is `format_2`."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return labels
