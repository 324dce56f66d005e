"""Texts as strips of coloured tokens, as PNG: warm where a token's value is positive, cold where it is negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from posttrain.errors import DataError
from posttrain.safe_files import file_atomic
from posttrain.tracking.plots import GREY

COLUMNS = 96
"""Characters per line at most."""
LEAST_COLUMNS = 48
COLOURS = "RdBu_r"
SHOWN = {"\n": "⏎", "\t": "⇥", " ": "·"}


@dataclass(frozen=True, slots=True)
class Strip:
    """The tokens of one text, coloured by a value each.

    Attributes:
        title: above the tokens.
        pieces: texts of the tokens.
        values: one per token.
    """

    title: str
    pieces: Sequence[str]
    values: Sequence[float]


def draw_strips(strips: Sequence[Strip], label: str, out: Path, *, most_lines: int = 120) -> Path:
    """Draw the strips below each other with one colour scale, symmetric around 0.

    Args:
        strips: at least one.
        label: of the scale.
        out: PNG file.
        most_lines: of the picture.

    Raises:
        DataError: there is nothing to draw, or more than fits.
    """
    if not strips:
        raise DataError("there are no tokens to draw")
    laid = [_lines(strip.pieces) for strip in strips]
    total = sum(1.4 + len(lines) for lines in laid)
    if total > most_lines:
        raise DataError(
            f"{len(strips)} texts take {total:.0f} lines, and a picture has {most_lines}",
            hint="choose fewer: --limit N",
        )
    largest = max((abs(value) for strip in strips for value in strip.values), default=0.0) or 1.0
    norm, colours = TwoSlopeNorm(0.0, -largest, largest), colormaps[COLOURS]
    widest = max(column + len(text) for lines in laid for line in lines for _, text, column in line)
    columns = max(widest, LEAST_COLUMNS)
    figure = Figure(figsize=(0.115 * columns + 0.4, 0.26 * total + 0.9), dpi=130, layout="constrained")
    ax = figure.subplots()
    ax.set_xlim(0, columns)
    ax.set_ylim(total, 0)
    ax.axis("off")
    top = 0.0
    for strip, lines in zip(strips, laid, strict=True):
        ax.text(0, top + 0.95, strip.title, fontsize=8, color=GREY, va="bottom")
        for number, line in enumerate(lines):
            _draw_line(ax, line, strip.values, top + 1.1 + number, lambda value: colours(norm(value)))
        top += 1.4 + len(lines)
    bar = figure.colorbar(
        ScalarMappable(norm, COLOURS), ax=ax, orientation="horizontal", shrink=0.6, aspect=40, pad=0.02
    )
    bar.set_label(label, fontsize=8, color=GREY)
    bar.ax.tick_params(labelsize=7, colors=GREY)
    with file_atomic(out) as beside:
        figure.savefig(beside, format="png")
    return out


Cell = tuple[int, str, int]
"""(number of the token, its text as shown, column where it begins)"""


def _lines(pieces: Sequence[str]) -> list[list[Cell]]:
    """The tokens on lines of at most `COLUMNS` characters; a token stands on one line, cut where it is longer."""
    lines: list[list[Cell]] = [[]]
    column = 0
    for number, piece in enumerate(pieces):
        text = "".join(SHOWN.get(character, character) for character in piece)[:COLUMNS] or "…"
        if column + len(text) > COLUMNS:
            lines.append([])
            column = 0
        lines[-1].append((number, text, column))
        column += len(text)
    return lines


def _draw_line(ax: Axes, line: Sequence[Cell], values: Sequence[float], top: float, colour: Any) -> None:
    for number, text, column in line:
        face = colour(values[number])
        ax.add_patch(Rectangle((column, top), len(text), 0.9, facecolor=face, edgecolor="white", linewidth=0.5))
        dark = 0.299 * face[0] + 0.587 * face[1] + 0.114 * face[2] < 0.5
        for place, character in enumerate(text):
            ax.text(
                column + place + 0.5,
                top + 0.45,
                character,
                fontsize=8,
                family="monospace",
                ha="center",
                va="center",
                color="white" if dark else "#222222",
                parse_math=False,
            )
