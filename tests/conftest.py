"""Shared fixtures: a tiny model folder, recipes for every method on it, and the test-data folder where there is one."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  # there before `check` runs in this process: in a fresh one it keeps torch out for good
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="posttrain-tests-")  # the secret that signs checkpoints

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As for a command that a script starts in the background; tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

gc.disable()  # until all is imported: to look through a million objects of modules again and again takes seconds


def pytest_collection_finish() -> None:
    """What is imported by now stays. Transformers collects garbage after every training, which takes 0.3 s with it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="CPU seconds of all tests, by file and the dearest ones")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    item.stash[STARTED] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item):
    found = yield
    item.user_properties.append(("cpu", cpu_seconds() - item.stash[STARTED]))
    return found


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--cpu"):
        return
    tests: dict[str, float] = {}
    for report in (each for reports in terminalreporter.stats.values() for each in reports):
        if getattr(report, "when", None) == "teardown":
            tests[report.nodeid] = dict(report.user_properties).get("cpu", 0.0)
    files: dict[str, float] = {}
    for name, seconds in tests.items():
        files[name.partition("::")[0]] = files.get(name.partition("::")[0], 0.0) + seconds
    terminalreporter.write_line(f"CPU seconds of {len(tests):,} tests: {sum(tests.values()):.0f}")
    for amounts, number in ((files, 40), (tests, 40)):
        for name, seconds in sorted(amounts.items(), key=lambda pair: -pair[1])[:number]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")


STARTED = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a character tokenizer."""
    from posttrain.contract.recipes import write_model

    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def small_causal() -> Any:
    """The module that builds a tiny model of any causal type."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("small_causal", ROOT / "tests" / "fixtures" / "small_causal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_recipe_data(
    tiny_model: Path, folder: Path, method: dict[str, Any], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A recipe as plain data that trains in a second or two; `changes` are by dotted key."""
    from posttrain.contract.recipes import tiny_recipe

    return tiny_recipe(method, folder, tiny_model, changes)


@pytest.fixture(scope="session")
def offline_inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trace file with right and wrong completions, and a value model."""
    from posttrain.contract.recipes import write_critic, write_traces

    folder = tmp_path_factory.mktemp("offline")
    return write_traces(folder / "traces.jsonl"), write_critic(folder / "critic", tiny_model)


@pytest.fixture(scope="session", name="make_recipe_data")
def make_recipe_data_fixture():
    return make_recipe_data


@pytest.fixture
def write_recipe(tiny_model: Path, tmp_path: Path):
    """`write_recipe(method, changes)` -> a recipe file; see `make_recipe_data`."""

    def make(method: dict[str, Any], changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(make_recipe_data(tiny_model, tmp_path, method, changes)), encoding="utf-8")
        return path

    return make


@pytest.fixture
def load(write_recipe):
    """`load(method, changes)` -> a validated `Recipe`."""

    def make(method: dict[str, Any], changes: dict[str, Any] | None = None):
        from posttrain.config.loading import load_recipe
        from posttrain.methods import METHODS

        configs = {name: cls.Config for name, cls in METHODS.items()}
        return load_recipe(write_recipe(method, changes), [], configs)

    return make


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real benchmark files; skips where it is absent."""
    folder = Path(os.environ.get("POSTTRAIN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no folder of real data: set POSTTRAIN_TEST_DATA")
    return folder
