"""Pairs out of scored completions: the same traces and settings give the same pairs.

What is compared are the different texts of one problem, each with its score. Left out before, and counted:

- completions without a score (a verifier could not judge, or none was asked),
- completions cut at the token limit, unless asked for: as text they would be given an end token that nobody wrote,
- empty ones, and repeats of a text.

Equal scores never make a pair. Among equally good completions the choice is random, from the seed and the problem's id
alone, so that more problems do not change the pairs of others.

| strategy | pairs of a problem |
| --- | --- |
| best_worst | one: a best one against a worst one |
| margin | every two whose scores differ by `margin` or more, largest difference first |
| ranked | a best one against every lower one, largest difference first (a curriculum from easy to hard) |
| second_best | one: the second best against a worst one, with the best as `gold`; the first two may score the same |
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from posttrain.config.collection import PairSettings, TraceSettings
from posttrain.data.pictures import by_path
from posttrain.data.sample import Message
from posttrain.data.traces import Trace, read_traces
from posttrain.errors import DataError, RecipeError
from posttrain.safe_files import write_json_atomic, write_text_atomic


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one problem, the first with the higher score; `gold` where the strategy gives one.

    Attributes:
        rank: position among the pairs of its problem, from 0.
    """

    chosen: Trace
    rejected: Trace
    chosen_score: float
    rejected_score: float
    gold: Trace | None = None
    gold_score: float | None = None
    rank: int = 0

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score

    def to_row(self) -> dict[str, Any]:
        """JSON values in the columns that a recipe's `data.preferences` reads without further keys."""
        prompt: str | tuple[Message, ...] = self.chosen.prompt
        row: dict[str, Any] = {
            "prompt": prompt,
            "chosen": response_of(self.chosen),
            "rejected": response_of(self.rejected),
            "score_chosen": self.chosen_score,
            "score_rejected": self.rejected_score,
        }
        if self.gold is not None:
            row |= {"gold": response_of(self.gold), "score_gold": self.gold_score}
        row |= {"problem_id": self.chosen.problem_id, "rank": self.rank}
        row |= {"chosen_policy": self.chosen.policy, "rejected_policy": self.rejected.policy}
        return row | ({} if self.chosen.reference is None else {"reference": self.chosen.reference})


