"""`posttrain sample`: settings to a trace file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.config.collection import SampleConfig
from posttrain.config.loading import parse_config
from posttrain.config.yaml_file import read_file
from posttrain.errors import RecipeError
from posttrain.imports import importing
from posttrain.phases import phase
from posttrain.terminal import say


def sample_config(
    target: str, config: Path | None, overrides: list[str], output: Path | None, options: dict[str, Any] | None = None
) -> SampleConfig:
    """The settings: of the file `target`, or of `config` with `target` as the model.

    Args:
        target, config: as on the command line.
        overrides: dotted keys with values.
        output: the trace file, where it is given as an option.
        options: dotted key -> what an option of the command says of it; None where it is not given.

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
    named = {"output": output, **(options or {})}
    given += [f"{key}={value}" for key, value in named.items() if value is not None]
    return parse_config(data, SampleConfig, [*given, *overrides], locations)


def sample_command(
    target: str,
    config: Path | None,
    overrides: list[str],
    output: Path | None,
    parquet: bool,
    options: dict[str, Any] | None = None,
) -> None:
    """Sample, say what is being done, and name the next commands.

    Raises:
        PosttrainError: as `sample_config` and `rollouts.collect.collect`.
    """
    settings = sample_config(target, config, overrides, output, options)

    phase("importing PyTorch and transformers")
    with importing():
        from posttrain.data.traces import read_traces, write_parquet
        from posttrain.rollouts.collect import collect

    path = Path(settings.output)
    done = collect(settings, path, say=say)
    say(f"{path}: {done.summary()}")
    if parquet:
        write_parquet(path.with_suffix(".parquet"), read_traces([path]).traces)
        say(f"{path.with_suffix('.parquet')}: the same as Parquet")
    say(f"next: posttrain inspect {path}; posttrain prepare pairs {path} --out pairs.jsonl")
