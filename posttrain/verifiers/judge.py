"""A recipe's verifiers together: one that judges the outcome, any number that shape the reward."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from posttrain.config.schema import VerifierPoolConfig
from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.errors import RecipeError, VerifierError, nearest
from posttrain.safe_files import temporary_log
from posttrain.terminal import visible
from posttrain.verifiers import VERIFIERS
from posttrain.verifiers.pool import VerifierPool
from posttrain.verifiers.verdict import Answer, BatchVerifier, Judge, Judgement, OwnVerifier, Status, Verdict, Verifier

_log = logging.getLogger(__name__)

CODE_MARGIN = 3.0
"""Seconds that a worker has beyond the limit of tested code."""


def build_judge(configs: Sequence[VerifierConfig], pool: VerifierPoolConfig, log: Path | None = None) -> PooledJudge:
    """The judge of a recipe's `verifier` section.

    Args:
        log: file for what code of the user's own prints; default: one in the folder for temporary files.

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
    return PooledJudge([verifier for verifier, _ in pairs], [config for _, config in pairs], pool, log)


class PooledJudge(Judge):
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
        log: Path | None = None,
    ) -> None:
        self.labels = _labels([verifier.name for verifier in verifiers])
        self.weights = [config.weight for config in configs]
        self.gates = [config.gate for config in configs]
        self.batched = {index: v for index, v in enumerate(verifiers) if hasattr(v, "verify")}
        self.pooled = [index for index in range(len(verifiers)) if index not in self.batched]
        self.own = {index for index in self.pooled if isinstance(verifiers[index], OwnVerifier)}
        if self.own and log is None:
            log = temporary_log("verifier")
        called: list[Any] = [verifiers[index] for index in self.pooled]
        self.pool = VerifierPool(called, pool, log if self.own else None)
        self._told = False

    def start(self, problems: Sequence[Problem]) -> None:
        """Load the user's code, if there is any, before anything slow happens.

        Args:
            problems: among which the first must have the columns that it asks for.

        Raises:
            VerifierError: it cannot be loaded, or there is no such column.
            StackError: a worker cannot start.
        """
        if not self.own:
            return
        for place, form in self.pool.start().items():
            own = self.pool.verifiers[place]
            assert isinstance(own, OwnVerifier)  # only these have a form
            for column in form.columns if problems else ():
                if column not in problems[0].meta:
                    raise VerifierError(
                        f"it asks for {column!r}, which is no column of the data",
                        where=str(own.code),
                        hint=nearest(column, map(str, problems[0].meta)) or "the data have no further columns",
                    )

    def judge(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        tokens: Sequence[int] | None = None,
        ids: Sequence[Sequence[int]] | None = None,
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
            rows = self.pool.verify(problems, completions, tokens, ids if self.own else None)
            self._tell(rows)
            columns = {index: [row[place] for row in rows] for place, index in enumerate(self.pooled)}
        lengths = [None] * len(completions) if tokens is None else tokens
        for index, verifier in self.batched.items():
            outcomes = columns.get(0, [None] * len(completions))
            answers = [Answer(*parts) for parts in zip(completions, lengths, outcomes, strict=True)]
            columns[index] = verifier.verify(problems, answers)
        by_verifier = [columns[index] for index in range(len(self.labels))]
        return [self._combine(verdicts) for verdicts in zip(*by_verifier, strict=True)]

    def _tell(self, rows: Sequence[Sequence[Verdict]]) -> None:
        """Show the first exception of a verifier; the others are counted, those of the user's code are in the log."""
        crashed = (
            (place, verdict) for row in rows for place, verdict in enumerate(row) if verdict.status is Status.CRASH
        )
        place, verdict = next(crashed, (None, None))
        if verdict is not None and not self._told:
            self._told = True
            index = self.pooled[place]
            more = f"\n  output and further tracebacks: {self.pool.log}" if index in self.own else ""
            _log.warning("verifier %s: %s", self.labels[index], visible(f"{verdict.detail}{more}"))

    def close(self) -> None:
        """Stop the workers. Further calls do nothing."""
        self.pool.close()
        for verifier in self.batched.values():
            if isinstance(verifier, Closes):
                verifier.close()

    def _combine(self, verdicts: Sequence[Verdict]) -> Judgement:
        scores = [verdict.score for verdict in verdicts]
        # Who only shapes and has nothing to say adds nothing; where the outcome is skipped, there is none.
        every = enumerate(zip(self.weights, self.gates, verdicts, strict=True))
        parts = [part for place, part in every if place == 0 or part[2].status is not Status.SKIPPED]
        reward = None
        if all(verdict.score is not None for _, _, verdict in parts):
            reward = sum(weight * verdict.score for weight, _, verdict in parts)
            if any(gate and verdict.status is not Status.CORRECT for _, gate, verdict in parts):
                reward = 0.0
        return Judgement(dict(zip(self.labels, verdicts, strict=True)), outcome=scores[0], reward=reward)


@runtime_checkable
class Closes(Protocol):
    """A batch verifier that holds something to give back."""

    def close(self) -> None: ...


def _check_time(configs: Sequence[VerifierConfig], pool: VerifierPoolConfig) -> None:
    """The sandbox must be able to end code by its own limit, which is wrong; the pool's limit says nothing of it."""
    for config in configs:
        seconds = config.seconds
        if seconds is not None and pool.workers and seconds + CODE_MARGIN > pool.timeout:
            raise RecipeError(
                f"tested code may take {seconds:g} s, and workers are stopped after {pool.timeout:g} s",
                where="verifier_pool.timeout",
                hint=f"set it to at least {seconds + CODE_MARGIN:g}, or lower the {config.type} verifier's `timeout`",
            )


def _labels(names: list[str]) -> list[str]:
    """Names made unique: the second `format` is `format_2`."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return labels
