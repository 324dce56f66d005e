"""What a set of traces is like, and which methods it suits.

The figures are of one policy; traces of others count as what it could learn from. Reading order: `inspect_traces`, then
`posttrain.evaluation.advice`.

Rates are unbiased also where sampling stopped at enough correct completions. The plain share of correct ones is then
too high, because sampling stops after luck. Given the number of rounds and of correct completions, every order of
results that the stopping rule allows is equally likely; the estimate is the share of those orders whose first k hold
a correct one (Rao-Blackwell on the first k draws, which are always made). Without a stopping rule this is pass@k of
Chen et al. 2021, arXiv 2107.03374. It exists for k up to the size of a round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import comb
from statistics import fmean, median, pstdev
from typing import Any

from posttrain.data.traces import Manifest, Trace, TraceSet
from posttrain.errors import DataError, nearest
from posttrain.evaluation.informative import informative_shares
from posttrain.evaluation.statistics import Interval, mean_interval

GROUPS = (2, 4, 8, 16, 32, 64)
"""Group sizes for which the share of informative groups is foretold."""


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """One problem, as the policy does on it.

    Attributes:
        problem_id: of the problem.
        samples: its traces by the policy.
        judged: those with a verdict on the answer.
        correct: correct ones among them.
        pass_rate: unbiased; None without judged traces.
        distinct: different texts.
        distinct_correct: different correct texts.
        returns: mean reward; None without rewards.
        spread: standard deviation of the rewards.
        correct_by_others: correct traces by other policies.
        pair: whether there are a correct and a wrong text, so that a pair can be made.
    """

    problem_id: str
    samples: int
    judged: int
    correct: int
    pass_rate: float | None
    distinct: int
    distinct_correct: int
    returns: float | None
    spread: float | None
    correct_by_others: int
    pair: bool


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """The traces of one policy.

    Attributes:
        policy: its label.
        kind: `sampled` or `taken in`.
        traces: number of them.
        prompts: problems with a trace of it.
        correct: share of the judged ones; None without any. Not corrected for early stopping.
        length: mean length, in tokens for sampled traces and in characters for text.
    """

    policy: str
    kind: str
    traces: int
    prompts: int
    correct: float | None
    length: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """The figures of one policy over all problems.

    Attributes:
        policy: whose figures these are.
        policies: one line per policy.
        prompts: problems, over all policies.
        traces: of the policy.
        unknown: share of its traces without a verdict on the answer.
        pass_at: k -> mean over problems with interval; problems where it cannot be estimated are left out.
        pass_at_prompts: k -> problems in that mean.
        stopped_early: whether sampling stopped at enough correct ones.
        always: problems with correct traces only.
        sometimes: with correct and other ones.
        never: without a correct one.
        never_by_anyone: without a correct one by any policy.
        returns: mean over problems of their mean reward; None without rewards.
        returns_between: standard deviation of those means.
        returns_within: mean over problems of the standard deviation of rewards, which is what a group compares.
        distinct: share of the policy's traces with a text that no earlier trace of the problem has.
        distinct_correct: mean number of different correct texts of a solved problem; None if none is solved.
        logp_per_token: mean log-prob of its tokens when they were sampled, in nats; None for text.
        logp_per_trace: mean over traces of the sum; None for text.
        length: mean length in tokens (text: characters).
        length_median: median.
        length_95: 95% are at most as long.
        truncated: share cut at the token limit; None for text.
        informative: G -> expected share of groups of G whose rewards differ, with interval; see `informative`.
        pairs: share of problems with a correct and a wrong text.
        figures: one per problem.
    """

    policy: str
    policies: list[PolicyFigures]
    prompts: int
    traces: int
    unknown: float
    pass_at: dict[int, Interval]
    pass_at_prompts: dict[int, int]
    stopped_early: bool
    always: int
    sometimes: int
    never: int
    never_by_anyone: int
    returns: float | None
    returns_between: float | None
    returns_within: float | None
    distinct: float
    distinct_correct: float | None
    logp_per_token: float | None
    logp_per_trace: float | None
    length: float
    length_median: float
    length_95: float
    truncated: float | None
    informative: dict[int, Interval]
    pairs: float
    figures: list[PromptFigures]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def inspect_traces(found: TraceSet, *, policy: str | None = None, ks: Sequence[int] = (1, 4, 16)) -> Inspection:
    """The figures of a policy.

    Args:
        found: traces of one file or several.
        policy: whose figures; default: the one that sampled most.
        ks: pass@k; those above the number of samples (or of a round, where sampling stopped early) are left out.

    Raises:
        DataError: no traces, or none of that policy.
    """
    label = _chosen_policy(found, policy)
    groups = found.by_problem()
    designs = {key: _Design.of(manifest) for key, manifest in found.manifests.items()}
    own = [trace for trace in found.traces if trace.policy == label]
    figures = [_prompt(key, group, label, designs) for key, group in groups.items()]
    seen = [each for each in figures if each.samples]
    rated = [each for each in seen if each.judged]
    by_problem = {key: [t for t in group if t.policy == label and t.judged] for key, group in groups.items()}
    judged = [group for group in by_problem.values() if group]
    values = {k: [v for group in judged if (v := _pass_at(group, k, designs)) is not None] for k in ks}
    rewards = _rewards(own)
    returns = [each.returns for each in seen if each.returns is not None]
    lengths = sorted(_length(trace) for trace in own)
    sampled = [trace for trace in own if trace.logps]
    return Inspection(
        policy=label,
        policies=_policies(found),
        prompts=len(groups),
        traces=len(own),
        unknown=1.0 - sum(trace.judged for trace in own) / len(own),
        pass_at={k: mean_interval(known) for k, known in values.items() if known},
        pass_at_prompts={k: len(known) for k, known in values.items() if known},
        stopped_early=any(designs[trace.manifest].enough is not None for trace in own),
        always=sum(each.correct == each.judged for each in rated),
        sometimes=sum(0 < each.correct < each.judged for each in rated),
        never=sum(each.correct == 0 for each in rated),
        never_by_anyone=sum(each.correct == 0 and not each.correct_by_others for each in figures),
        returns=fmean(returns) if returns else None,
        returns_between=pstdev(returns) if returns else None,
        returns_within=fmean(each.spread for each in seen if each.spread is not None) if returns else None,
        distinct=sum(each.distinct for each in seen) / len(own),
        distinct_correct=_mean([each.distinct_correct for each in seen if each.correct]),
        logp_per_token=_mean([value for trace in sampled for value in trace.logps or ()]),
        logp_per_trace=_mean([sum(trace.logps or ()) for trace in sampled]),
        length=fmean(lengths),
        length_median=median(lengths),
        length_95=lengths[min(int(0.95 * len(lengths)), len(lengths) - 1)],
        truncated=_mean([trace.finished is False for trace in own if trace.finished is not None]),
        informative=informative_shares(rewards, GROUPS) if rewards else {},
        pairs=fmean(each.pair for each in figures),
        figures=figures,
    )


# ------------------------------------------------------------------------------------------------- rates under stopping


@dataclass(frozen=True, slots=True)
class _Design:
    """How a manifest's traces came about: completions per round, and the number of correct ones that ends it."""

    round_size: int | None
    enough: int | None

    @classmethod
    def of(cls, manifest: Manifest) -> _Design:
        sampling = manifest.sampling or {}
        return cls(sampling.get("round_size"), sampling.get("stop_at_correct"))


