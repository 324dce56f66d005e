"""Sources that have verifiers of their own: each completion goes to the judge of the source of its problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.config.mixtures import source_of
from posttrain.data.sample import Problem
from posttrain.verifiers.verdict import Judge, Judgement


class JudgeBySource(Judge):
    """One judge for several sources.

    Args:
        judges: name of a source -> its judge; sources may share one.
    """

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        self.judges = dict(judges)

    def judge(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        tokens: Sequence[int] | None = None,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Judgement]:
        """As `PooledJudge.judge`; the completions of one judge go to it together."""
        owners = [self.judges[source_of(problem.id)] for problem in problems]
        found: dict[int, Judgement] = {}
        for judge in dict.fromkeys(owners):
            places = [place for place, owner in enumerate(owners) if owner is judge]
            judged = judge.judge(
                [problems[place] for place in places],
                [completions[place] for place in places],
                None if tokens is None else [tokens[place] for place in places],
                None if ids is None else [ids[place] for place in places],
            )
            found |= dict(zip(places, judged, strict=True))
        return [found[place] for place in range(len(problems))]

    def close(self) -> None:
        """Stop the workers. Further calls do nothing."""
        for judge in dict.fromkeys(self.judges.values()):
            judge.close()
