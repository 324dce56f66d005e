from __future__ import annotations

import importlib.util
import io
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.pipeline import runner, stages

SCRIPT = Path(__file__).with_name("written_stage.py")


@pytest.fixture
def write_kind(monkeypatch: pytest.MonkeyPatch) -> type[stages.Stage]:
    """The `write` kind of stage, registered for one test."""
    spec = importlib.util.spec_from_file_location("written_stage", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where pydantic looks its annotations up
    spec.loader.exec_module(module)
    monkeypatch.setitem(stages.STAGES, "write", module.WriteStage)
    return module.WriteStage


@pytest.fixture
def pipeline_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the stages into a pipeline file, in a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = Path("pipeline.yaml")
        path.write_text("pipeline: test\noutput: out\nstages:\n" + textwrap.dedent(text).strip() + "\n")
        return path

    return write


@pytest.fixture
def run() -> Callable[..., str]:
    """Runs a pipeline and gives what it printed."""

    def run_and_read(path: Path, *overrides: str, **options) -> str:
        stream = io.StringIO()
        runner.run_pipeline(path, overrides, console=Console(file=stream, width=200), **options)
        return stream.getvalue()

    return run_and_read
