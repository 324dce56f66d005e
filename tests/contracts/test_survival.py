"""A run that is killed with SIGKILL and resumed ends as one that was left alone: bit for bit.

Killed processes are real ones, forked from a server that has imported everything once.
"""

import itertools
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from posttrain.contract.shell import CLOCK
from posttrain.safe_files import write_text_atomic
from posttrain.state.checkpoint import complete_checkpoints, read_state

HERE = Path(__file__).parent
METHODS_RUN = runpy.run_path(str(HERE / "test_shell_contract.py"))["METHODS_RUN"]
CASES = [row for rows in METHODS_RUN.values() for row in rows]

STEPS = 8
CHANGES = {"training.max_steps": STEPS, "training.save_steps": 2, "training.save_total_limit": 2}
ROOT = Path(__file__).resolve().parents[2]
TWO_RANKS = {"batch.micro_batch": 4}
ON_TWO_RANKS = ("dpo", "grpo", "chord", "prefixrl", "oreo", "sft")
"""Methods whose runs on two ranks are killed; what others save is saved by the same code."""
SIGKILLED = -signal.SIGKILL
HARD = {"name": "grpo", "beta": 0.1, "updates_per_rollout": 2, "aggregation": "tokens"}


def name_of(method):
    return "-".join(str(v) for v in method.values())


@pytest.fixture(scope="module")
def start(processes):
    """`start(recipe, resume, moment)` -> a process that trains; dies by itself at the moment if one is given."""

    def start(recipe, resume=None, moment=None, counts=None):
        given = {"RECIPE": str(recipe), "RESUME": resume, "MOMENT": moment, "COUNTS": counts and str(counts)}
        given["OUTPUT"] = str(recipe.with_suffix(".log"))
        process = processes.Process(target=runpy.run_path, args=(str(HERE / "train_and_die.py"), given))
        process.start()
        return process

    return start


def end(process, recipe, code=0):
    process.join(300)
    assert process.exitcode == code, recipe.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def make_recipe(tiny_model, make_recipe_data):
    def make(folder, method, changes=None):
        folder.mkdir(exist_ok=True)
        data = make_recipe_data(tiny_model, folder, method, CHANGES | (changes or {}))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
        return folder / "recipe.yaml"

    return make


@pytest.fixture(scope="module")
def untouched(start, make_recipe, tmp_path_factory):
    """`untouched(method)` -> run folder of an uninterrupted run, and how often each event happened in it."""
    known = {}

    def run(method, changes=None):
        name = name_of(method)
        if name not in known:
            folder = tmp_path_factory.mktemp("untouched")
            recipe, began = make_recipe(folder, method, changes), time.monotonic()
            end(start(recipe, counts=folder / "counts.json"), recipe)
            seconds = time.monotonic() - began
            known[name] = folder / "run", json.loads((folder / "counts.json").read_text()), seconds
        return known[name]

    return run


def lines(path, without=()):
    if not path.exists():
        return []
    return [{k: v for k, v in json.loads(x).items() if k not in without} for x in path.read_text().splitlines()]


def assert_equal(one, other, where=""):
    """Same nested values; tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}.{number}")
    else:
        assert repr(one) == repr(other), where


def _rng_types():
    import numpy as np
    from numpy._core.multiarray import _reconstruct

    return [_reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


RNG_TYPES = _rng_types()


def assert_same_run(one, other):
    """Trained model, log files, and everything in the last checkpoint."""
    assert_equal(load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors"))
    assert lines(one / "metrics.jsonl", CLOCK) == lines(other / "metrics.jsonl", CLOCK)
    for name in ("samples.jsonl", "tokens.jsonl"):
        assert lines(one / name) == lines(other / name)
    ours, theirs = (complete_checkpoints(run / "checkpoints") for run in (one, other))
    assert [path.name for path in ours] == [path.name for path in theirs] == ["checkpoint-6", f"checkpoint-{STEPS}"]
    for file in sorted(path.name for path in ours[-1].iterdir() if path.suffix in (".pt", ".pth")):
        saved = []
        for path in (ours[-1], theirs[-1]):
            with torch.serialization.safe_globals(RNG_TYPES):
                saved.append(torch.load(path / file, weights_only=True))
        assert_equal(*saved, file)
    states = [read_state(path[-1]) for path in (ours, theirs)]
    for state in states:
        del state["ledger"]["wall_seconds"], state["files"]["trainer_state.json"]
        logged = [since["tokens"] for since in state["since_log"]]
        for amounts in (state["ledger"]["totals"], state["ledger"]["pending"], *logged):
            amounts.pop("cpu_seconds", None)
        state["made_by"] = state["made_by"]["content"]  # the rest names folders
    assert_equal(*states)
    assert not [path for path in other.rglob("*") if path.name in (".saving", "set-aside") and list(path.iterdir())]


def kill_and_resume(start, recipe, moment):
    end(start(recipe, moment=moment), recipe, SIGKILLED)
    end(start(recipe, resume="auto"), recipe)


def test_killed_and_resumed_equals_uninterrupted(start, untouched, make_recipe, tmp_path):
    """While sampling; with a checkpoint file half-written; with a log line half-written."""
    whole, counts, _ = untouched(HARD)
    for event in ("token", "write", "metrics line"):
        moment = (event, random.Random(event).randint(counts[event] // 2, counts[event]))
        kill_and_resume(start, make_recipe(tmp_path / event, HARD), moment)
        assert_same_run(whole, tmp_path / event / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("method", CASES, ids=name_of)
def test_every_method_killed_at_random_events(method, number, start, untouched, make_recipe, tmp_path):
    """Events weigh the same whatever their number; the resumed run is killed as well, then resumed once more."""
    whole, counts, _ = untouched(method)
    chance = random.Random(f"{name_of(method)} {number}")
    recipe, resume = make_recipe(tmp_path, method), None
    for _ in range(2):
        event = chance.choice(sorted(counts))
        process = start(recipe, resume=resume, moment=(event, chance.randint(1, counts[event])))
        process.join(300)
        assert process.exitcode in (SIGKILLED, 0)  # a resumed run may see fewer events than that
        resume = "auto"
    end(start(recipe, resume="auto"), recipe)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_soak_killed_at_20_moments_by_the_clock(seed, start, untouched, make_recipe, tmp_path):
    """Each process is killed after a random time, wherever it is, until 20 have been; then one may finish."""
    whole, _, seconds = untouched(HARD)
    chance, recipe = random.Random(seed), make_recipe(tmp_path, HARD)
    killed = 0
    while killed < 20:
        process = start(recipe, resume="auto")
        process.join(chance.uniform(0.2, 1.2) * seconds)
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        assert process.exitcode in (SIGKILLED, 0), recipe.with_suffix(".log").read_text()
    end(start(recipe, resume="auto"), recipe)
    assert_same_run(whole, tmp_path / "run")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(recipe, *arguments):
    """A training on two ranks, under a launcher in its own process group."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    with recipe.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, "-m", "posttrain", "train", str(recipe), *arguments], stdout=log, stderr=subprocess.STDOUT
        )


