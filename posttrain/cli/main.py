"""The command line. Each command delegates to one function, and only its body imports heavy packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import PosttrainError

app = typer.Typer(
    name="posttrain",
    help="Post-training of language models from one YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="dotted overrides: training.max_steps=50")
]


def main() -> None:
    """Entry point: user errors go to stderr without a traceback and exit with 2, an interrupt exits with 130."""
    try:
        app()
    except PosttrainError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same mistake; say it once
            typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
            typer.echo(str(error), err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="go on from the newest checkpoint, or from this one")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, write resolved.yaml, and stop")] = False,
) -> None:
    """Train by a recipe. Works alone and under `accelerate launch`."""
    from posttrain.cli.train import dry_run as run_dry
    from posttrain.cli.train import run

    if dry_run:
        run_dry(recipe, overrides or [], world_size=int(os.environ.get("WORLD_SIZE", "1")))
    else:
        sys.exit(run(recipe, overrides or [], resume))


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="YAML pipeline", show_default=False)],
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="last stage to run")] = None,
    force: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="run this stage again; may be given several times")
    ] = None,
) -> None:
    """Run the stages of a pipeline; finished stages are kept."""
    from posttrain.pipeline.runner import run_pipeline

    run_pipeline(pipeline, overrides or [], until=until, force=force or [])


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    online: Annotated[bool, typer.Option("--online", help="fetch data and tokenizer that are not here yet")] = False,
    world_size: Annotated[int, typer.Option(min=1, help="ranks to plan the batch for")] = 1,
) -> None:
    """Check a recipe: keys, needs, batch table, one rendered sample, memory estimate. Loads no weights."""
    from posttrain.cli.check import check_recipe

    check_recipe(recipe, overrides or [], online=online, world_size=world_size)


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="folder or Hub id; not with --list", show_default=False)
    ] = None,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the keys of a recipe's `evaluation` section")
    ] = None,
    benchmarks: Annotated[str | None, typer.Option(help="names, separated by commas")] = None,
    samples: Annotated[int | None, typer.Option(help="sampled completions per problem")] = None,
    k: Annotated[str | None, typer.Option(help="pass@k to report, separated by commas")] = None,
    limit: Annotated[int | None, typer.Option(help="first N problems of each benchmark")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="tokens per completion")] = None,
    dtype: Annotated[str, typer.Option(help="type of the weights: float32, bfloat16, float16")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Hub commit, tag or branch of the model")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the report")] = None,
    list_benchmarks: Annotated[bool, typer.Option("--list", help="list the benchmarks and stop")] = False,
) -> None:
    """Evaluate a model: accuracy, pass@k with intervals, truncation."""
    from posttrain.cli import evaluate as command

    if list_benchmarks:
        command.print_benchmarks()
        return
    options = {"samples": samples, "limit": limit, "max_new_tokens": max_new_tokens}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    lists = {"benchmarks": benchmarks, "k": k}
    given += [f"{name}=[{value}]" for name, value in lists.items() if value is not None]
    command.evaluate_command(model, config, [*given, *(overrides or [])], dtype, revision, output)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="show the parameters of this method")] = None,
) -> None:
    """List the methods, or the parameters of one."""
    from posttrain.cli.tables import print_method, print_methods

    if name is None:
        print_methods()
    else:
        print_method(name)


@app.command()
def env() -> None:
    """Show the supported stack and what is installed; exits with 1 if something is out of range."""
    from posttrain.cli.tables import print_stack

    sys.exit(0 if print_stack() else 1)
