"""maj@k: would the answer given most often be right?

Only completions with an answer vote. All right answers are one answer, since each equals the reference. Wrong answers
are the same if `Verdict.answer` is: numbers by value, other answers by their text without space. Where wrong formulas
are spelt in many ways, maj@k is a little too high. A tie is broken by lot.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from posttrain.verifiers.verdict import Status, Verdict


def answer_of(verdict: Verdict) -> str | None:
    """The answer that a completion votes for; None if it abstains: no answer, an unreadable one, or not judged.

    Args:
        verdict: of a verifier that `names_answers`.
    """
    return verdict.answer if verdict.status is Status.WRONG else None


def wrong_votes(answers: Sequence[str | None]) -> tuple[int, ...]:
    """How many votes each wrong answer has, most first."""
    return tuple(sorted(Counter(answer for answer in answers if answer is not None).values(), reverse=True))


@lru_cache(maxsize=65536)
def majority_at_k(judged: int, correct: int, wrong: tuple[int, ...], k: int) -> float:
    """Probability that the answer given most often among k of the judged completions is right.

    Exact: the share of the k-subsets that are won by the right answer, a tie between t answers counting 1 / t. Counted
    by the number of votes v of the right answer: a polynomial over the other answers, each with at most v votes.

    Args:
        judged: completions with a known verdict; those that are neither `correct` nor in `wrong` abstain.
        correct: right ones.
        wrong: votes of each wrong answer.
        k: from 1 to `judged`.

    Returns:
        In [0, 1]; 0 if there is no right completion.
    """
    silent = judged - correct - sum(wrong)
    if not 1 <= k <= judged or silent < 0 or correct < 0:
        raise ValueError(f"maj@{k} of {judged} judged completions, {correct} right, wrong ones {wrong}")
    won = 0.0
    for votes in range(1, min(correct, k) + 1):
        # ways[t, m]: ways to choose m completions of the other answers, t of which have as many votes.
        ways = np.zeros((len(wrong) + 1, k - votes + 1))
        ways[0, 0] = 1.0
        for size in wrong:
            ways = _with_answer(ways, size, votes)
        ways = _with_answer(ways, silent, silent + 1)
        ties = ways[:, k - votes] / np.arange(1, len(wrong) + 2)
        won += math.comb(correct, votes) * float(ties.sum())
    return min(1.0, won / math.comb(judged, k))


def _with_answer(ways: np.ndarray, size: int, votes: int) -> np.ndarray:
    """The ways once another answer, given `size` times, has at most `votes` votes."""
    room = ways.shape[1]
    after = np.zeros_like(ways)
    for chosen in range(min(size, votes, room - 1) + 1):
        part = math.comb(size, chosen) * ways[:, : room - chosen]
        if chosen == votes:
            after[1:, chosen:] += part[:-1]
        else:
            after[:, chosen:] += part
    return after