@dataclass(slots=True)
class PairReport:
    """What was made of the traces. Every trace is used, unused or one of the kinds left out.

    Attributes:
        strategy: as asked.
        traces: all of them.
        unscored: without a score.
        unfinished: cut at the token limit.
        empty: without text.
        repeated: texts that stand there before.
        prompts: problems.
        prompts_used: those with a pair.
        prompts_tied: those where the chosen and the rejected one would score the same.
        prompts_single: those with fewer different completions than the strategy needs.
        prompts_narrow: those where they differ, by less than the margin.
        pairs: made.
        over_limit: pairs above `max_pairs`, left out.
        margin: mean, smallest and largest difference of scores; None without pairs.
        chosen_length: mean length of the chosen ones, in `length_unit`.
        rejected_length: the same of the rejected ones.
        longer_chosen: share of pairs whose chosen one is the longer; an objective that sums log-probs may learn that.
        length_unit: tokens where all have ids, else characters.
        by_policy: policy -> share of all chosen ones, and of all rejected ones, that it wrote.
        own: share of all chosen ones, and of all rejected ones, that are among the policy's own samples; None where no
            samples were given to compare with.
    """

    strategy: str
    traces: int = 0
    unscored: int = 0
    unfinished: int = 0
    empty: int = 0
    repeated: int = 0
    prompts: int = 0
    prompts_used: int = 0
    prompts_tied: int = 0
    prompts_single: int = 0
    prompts_narrow: int = 0
    pairs: int = 0
    over_limit: int = 0
    margin: dict[str, float] | None = None
    chosen_length: float | None = None
    rejected_length: float | None = None
    longer_chosen: float | None = None
    length_unit: str = "tokens"
    by_policy: dict[str, tuple[float, float]] = field(default_factory=dict)
    own: tuple[float, float] | None = None

    def unpaired(self) -> str:
        """Why prompts have no pair, for people."""
        return (
            f"{self.prompts_tied:,} prompts tied, {self.prompts_narrow:,} below the margin, "
            f"{self.prompts_single:,} with too few different texts"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def make_pairs(
    groups: Mapping[str, Sequence[Trace]], settings: PairSettings, *, own: Iterable[Trace] | None = None
) -> tuple[list[Pair], PairReport]:
    """The pairs of every problem, in the order of the problems.

    Args:
        groups: problem id -> its traces (`TraceSet.by_problem`).
        settings: strategy and limits.
        own: samples of the policy that will be trained, to say how much of the pairs it would write itself. Problems
            are matched by prompt.
    """
    report = PairReport(settings.strategy, prompts=len(groups))
    pairs: list[Pair] = []
    for problem_id, traces in groups.items():
        rng = random.Random(f"{settings.seed} {problem_id}")
        candidates = distinct_scored(traces, settings, report)
        rng.shuffle(candidates)
        candidates.sort(key=lambda candidate: -candidate[1])  # stable: equal scores stay shuffled
        made = _STRATEGIES[settings.strategy](candidates, settings.margin)
        _count_prompt(report, settings, candidates, made)
        if settings.max_pairs is not None and len(made) > settings.max_pairs:
            report.over_limit += len(made) - settings.max_pairs
            kept = sorted(rng.sample(range(len(made)), settings.max_pairs))
            made = [made[index] for index in kept]
        pairs += [_pair(parts, rank) for rank, parts in enumerate(made)]
    _describe(report, pairs, own)
    return pairs, report


def write_pairs(paths: Sequence[Path], out: Path, settings: PairSettings, own: Path | None = None) -> PairReport:
    """Make pairs of trace files, and write them and their report (`<name>.report.json`).

    Args:
        paths: trace files.
        out: ends in .jsonl; an existing file is replaced.
        settings: strategy and limits.
        own: trace file of the policy that will be trained; see `make_pairs`.

    Raises:
        RecipeError: `out` is no .jsonl file.
        DataError: as `read_traces`, or no pair can be made.
    """
    if out.suffix != ".jsonl":
        raise RecipeError("pairs are written as .jsonl", where=str(out), hint=f"{out.stem}.jsonl")
    groups = read_traces(paths).by_problem()
    pairs, report = make_pairs(groups, settings, own=None if own is None else read_traces([own]).traces)
    if not pairs:
        raise DataError(
            f"no pair can be made of {report.traces:,} traces: {report.unpaired()}",
            where=str(paths[0]),
            hint="sample more, lower the margin, or take harder or easier problems: `posttrain inspect`",
        )
    rows = by_path([pair.to_row() for pair in pairs], out)
    write_text_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json_atomic(out.with_suffix(".report.json"), report.to_dict())
    return report


Candidate = tuple[Trace, float]
Parts = tuple[Candidate, Candidate, Candidate | None]
"""Chosen, rejected and gold."""


class Counts(Protocol):
    """Where the traces of a problem are counted; see `PairReport`."""

    traces: int
    unscored: int
    unfinished: int
    empty: int
    repeated: int


def distinct_scored(traces: Sequence[Trace], settings: TraceSettings, report: Counts) -> list[Candidate]:
    """The different scored texts of a problem, in their order; the others are counted in the report."""
    found: dict[str, Candidate] = {}
    for trace in traces:
        report.traces += 1
        score = trace.reward if settings.score == "reward" else trace.outcome
        if score is None:
            report.unscored += 1
        elif trace.finished is False and not settings.unfinished:
            report.unfinished += 1
        elif not trace.text.strip():
            report.empty += 1
        elif trace.text in found:
            report.repeated += 1
        else:
            found[trace.text] = (trace, score)
    return list(found.values())


def _best_worst(ordered: Sequence[Candidate], margin: float) -> list[Parts]:
    parts: list[Parts] = [(ordered[0], ordered[-1], None)] if len(ordered) > 1 else []
    return [part for part in parts if _apart(part, margin)]


def _margin(ordered: Sequence[Candidate], margin: float) -> list[Parts]:
    parts: list[Parts] = [(chosen, rejected, None) for chosen, rejected in combinations(ordered, 2)]
    apart = [part for part in parts if _apart(part, margin)]
    return sorted(apart, key=lambda part: part[1][1] - part[0][1])


def _ranked(ordered: Sequence[Candidate], margin: float) -> list[Parts]:
    parts: list[Parts] = [(ordered[0], rejected, None) for rejected in ordered[1:]]
    return sorted([part for part in parts if _apart(part, margin)], key=lambda part: part[1][1])


def _second_best(ordered: Sequence[Candidate], margin: float) -> list[Parts]:
    parts: list[Parts] = [(ordered[1], ordered[-1], ordered[0])] if len(ordered) > 2 else []
    return [part for part in parts if _apart(part, margin)]


def _apart(part: Parts, margin: float) -> bool:
    difference = part[0][1] - part[1][1]
    return difference > 0 and difference >= margin


_STRATEGIES = {"best_worst": _best_worst, "margin": _margin, "ranked": _ranked, "second_best": _second_best}


def _pair(parts: Parts, rank: int) -> Pair:
    (chosen, chosen_score), (rejected, rejected_score), gold = parts
    best, best_score = (None, None) if gold is None else gold
    return Pair(chosen, rejected, chosen_score, rejected_score, best, best_score, rank)


def response_of(trace: Trace) -> str | tuple[Message, ...]:
    """The completion in the form of its prompt."""
    # Beside a prompt of messages the response is one too: some readers take nothing else.
    return trace.text if isinstance(trace.prompt, str) else ({"role": "assistant", "content": trace.text},)


def _count_prompt(
    report: PairReport, settings: PairSettings, candidates: Sequence[Candidate], made: Sequence[Parts]
) -> None:
    first = 1 if settings.strategy == "second_best" else 0  # which one is chosen, the best coming first
    if made:
        report.prompts_used += 1
    elif len(candidates) < first + 2:
        report.prompts_single += 1
    elif candidates[first][1] == candidates[-1][1]:
        report.prompts_tied += 1
    else:
        report.prompts_narrow += 1


def _describe(report: PairReport, pairs: Sequence[Pair], own: Iterable[Trace] | None) -> None:
    report.pairs = len(pairs)
    if not pairs:
        return
    margins = [pair.margin for pair in pairs]
    report.margin = {"mean": fmean(margins), "min": min(margins), "max": max(margins)}
    in_tokens = all(trace.ids is not None for pair in pairs for trace in (pair.chosen, pair.rejected))
    report.length_unit = "tokens" if in_tokens else "characters"
    chosen, rejected = ([_length(getattr(pair, role), in_tokens) for pair in pairs] for role in ("chosen", "rejected"))
    report.chosen_length, report.rejected_length = fmean(chosen), fmean(rejected)
    report.longer_chosen = fmean(a > b for a, b in zip(chosen, rejected, strict=True))
    policies = dict.fromkeys(trace.policy for pair in pairs for trace in (pair.chosen, pair.rejected))
    report.by_policy = {
        policy: (fmean(p.chosen.policy == policy for p in pairs), fmean(p.rejected.policy == policy for p in pairs))
        for policy in policies
    }
    if own is not None:
        written = set(map(_key, own))
        report.own = (
            fmean(_key(pair.chosen) in written for pair in pairs),
            fmean(_key(pair.rejected) in written for pair in pairs),
        )


def _key(trace: Trace) -> tuple[str, str]:
    return json.dumps(trace.prompt), trace.text


def _length(trace: Trace, in_tokens: bool) -> int:
    return len(trace.ids) if in_tokens and trace.ids is not None else len(trace.text)
