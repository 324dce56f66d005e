"""`posttrain eval --rewards`: implicit and explicit rewards on the same pairs, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cli.tables import print_table
from posttrain.config.loading import load_config
from posttrain.config.rewards import RewardsConfig
from posttrain.terminal import say

if TYPE_CHECKING:
    from posttrain.evaluation.pair_accuracy import PairAccuracy
    from posttrain.evaluation.rewards import RewardReport, RewardSet

HEADER = (
    "score",
    "accuracy",
    "ties",
    "decided",
    "chosen longer",
    "chosen shorter",
    "balanced",
    "with length",
    "margin",
)


def rewards_command(config: Path, overrides: list[str], output: Path | None) -> None:
    """Compare the rewards of a file; print the tables, and write the report to `output` if there is one.

    Raises:
        RecipeError: a key that is unknown, missing or wrong.
        ModelError, DataError: as `evaluation.rewards.evaluate_rewards`.
    """
    settings = load_config(config, RewardsConfig, overrides)

    from posttrain.evaluation.rewards import evaluate_rewards

    report = evaluate_rewards(settings)
    print_rewards(report)
    if output is not None:
        report.save(output)
        say(f"\nreport: {output}")


def print_rewards(report: RewardReport) -> None:
    """A table per set of pairs, and what becomes of the accuracies out of distribution."""
    for one in report.sets:
        pairs = next(iter(one.scores.values())).found.pairs
        print_table(_rows(one), f"{one.name} (shift: {one.shift}): {pairs:,} pairs, {one.prompts:,} prompts", HEADER)
        rows = one.rows
        lost = f"{rows['identical']} identical, {rows['empty']} empty"
        say(f"  rows: {rows['total']}, {rows['kept']} kept, {rows['cut']} cut, {rows['dropped']} dropped ({lost})")
        if one.explicit_minus_implicit is not None and one.test is not None:
            difference = one.explicit_minus_implicit
            ends = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
            say(f"  explicit - implicit: {100 * difference.value:+.1f} points {ends}, p {one.test.p:.3g}")
    if report.out_of_distribution:
        cells = [(score, f"{100 * change:+.1f} points") for score, change in report.out_of_distribution.items()]
        print_table(cells, "mean accuracy out of distribution minus in distribution")


def _rows(one: RewardSet) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for score, accuracy in one.scores.items():
        found, control = accuracy.found, accuracy.by_length
        rows.append(
            (
                score,
                _interval(found),
                f"{found.ties}",
                _percent(found.decided),
                _interval(control.longer),
                _interval(control.shorter),
                _percent(control.balanced),
                "-" if control.correlation is None else f"{control.correlation:+.2f}",
                f"{accuracy.margin:+.4g}",
            )
        )
    return rows


def _interval(found: PairAccuracy | None) -> str:
    if found is None:
        return "-"
    ends = f"[{100 * found.accuracy.low:.1f}, {100 * found.accuracy.high:.1f}]"
    return f"{100 * found.accuracy.value:.1f} {ends}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
