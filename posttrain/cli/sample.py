"""`posttrain sample`: settings to a trace file."""

from __future__ import annotations

from pathlib import Path

import typer

from posttrain.config.collection import SampleConfig
from posttrain.config.loading import parse_config
from posttrain.config.yaml_file import read_file
from posttrain.errors import RecipeError


def sample_config(target: str, config: Path | None, overrides: list[str], output: Path | None) -> SampleConfig:
    """The settings: of the file `target`, or of `config` with `target` as the model.

    Raises:
        RecipeError: `target` is neither, or as `load_config`.
    """
    is_file = target.endswith((".yaml", ".yml"))
    if is_file and config is not None:
        raise RecipeError("two files of settings", where=target, hint="posttrain sample MODEL --config FILE")
    if not is_file and config is None:
        raise RecipeError(
            f"no settings for {target!r}",
            hint="posttrain sample MODEL --config FILE, or posttrain sample FILE.yaml with a `model` section",
        )
    data, locations = read_file(target if is_file else str(config))
    given = [] if is_file else [f"model.path={target}"]
    given += [] if output is None else [f"output={output}"]
    return parse_config(data, SampleConfig, [*given, *overrides], locations)


def sample_command(target: str, config: Path | None, overrides: list[str], output: Path | None, parquet: bool) -> None:
    """Sample, say what is being done, and name the next commands.

    Raises:
        PosttrainError: as `sample_config` and `rollouts.collect.collect`.
    """
    settings = sample_config(target, config, overrides, output)

    from posttrain.data.traces import read_traces, write_parquet
    from posttrain.rollouts.collect import collect

    path = Path(settings.output)
    done = collect(settings, path, say=typer.echo)
    typer.echo(f"{path}: {done.summary()}")
    if parquet:
        write_parquet(path.with_suffix(".parquet"), read_traces([path]).traces)
        typer.echo(f"{path.with_suffix('.parquet')}: the same as Parquet")
    typer.echo(f"next: posttrain inspect {path}; posttrain prepare pairs {path} --out pairs.jsonl")