def stopped_pass_at_k(rounds: tuple[int, ...], correct: int, k: int, enough: int) -> float:
    """Unbiased pass@k where sampling ended after the round in which `enough` correct ones were reached.

    Args:
        rounds: judged samples of each round that was made.
        correct: correct ones in all of them.
        k: at most the size of the first round.
        enough: correct ones that end the sampling.
    """
    if not 1 <= k <= rounds[0]:
        raise ValueError(f"pass@{k} needs 1 <= k <= {rounds[0]}, the samples of the first round")
    return 1.0 - _orders(rounds, correct, k, enough) / _orders(rounds, correct, 0, enough)


@lru_cache(maxsize=4096)
def _orders(rounds: tuple[int, ...], correct: int, fixed: int, enough: int) -> int:
    """Orders of right and wrong that the rule allows, the first `fixed` samples being all wrong."""
    free = rounds[0] - fixed
    ways = {c: comb(free, c) for c in range(free + 1)}
    for size in rounds[1:]:
        following: Counter[int] = Counter()
        for before, number in ways.items():
            if before < enough:  # else the rule would have ended it there
                for more in range(size + 1):
                    following[before + more] += number * comb(size, more)
        ways = following
    return ways.get(correct, 0)


def _pass_at(group: Sequence[Trace], k: int, designs: dict[str, _Design]) -> float | None:
    """pass@k of the judged traces of a problem; None if there are too few."""
    correct, rounds, enough = _rounds(group, designs)
    if k > rounds[0]:
        return None
    if enough is None:
        return 1.0 - comb(rounds[0] - correct, k) / comb(rounds[0], k)
    return stopped_pass_at_k(rounds, correct, k, enough)


