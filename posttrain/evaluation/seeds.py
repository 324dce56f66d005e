"""Methods compared over seeds: a sequential test of every pair, robust means, compute, and what is still needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.config.comparison import CompareConfig
from posttrain.errors import DataError
from posttrain.evaluation.aggregate import FEW_SEEDS, interquartile_interval
from posttrain.evaluation.runs import RunScore, compute_gap, score_runs
from posttrain.evaluation.sequential import Decision, SequentialPlan, SequentialResult, seeds_needed, sequential_test
from posttrain.evaluation.statistics import Interval
from posttrain.tracking.ledger import AMOUNTS

SCHEMA = 1
POWER = 0.8
"""Probability to tell two methods apart, for the number of seeds that is advised."""


@dataclass(frozen=True, slots=True)
class MethodScores:
    """One method over several seeds.

    Attributes:
        name: of the method.
        runs: one per seed.
        mean: of the scores.
        deviation: standard deviation of the scores; None with one seed.
        iqm: interquartile mean over seeds and benchmarks.
        flops: median over the runs; None if one kept no ledger.
        spent: medians of tokens and seconds, by the names of `tracking.ledger.AMOUNTS`; those that every run logged.
    """

    name: str
    runs: tuple[RunScore, ...]
    mean: float
    deviation: float | None
    iqm: Interval
    flops: float | None
    spent: dict[str, float]


@dataclass(frozen=True, slots=True)
class SeedAdvice:
    """What an undecided pair needs.

    Attributes:
        first: a method.
        second: another one.
        next_look: further seeds of each, (first, second), for the next look.
        in_all: seeds of each that would probably decide; None if the means are equal or nothing can be said yet.
        within_plan: whether that is no more than the plan has.
    """

    first: str
    second: str
    next_look: tuple[int, int]
    in_all: int | None
    within_plan: bool


@dataclass(frozen=True, slots=True)
class SeedComparison:
    """Two methods, compared over seeds.

    Attributes:
        plan: what was fixed: measure, benchmarks, methods, looks, error, compute rule.
        methods: in the order given.
        result: of the sequential test.
        advice: for the pairs that are undecided.
        compute_gap: largest compute of a method over the smallest, minus 1; None if a run kept no ledger.
        unused: method -> seeds beyond the last complete group, which no look has seen.
    """

    plan: dict[str, Any]
    methods: tuple[MethodScores, ...]
    result: SequentialResult
    advice: tuple[SeedAdvice, ...]
    compute_gap: float | None
    unused: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"schema": SCHEMA, **asdict(self)}


def compare_seeds(config: CompareConfig) -> SeedComparison:
    """Compare methods over seeds.

    Raises:
        DataError: as `runs.score_runs`.
        RecipeError: a plan that could never decide.
    """
    runs = score_runs(config)
    plan = SequentialPlan(config.seeds_per_look, config.looks, config.alpha, seed=config.seed)
    return comparison_of(runs, plan, _plan(config, list(next(iter(runs.values()))[0].scores)))


def comparison_of(
    runs: Mapping[str, Sequence[RunScore]], plan: SequentialPlan, written: dict[str, Any]
) -> SeedComparison:
    """Compare methods whose scores are known.

    Args:
        runs: method -> one run per seed, in the order of the seeds.
        plan: of the test.
        written: all that was fixed, as `SeedComparison.plan`.

    Raises:
        DataError: as `sequential_test`.
        RecipeError: a plan that could never decide.
    """
    scores = {name: [run.score for run in found] for name, found in runs.items()}
    result = sequential_test(scores, plan)
    methods = tuple(_method(name, found, plan.seed) for name, found in runs.items())
    flops = [method.flops for method in methods if method.flops is not None]
    seen = _seeds_seen(result, plan)
    return SeedComparison(
        plan=written,
        methods=methods,
        result=result,
        advice=tuple(
            _advice(decision, scores, result, plan) for decision in result.decisions if decision.outcome == "undecided"
        ),
        compute_gap=compute_gap(flops) if len(flops) == len(methods) else None,
        unused={name: len(found) - seen[name] for name, found in runs.items() if len(found) > seen[name]},
    )


def check_continued(before: Mapping[str, Any], now: SeedComparison, *, where: str) -> None:
    """Check that a comparison goes on with an earlier one: same plan, earlier seeds unchanged.

    The error is controlled only if the plan was fixed before the first look.

    Args:
        before: the JSON form of the earlier comparison.
        now: with more seeds.
        where: the earlier file.

    Raises:
        DataError: it does not, and why.
    """
    hint = "an error rate holds for a plan that was fixed in advance; write another plan to another file"
    if before.get("schema") != SCHEMA or "plan" not in before:
        raise DataError("not a comparison of methods over seeds", where=where)
    for key, value in now.plan.items():
        if before["plan"].get(key) != value:
            raise DataError(
                f"the plan changed: {key} was {before['plan'].get(key)}, is {value}", where=where, hint=hint
            )
    runs = {method["name"]: [run["run"] for run in method["runs"]] for method in before["methods"]}
    for method in now.methods:
        found = [run.run for run in method.runs][: len(runs[method.name])]
        if found != runs[method.name]:
            raise DataError(f"earlier runs of {method.name!r} are left out or in another order", where=where, hint=hint)


def print_seed_comparison(comparison: SeedComparison, console: Console) -> None:
    """Print it in 80 columns."""
    plan = comparison.plan
    benchmarks = ", ".join(plan["benchmarks"])
    console.print(Text(f"{plan['measure']} on {benchmarks}, percent", style="bold"))
    table = _table("method", "seeds", "mean", "sd", "IQM", "FLOPs")
    for method in comparison.methods:
        iqm = f"{100 * method.iqm.value:.1f} [{100 * method.iqm.low:.1f}, {100 * method.iqm.high:.1f}]"
        spread = "-" if method.deviation is None else f"{100 * method.deviation:.1f}"
        flops = "unknown" if method.flops is None else f"{method.flops:.2e}"
        table.add_row(method.name, str(len(method.runs)), f"{100 * method.mean:.1f}", spread, iqm, flops)
    console.print(table)
    if any(method.spent for method in comparison.methods):
        console.print()
        console.print(_spent_table(comparison.methods))
    console.print()
    for decision in comparison.result.decisions:
        console.print(Text(in_words(decision)))
    console.print()
    for line in notes(comparison):
        console.print(Text(line))


def notes(comparison: SeedComparison) -> list[str]:
    """What a reader must know beside the numbers, one sentence or two per line."""
    plan, result = comparison.plan, comparison.result
    lines = [
        f"look {result.looks} of {plan['looks']}, {plan['seeds_per_look']} seeds of each method per look; probability "
        f"of any false difference at most {plan['alpha']:g} over all pairs and looks"
    ]
    lines += [_advised(advice, plan) for advice in comparison.advice]
    if comparison.compute_gap is None:
        lines.append("compute: unknown for at least one run, so this is no comparison at equal compute")
    elif comparison.compute_gap > plan["tolerance"]:
        lines.append(
            f"compute differs by {comparison.compute_gap:.0%}, more than the {plan['tolerance']:.0%} that count as "
            "equal: a difference may be one of compute"
        )
    else:
        lines.append(f"compute: equal within {comparison.compute_gap:.1%}")
    if comparison.unused:
        each = ", ".join(f"{number} of {name}" for name, number in comparison.unused.items())
        lines.append(f"seeds that no look has seen (incomplete group, or decided before): {each}")
    if any(len(method.runs) < FEW_SEEDS for method in comparison.methods):
        lines.append(f"IQM intervals of fewer than {FEW_SEEDS} seeds are too narrow; rely on the test")
    return lines


# ------------------------------------------------------------------------------------------------------------- parts


def _method(name: str, runs: Sequence[RunScore], seed: int) -> MethodScores:
    scores = [run.score for run in runs]
    flops = [run.flops for run in runs if run.flops is not None]
    return MethodScores(
        name=name,
        runs=tuple(runs),
        mean=fmean(scores),
        deviation=stdev(scores) if len(scores) > 1 else None,
        iqm=interquartile_interval([list(run.scores.values()) for run in runs], seed=seed),
        flops=median(flops) if len(flops) == len(runs) else None,
        spent={
            amount: median(run.spent[amount] for run in runs)
            for amount in AMOUNTS
            if all(amount in run.spent for run in runs)
        },
    )


def _plan(config: CompareConfig, benchmarks: list[str]) -> dict[str, Any]:
    keys = ("measure", "report", "seeds_per_look", "looks", "alpha", "compute", "tolerance", "seed")
    return {"methods": list(config.methods), "benchmarks": benchmarks} | {key: getattr(config, key) for key in keys}


def _seeds_seen(result: SequentialResult, plan: SequentialPlan) -> dict[str, int]:
    """Seeds of each method that some look has used."""
    seen: dict[str, int] = {}
    for decision in result.decisions:
        if decision.outcome == "stopped":
            continue  # the pair that stopped it has a look
        used = (decision.look or result.looks) * plan.seeds_per_look
        for name in (decision.first, decision.second):
            seen[name] = max(seen.get(name, 0), used)
    return seen


def _advice(
    decision: Decision, scores: dict[str, list[float]], result: SequentialResult, plan: SequentialPlan
) -> SeedAdvice:
    wanted = (result.looks + 1) * plan.seeds_per_look
    first, second = scores[decision.first], scores[decision.second]
    in_all = None
    if len(first) + len(second) > 2:
        pairs = len(result.decisions)
        in_all = seeds_needed(first, second, alpha=plan.alpha, pairs=pairs, power=POWER)
    if in_all is not None:
        # Seeds count in whole groups, and those that were not enough are behind us.
        in_all = max(wanted, -(-in_all // plan.seeds_per_look) * plan.seeds_per_look)
    return SeedAdvice(
        first=decision.first,
        second=decision.second,
        next_look=(max(0, wanted - len(first)), max(0, wanted - len(second))),
        in_all=in_all,
        within_plan=in_all is not None and in_all <= plan.seeds,
    )


def in_words(decision: Decision) -> str:
    """What was decided of a pair, in a sentence."""
    if decision.difference is None:
        return f"{decision.first} and {decision.second}: undecided, the first look needs more seeds"
    points = f"{100 * decision.difference:+.1f} points"
    if decision.outcome in ("first", "second"):
        ahead = decision.outcome == "first"
        better, worse = (decision.first, decision.second) if ahead else (decision.second, decision.first)
        return f"{better} is better than {worse} by {abs(100 * decision.difference):.1f} points, look {decision.look}"
    pair = f"{decision.first} and {decision.second}"
    if decision.outcome == "stopped":
        return f"{pair}: not asked further, as one of them has lost to another ({points})"
    if decision.outcome == "not separated":
        return f"{pair} are not told apart by the whole plan ({points}); that is no proof that they are alike"
    return f"{pair}: undecided ({points})"


def _advised(advice: SeedAdvice, plan: dict[str, Any]) -> str:
    more = ", ".join(
        f"{number} of {name}"
        for name, number in zip((advice.first, advice.second), advice.next_look, strict=True)
        if number
    )
    text = f"{advice.first} and {advice.second}: the next look needs {more or 'no'} more seeds"
    if advice.in_all is None:
        return text + "; how many would decide cannot be said from these scores"
    text += f"; with the difference and spread seen so far, about {advice.in_all} of each in all would decide"
    if not advice.within_plan:
        text += f", which is beyond the plan's {plan['looks'] * plan['seeds_per_look']}"
    return text + f" ({POWER:.0%} power, a rough guide)"


def _spent_table(methods: Sequence[MethodScores]) -> Table:
    """What a median run spent: tokens by what was done with them, and seconds."""
    shown = [amount for amount in AMOUNTS if amount != "flops" and any(amount in method.spent for method in methods)]
    table = _table("median run", *(amount.removeprefix("tokens_").replace("_seconds", " s") for amount in shown))
    for method in methods:
        amounts = (f"{method.spent[amount]:.3g}" if amount in method.spent else "unknown" for amount in shown)
        table.add_row(method.name, *amounts)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def draw(comparison: SeedComparison, out: Path) -> Path:
    """Draw the measure of the first benchmark over the steps of all runs.

    Raises:
        DataError: the runs logged no such metric, for example because their reports were made afterwards.
    """
    from posttrain.tracking.plots import plot_comparison

    runs = [Path(run.run) for method in comparison.methods for run in method.runs]
    return plot_comparison(runs, f"eval/{comparison.plan['benchmarks'][0]}/{comparison.plan['measure']}", out)
