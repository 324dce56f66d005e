"""Tables that commands print: plain aligned text, the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from posttrain.config.known import in_words, limits
from posttrain.config.memory import MemoryEstimate, gibibytes
from posttrain.config.needs import Needs
from posttrain.config.stack import stack
from posttrain.errors import RecipeError, nearest
from posttrain.terminal import say

if TYPE_CHECKING:
    from posttrain.methods.base import Method


def print_table(rows: Sequence[Sequence[str]], title: str = "", header: Sequence[str] = ()) -> None:
    """Print rows of cells with aligned columns; the last column is not padded."""
    lines = [header, *rows] if header else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    if title:
        say(f"\n{title}", bold=True)
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        say(f"  {text}", bold=bool(header) and number == 0)


def print_memory(estimate: MemoryEstimate) -> None:
    """Print a memory estimate with its formulas."""
    say("\nmemory", bold=True)
    if estimate.parameters is not None:
        rows = [("parameters", f"{estimate.parameters:,}", f"{estimate.trainable:,} trained")]
        for group, terms in (("", estimate.fixed), ("step: ", estimate.training), ("sampling: ", estimate.sampling)):
            rows += [(group + name, gibibytes(size), formula) for name, size, formula in terms]
        if estimate.peak is not None:
            rows.append(("peak", gibibytes(estimate.peak), "what stays + the larger of step and sampling"))
        print_table(rows)
    for note in estimate.notes:
        say(f"  note: {note}")


def print_methods() -> None:
    """The method table."""
    from posttrain.methods import METHODS

    rows = [(name, method.shell, _default_needs(method), method.paper) for name, method in METHODS.items()]
    print_table(rows, header=("method", "shell", "needs", "paper"))


def print_method(name: str) -> None:
    """The parameters of one method.

    Raises:
        RecipeError: no such method; names the nearest.
    """
    from posttrain.methods import METHODS

    if name not in METHODS:
        raise RecipeError(f"no method {name!r}", hint=nearest(name, METHODS))
    method = METHODS[name]
    say(f"{name}: {method.paper}\nshell: {method.shell}; needs: {_default_needs(method)}")
    rows = [row for row in parameter_rows(method.Config) if row[0] != "name"]
    if rows:
        print_table(rows, header=("parameter", "default", "type", "meaning"))
    else:
        say("no parameters")


def parameter_rows(config: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(name, default, type and range, description) of every field."""
    rows = []
    for name, info in config.model_fields.items():
        default = info.get_default(call_default_factory=True, validated_data={})
        limit = limits(info)
        kind = in_words(info.annotation) + (f" ({limit})" if limit else "")
        rows.append((name, _default(default), kind, info.description or ""))
    return rows


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, BaseModel):
        return "-"
    if isinstance(value, str) and not (value.strip() and value.isprintable()):
        return repr(value)  # a line break would tear the table
    return str(value).lower() if isinstance(value, bool) else str(value)


def needs_in_words(needs: Needs) -> str:
    """`data.prompts, rollouts, verifier`."""
    parts = [f"data.{name}" for name in needs.data]
    further = {"rollouts": needs.generates, "verifier": needs.verifier, "reference": needs.reference}
    parts += [name for name, needed in further.items() if needed]
    return ", ".join(parts)


def _default_needs(method: type[Method]) -> str:
    """Needs under the default parameters; a dash where the method has no complete defaults."""
    if any(info.is_required() for info in method.Config.model_fields.values()):
        return "-"
    default: Any = method.Config
    return needs_in_words(method(default()).needs)


def print_stack() -> bool:
    """Print what is supported and installed; returns whether everything that is installed or required is in range."""
    packages = stack()
    words = {True: "ok", False: "OUT OF RANGE", None: "not installed"}
    rows = []
    for package in packages:
        verdict = "MISSING" if package.ok is False and package.installed is None else words[package.ok]
        rows.append((package.name, package.installed or "-", package.tested or "any", package.extra or "", verdict))
    print_table(rows, header=("package", "installed", "tested range", "extra", "state"))
    return all(package.ok is not False for package in packages)