def _rounds(group: Sequence[Trace], designs: dict[str, _Design]) -> tuple[int, tuple[int, ...], int | None]:
    """Correct ones, judged samples per round, and the number that ended the sampling; one round without such a rule."""
    design, correct = designs[group[0].manifest], sum(trace.correct for trace in group)
    several = len({trace.manifest for trace in group}) > 1
    if design.enough is None or design.round_size is None or several:
        return correct, (len(group),), None
    counts = Counter(trace.sample // design.round_size for trace in group)
    return correct, tuple(counts[index] for index in sorted(counts)), design.enough


# ------------------------------------------------------------------------------------------------------------- figures


def _chosen_policy(found: TraceSet, policy: str | None) -> str:
    counts = Counter(trace.policy for trace in found.traces)
    if not counts:
        raise DataError("there are no traces", hint="`posttrain sample` makes some")
    if policy is not None:
        if policy not in counts:
            raise DataError(f"no traces of {policy!r}", hint=nearest(policy, counts))
        return policy
    sampled = Counter(trace.policy for trace in found.traces if trace.ids is not None)
    return (sampled or counts).most_common(1)[0][0]


def _prompt(key: str, group: Sequence[Trace], policy: str, designs: dict[str, _Design]) -> PromptFigures:
    own = [trace for trace in group if trace.policy == policy]
    judged = [trace for trace in own if trace.judged]
    rewards = [trace.reward for trace in own if trace.reward is not None]
    right = {trace.text for trace in own if trace.correct}
    return PromptFigures(
        problem_id=key,
        samples=len(own),
        judged=len(judged),
        correct=sum(trace.correct for trace in judged),
        pass_rate=_pass_at(judged, 1, designs) if judged else None,
        distinct=len({trace.text for trace in own}),
        distinct_correct=len(right),
        returns=fmean(rewards) if rewards else None,
        spread=pstdev(rewards) if rewards else None,
        correct_by_others=sum(trace.correct for trace in group if trace.policy != policy),
        pair=any(trace.correct for trace in group) and any(trace.judged and not trace.correct for trace in group),
    )


def _rewards(own: Sequence[Trace]) -> list[list[float]]:
    """Known rewards of each problem; where no trace has one, whether the judged ones are correct."""
    by_problem: dict[str, list[float]] = {}
    rewarded = any(trace.reward is not None for trace in own)
    for trace in own:
        reward = trace.reward if rewarded else float(trace.correct) if trace.judged else None
        if reward is not None:
            by_problem.setdefault(trace.problem_id, []).append(reward)
    return list(by_problem.values())


def _policies(found: TraceSet) -> list[PolicyFigures]:
    figures = []
    for label in dict.fromkeys(trace.policy for trace in found.traces):
        own = [trace for trace in found.traces if trace.policy == label]
        figures.append(
            PolicyFigures(
                policy=label,
                kind=found.manifests[own[0].manifest].kind if own[0].manifest in found.manifests else "unknown",
                traces=len(own),
                prompts=len({trace.problem_id for trace in own}),
                correct=_mean([trace.correct for trace in own if trace.judged]),
                length=fmean(map(_length, own)),
            )
        )
    return figures


def _length(trace: Trace) -> int:
    return len(trace.text) if trace.ids is None else len(trace.ids)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