def ranks_of(launcher):
    """Process ids of the ranks: the launcher's children that train."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"posttrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_lines(path, number, launcher):
    deadline = time.monotonic() + 300
    while len(lines_so_far(path)) < number:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def lines_so_far(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("method", [HARD, *(row for row in CASES if row["name"] in ON_TWO_RANKS)], ids=name_of)
def test_two_ranks_of_which_one_is_killed(method, make_recipe, tmp_path):
    """The other rank ends by itself and says why; resumed on two ranks, the run ends as one that was left alone."""
    whole, broken = (make_recipe(tmp_path / name, method, TWO_RANKS) for name in ("whole", "broken"))
    launcher = launch(whole)
    assert launcher.wait(600) == 0, whole.with_suffix(".log").read_text()

    launcher = launch(broken)
    wait_for_lines(broken.parent / "run" / "metrics.jsonl", 5, launcher)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    assert launcher.wait(60) != 0
    log = broken.with_suffix(".log").read_text()
    assert "another rank has ended" in log and "--resume auto" in log, log
    launcher = launch(broken, "--resume", "auto")
    assert launcher.wait(600) == 0, broken.with_suffix(".log").read_text()
    assert_same_run(whole.parent / "run", broken.parent / "run")


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is not installed")
def test_a_clock_that_jumps_changes_nothing(untouched, make_recipe, tmp_path):
    """A day back, a year ahead, again and again, in the trainer's process and its verifier workers'."""
    changes = {"verifier_pool": {"workers": 1, "timeout": 20}}
    whole, _, _ = untouched(HARD)
    recipe, clock, began = make_recipe(tmp_path / "jumps", HARD, changes), tmp_path / "clock", time.monotonic()
    clock.write_text("+0")
    faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    with recipe.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "posttrain", "train", str(recipe)],
            env=os.environ | faked | {"FAKETIME_DONT_FAKE_MONOTONIC": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    for jump in itertools.cycle(("-1d", "+365d", "+0", "-400d")):
        if process.poll() is not None:
            break
        write_text_atomic(clock, jump)
        time.sleep(0.1)
    assert process.returncode == 0, recipe.with_suffix(".log").read_text()
    run, elapsed = recipe.parent / "run", time.monotonic() - began
    rows = [row for row in lines(run / "metrics.jsonl") if "step_seconds" in row]
    stamps = [row["time"] for row in rows]
    assert max(stamps) - min(stamps) > 86_400  # it did jump
    assert all(0 <= row["step_seconds"] <= elapsed for row in rows) and rows[-1]["wall_seconds"] <= elapsed
    assert_equal(load_file(whole / "model" / "model.safetensors"), load_file(run / "model" / "model.safetensors"))
    assert lines(whole / "metrics.jsonl", CLOCK) == lines(run / "metrics.jsonl", CLOCK)


def processes_below(process):
    """Process ids of what a process has started, and what that has."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [pid for child in map(int, children) for pid in (child, *processes_below(child))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_stops_two_ranks_at_a_checkpoint(number, make_recipe, tmp_path):
    """The signal to every process of a task at once, as srun sends it; launched as the Slurm scripts do."""
    recipe = make_recipe(tmp_path / "run", {"name": "sft"}, TWO_RANKS | {"training.max_steps": 100_000})
    command = [
        ROOT / "launch" / "slurm" / "launch_node.sh",
        "--config_file",
        ROOT / "launch" / "accelerate" / "cpu.yaml",
    ]
    with recipe.with_suffix(".log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, "--main_process_port", str(free_port()), "-m", "posttrain", "train", recipe],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
    run = recipe.parent / "run"
    wait_for_lines(run / "metrics.jsonl", 5, launcher)
    everything = [launcher.pid, *processes_below(launcher.pid)]
    assert len(everything) >= 4  # the script, the launcher, its ranks
    for pid in everything:
        os.kill(pid, number)
    assert launcher.wait(600) == 1
    assert not [pid for pid in everything if Path(f"/proc/{pid}").exists()]
    newest = complete_checkpoints(run / "checkpoints")[-1]
    assert int(newest.name.split("-")[1]) == json.loads(lines_so_far(run / "metrics.jsonl")[-1])["step"]
    assert "stopped after step" in recipe.with_suffix(".log").read_text()
