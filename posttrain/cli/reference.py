"""The pages that are made, not written: `python -m posttrain.cli.reference` in the project's folder.

Keys of recipes and of the other files, parameters of methods, and commands, each from what the program itself reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from posttrain.cli.keys import HEADER, KeySection, sections
from posttrain.cli.tables import parameter_rows
from posttrain.config.audit import AuditConfig
from posttrain.config.collection import SampleConfig, StepLabelConfig, TakeInConfig, TakeInEpisodesConfig
from posttrain.config.comparison import CompareConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.schema import BenchmarkFile
from posttrain.config.workers import EvaluationRun
from posttrain.methods import METHODS
from posttrain.study.schema import StudyConfig
from posttrain.terminal import say

MADE = "<!-- Made by `python -m posttrain.cli.reference`; edit {source} instead. -->"

FILES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("posttrain sample SETTINGS", SampleConfig),
    ("posttrain eval MODEL --config FILE", EvaluationRun),
    ("posttrain eval MODEL --benchmarks FILE", BenchmarkFile),
    ("posttrain eval --rewards FILE", RewardsConfig),
    ("posttrain study FILE", StudyConfig),
    ("posttrain compare FILE", CompareConfig),
    ("posttrain verify --config FILE", AuditConfig),
    ("posttrain prepare traces FILE", TakeInConfig),
    ("posttrain prepare episodes FILE", TakeInEpisodesConfig),
    ("posttrain prepare steps FILE", StepLabelConfig),
)
"""Command -> schema of the file that it reads."""


def recipe_page() -> str:
    """The page `docs/recipe.md`: a table per section."""
    lines = [
        "# Keys of a recipe",
        "",
        MADE.format(source="the schema"),
        "",
        "All keys, by section; `posttrain keys SECTION` prints the same. A dash in the column of defaults stands for",
        "nothing, or for a default that depends on other keys. Any key can be set on the command line:",
        "`posttrain train recipe.yaml seed=1`. The keys of `method` are [parameters of methods](parameters.md).",
        "Pipelines, sampling and other files have [keys of their own](files.md).",
    ]
    for section in sections():
        lines += _section(section.title, section)
    return "\n".join(lines) + "\n"


def parameters_page() -> str:
    """The page `docs/parameters.md`: what each method's section may hold."""
    lines = [
        "# Parameters of methods",
        "",
        MADE.format(source="the method's file"),
        "",
        "What may stand in `method:` of a recipe beside `name`, method by method. `posttrain methods NAME` prints the",
        "same. The link under each name leads to the method's own page. A section that several methods take stands",
        "under the first of them.",
    ]
    known = {section.config for section in sections()}
    for name, method in METHODS.items():
        rows = [row for row in parameter_rows(method.Config) if row[0] != "name"]
        lines += ["", f"## {name}", "", f"[{method.paper}](methods/{name}.md)", ""]
        lines += _table(("parameter", *HEADER[1:]), rows) if rows else ["No parameters."]
        for section in sections(method.Config)[1:]:
            if section.config not in known:
                known.add(section.config)
                lines += _section(section.title, section, level=3)
    return "\n".join(lines) + "\n"


def files_page() -> str:
    """The page `docs/files.md`: keys of what is no recipe, but for sections that recipes have too."""
    from posttrain.pipeline.schema import pipeline_schema
    from posttrain.pipeline.stages import STAGES

    known = {section.config for section in sections()}
    lines = [
        "# Keys of the other files",
        "",
        MADE.format(source="the schema"),
        "",
        "Files that commands other than `posttrain train` read. Sections that a recipe has too are on",
        "[its page](recipe.md). A dash is a default that depends on other keys, or nothing.",
    ]
    for command, schema in (("posttrain run PIPELINE", pipeline_schema(STAGES)), *FILES):
        first, *inner = sections(schema)
        lines += _section(f"`{command}`", first, level=2)
        for section in inner:
            if section.config not in known:
                lines += _section(section.title, section, level=3)
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """The page `docs/commands.md`: every command with its options."""
    from posttrain.cli.main import app

    lines = [
        "# Commands",
        "",
        MADE.format(source="`posttrain/cli/main.py`"),
        "",
        "`posttrain COMMAND --help` prints the same. `posttrain --plugin FILE COMMAND` loads code of yours first, and",
        "`posttrain --version` shows the version. A mistake of the user's ends with status 2 and one message;",
        "[other statuses](resume.md#exit-codes).",
    ]
    for name, command in _commands(typer.main.get_command(app), "posttrain"):
        lines += ["", f"## {name}", "", *(line.strip() for line in (command.help or "").strip().splitlines()), ""]
        rows = [row for parameter in command.params if (row := _parameter(parameter)) is not None]
        lines += _table(("argument or option", "meaning"), rows) if rows else ["No options."]
    return "\n".join(lines) + "\n"


def _commands(group: Any, name: str) -> Iterable[tuple[str, Any]]:
    for inner, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {inner}")
        else:
            yield f"{name} {inner}", command


def _parameter(parameter: Any) -> tuple[str, str] | None:
    if "--help" in parameter.opts:
        return None
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`", parameter.help or ""
    return f"`{', '.join(parameter.opts)}`", parameter.help or ""


def _section(title: str, section: KeySection, level: int = 2) -> list[str]:
    lines = ["", f"{'#' * level} {title}", ""]
    return lines + ([section.meaning, ""] if section.meaning else []) + _table(HEADER, section.rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; the first cell of a row of four is a key, and the second its default."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = list(row)
        if len(cells) == len(HEADER):
            cells[:2] = f"`{cells[0]}`", f"`{cells[1]}`" if cells[1] != "-" else "-"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


PAGES: dict[str, Callable[[], str]] = {
    "recipe": recipe_page,
    "parameters": parameters_page,
    "files": files_page,
    "commands": commands_page,
}
"""Name of a page in `docs/` -> what makes it."""


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, make in PAGES.items():
        path = Path("docs") / f"{name}.md"
        path.write_text(make(), encoding="utf-8")
        say(f"wrote {path}")
