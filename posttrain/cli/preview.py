"""`posttrain check RECIPE --batch`: the rows of the first batch, and one of each source in full."""

from __future__ import annotations

from pathlib import Path

from posttrain.cli.tables import print_table
from posttrain.config.loading import load_recipe
from posttrain.config.mixtures import parts
from posttrain.config.schema import Recipe
from posttrain.data.sources import problems
from posttrain.methods import CONFIGS
from posttrain.terminal import say
from posttrain.trainers.preview import BatchRow, first_batch
from posttrain.verifiers.audit import right_by_lenient_only

COLOURS = {"trained": "green", "prefix": "yellow"}
MOST_TEXT = 56


def print_first_batch(path: Path, overrides: list[str]) -> None:
    """Make the batch of the first optimizer step and print it.

    Raises:
        PosttrainError: as for training.
    """
    recipe = load_recipe(path, overrides, CONFIGS)
    rows = first_batch(recipe)
    say("\nfirst batch, one rank", bold=True)
    header = ("batch", "source", "role", "problem", "prefix", "trained/tokens", "reward", "advantage", "trained text")
    print_table([_cells(row) for row in rows], header=header)
    shown: set[tuple[str, str]] = set()
    for row in rows:
        if (row.source, row.role) not in shown and row.trained:
            shown.add((row.source, row.role))
            _print_row(row)
    _print_lenient(recipe, [row for row in rows if row.source == "policy" and row.verdict and not row.prefix])


def _print_lenient(recipe: Recipe, rows: list[BatchRow]) -> None:
    """How many sampled answers are right in a form that earns nothing, which no curve of rewards shows."""
    if not rows or recipe.verifier is None or recipe.data.prompts is None:
        return
    sources = parts(recipe.data.prompts, "prompts")
    shared = [(name, source) for name, source in sources if source.verifier is None]
    known = {problem.id: problem for name, source in shared for problem in problems(source, name)}
    written = [(known[row.problem], row.written) for row in rows if row.problem in known]
    count = right_by_lenient_only(recipe.verifier, recipe.verifier_pool, written)
    if count is not None:
        say(f"\nsampled: {count} of {len(written)} answers are right by the lenient profile only: no strict reward")


def _cells(row: BatchRow) -> tuple[str, ...]:
    reward = "" if row.verdict == "" else f"{'-' if row.reward is None else f'{row.reward:.4g}'} {row.verdict}"
    lengths = f"{row.trained}/{row.tokens}"
    return (str(row.micro_batch), row.source, row.role, row.problem, str(row.prefix or ""), lengths, reward) + (
        _advantage(row),
        _short("".join(text for text, label in row.pieces if label == "trained")),
    )


def _advantage(row: BatchRow) -> str:
    if isinstance(row.advantage, list):
        return f"{len(row.advantage)} per token"
    return "" if row.advantage is None else f"{row.advantage:+.4g}"


def _short(text: str) -> str:
    shown = repr(text)[1:-1]
    return shown if len(shown) <= MOST_TEXT else f"{shown[: MOST_TEXT - 3]}..."


def _print_row(row: BatchRow) -> None:
    name = f"{row.source} {row.role}".strip()
    say(f"\n{name}: {row.trained} of {row.tokens} tokens are trained on", bold=True)
    for text, label in row.pieces:
        say(f"  [{label}] ", fg=COLOURS.get(label), dim=label not in COLOURS, nl=False)
        say(repr(text))
