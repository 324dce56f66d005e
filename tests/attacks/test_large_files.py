"""Files of holes: 30 GiB that take no room on a disk, under the names of what a command reads as a whole."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.own_code import OwnCode, find
from posttrain.config.plugins import digest
from posttrain.errors import PosttrainError
from posttrain.tracking.events import read_events

HUGE = 30 * 2**30


def grow(path: Path) -> None:
    """Make a file 30 GiB long, which are zeros behind what stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, HUGE)


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Two GiB more than the process has: whoever reads such a file ends by an error, and the machine goes on."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 0.0, "loss": 1.0}) + "\n")
    (folder / "resolved.yaml").write_text("model: {path: m}\nmethod: {name: sft}\n")
    return folder


@pytest.mark.parametrize(
    "name",
    ["samples.jsonl", "metrics.jsonl", "environment.json", "data.json", "resolved.yaml", "evaluation/step-1.json"],
)
def test_a_run_folder_with_a_file_without_end_is_refused(run_folder: Path, name: str, tmp_path: Path) -> None:
    grow(run_folder / name)
    result = CliRunner().invoke(app, ["report", str(run_folder), "--output", str(tmp_path / "r.html")])
    assert isinstance(result.exception, PosttrainError), result.exception
    assert "larger than" in str(result.exception) and name in str(result.exception)


@pytest.mark.parametrize(
    "command",
    [["check"], ["convert"], ["study"], ["run"], ["train"], ["compare"], ["report"], ["eval", "m", "--config"]],
    ids=" ".join,
)
def test_a_file_of_settings_without_end_is_refused(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / ("file.json" if command == ["report"] else "file.yaml")
    grow(path)
    result = CliRunner().invoke(app, [*command, str(path)])
    assert isinstance(result.exception, PosttrainError), result.exception


def test_a_manifest_without_end_is_refused(tmp_path: Path) -> None:
    from posttrain.contract.recipes import write_traces

    traces = write_traces(tmp_path / "traces.jsonl")
    grow(tmp_path / "traces.manifest.json")
    result = CliRunner().invoke(app, ["inspect", str(traces)])
    assert isinstance(result.exception, PosttrainError) and "larger than 16 MiB" in str(result.exception)


def test_code_of_a_recipe_without_end_is_refused(tmp_path: Path) -> None:
    """It is read, and not run, by `check`, which says its hash."""
    file = tmp_path / "own.py"
    file.write_text("def f(): pass\n")
    assert digest(str(file)) and find(f"{file}:f").digest()
    grow(file)
    for read in (lambda: digest(str(file)), lambda: find(f"{file}:f"), OwnCode(str(file), "f", file).digest):
        with pytest.raises(PosttrainError, match="larger than 16 MiB"):
            read()


def test_a_short_file_of_very_many_values_is_refused_before_all_are_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("posttrain.config.yaml_file.MOST_VALUES", 1000)
    (tmp_path / "recipe.yaml").write_text("plugins: [" + "1," * (8 * 2**20 - 10) + "]")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert isinstance(result.exception, PosttrainError) and "more than 1,000 values" in str(result.exception)


def test_a_line_is_read_to_its_bound_and_an_unfinished_last_one_left_out(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "ti')
    assert [event["step"] for event in read_events(path)] == [1]
    shutil.rmtree(run_folder)
