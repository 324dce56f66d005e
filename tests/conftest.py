"""Shared fixtures: a tiny model folder, recipes for every method on it, and the test-data folder where there is one."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  # there before `check` runs in this process: in a fresh one it keeps torch out for good
import yaml
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="posttrain-tests-")  # the secret that signs checkpoints

# Where bytecode is not kept, as in many containers, every process of the suite compiles the package anew, a second of
# CPU, and every worker rewrites the asserts of all tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As for a command that a script starts in the background; tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = ROOT / "tests" / "contracts"

# Accelerate reads that of PEFT a dozen times for every trainer, some milliseconds each.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

# No test fails because the machine is busy.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

gc.disable()  # until all is imported: to look through a million objects of modules again and again takes seconds


def pytest_collection_finish() -> None:
    """What is imported by now stays. Transformers collects garbage after every training, which takes 0.3 s with it."""
    keep_what_is_imported()
    gc.enable()


def keep_what_is_imported() -> None:
    """Look for garbage in it once, and never again."""
    gc.collect()
    gc.freeze()
    KEPT["modules"] = len(sys.modules)


KEPT = {"modules": 0}
"""How many modules there were then."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="CPU seconds of all tests, by file and the dearest ones")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    if item.config.getoption("--cpu"):
        item.stash[STARTED] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item):
    found = yield
    if len(sys.modules) > KEPT["modules"] + 100:
        keep_what_is_imported()
    if item.config.getoption("--cpu"):
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


def cpu_seconds(pid: int | None = None) -> float:
    """Of this process and all below it: that of processes from a server is waited for by nobody but the server."""
    fields = Path(f"/proc/{pid or 'self'}/stat").read_text().rpartition(")")[2].split()
    seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    for children in Path(f"/proc/{pid or 'self'}/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended, and is waited for
                seconds += cpu_seconds(int(child))
    return seconds


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


@pytest.fixture(scope="session")
def processes() -> Any:
    """A context of `multiprocessing` whose processes begin with everything imported; forked from a server that does so
    once in a session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["posttrain.trainers.run", "datasets", "trl.trainer.grpo_trainer"])
    return context


@pytest.fixture(scope="session")
def apart(processes: Any) -> Any:
    """`apart(command, output, **environment)` -> a process that runs it as Python would, see `contracts/apart.py`."""

    def start(command: Sequence[object], output: Path, **environment: str) -> Any:
        given = {"COMMAND": [str(word) for word in command], "OUTPUT": str(output), "ENVIRONMENT": environment}
        process = processes.Process(target=runpy.run_path, args=(str(CONTRACTS / "apart.py"), given))
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def killed_at(processes: Any) -> Any:
    """`killed_at(moment, recipe)`: trained until it kills itself, at a moment of `train_and_die.py` or at its own."""

    def train(moment: tuple[str, int] | None, recipe: Path) -> None:
        log = recipe.with_suffix(".log")
        given = {"RECIPE": str(recipe), "RESUME": None, "MOMENT": moment, "COUNTS": None, "OUTPUT": str(log)}
        process = processes.Process(target=runpy.run_path, args=(str(CONTRACTS / "train_and_die.py"), given))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, log.read_text()

    return train


@pytest.fixture(scope="session")
def two_ranks(apart: Any) -> Any:
    """`two_ranks(command, log)`: run by two processes that talk by gloo, with what torchrun tells its own."""

    def run(command: Sequence[object], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        logs = [log.with_suffix(f".{rank}.log") for rank in "01"]
        ranks = [
            apart(command, log, **group, LOCAL_WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank)
            for rank, log in zip("01", logs, strict=True)
        ]
        try:
            for rank in ranks:
                rank.join(600)
            assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(log.read_text() for log in logs)
        finally:
            for rank in ranks:
                rank.kill()

    return run


@pytest.fixture(scope="session")
def on_two_ranks(two_ranks: Any) -> Any:
    """`on_two_ranks(recipe)`: trained by two processes."""
    return lambda recipe: two_ranks(["-m", "posttrain", "train", recipe], recipe)


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
