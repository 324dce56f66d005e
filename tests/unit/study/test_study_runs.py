"""A study that is killed with SIGKILL ends with the table of one that was left alone, bit for bit, on Ray too.

The study and its cells are real processes, forked from a server that has imported everything once; on Ray the command.
"""

import importlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from posttrain.study import running
from posttrain.study.schema import load_study
from posttrain.study.study import run_study

CHAIN = {"task": "chain_sum", "levels": [2], "size": 24}
VERIFIER = [{"type": "procedural", "profile": "strict"}]
RUN = {
    "tracking": {"console": "plain", "plots": False},
    "output": "unused",
    "threads": 1,
    "verifier_pool": {"workers": 0},
}
SECONDS = ("cpu_seconds", "gpu_seconds", "seconds")


def training(steps=3):
    return {"learning_rate": 1e-2, "max_steps": steps, "save_steps": 1, "save_total_limit": 1}


def write(path, values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def write_study(folder, model, seeds, *, leave_out=()):
    """Four arms, and one whose sixth row has no completion, which no check has read; less those that are left out."""
    folder.mkdir()
    sft = RUN | {"model": {"path": str(model)}, "data": {"completions": CHAIN}, "method": {"name": "sft"}}
    sft = {key: value for key, value in sft.items() if key != "verifier_pool"}
    write(folder / "sft.yaml", sft | {"batch": {"rows_per_step": 4, "micro_batch": 4}, "training": training()})
    grpo = RUN | {"model": {"path": str(model)}, "data": {"prompts": CHAIN}, "verifier": VERIFIER}
    grpo |= {"method": {"name": "grpo"}, "rollouts": {"samples_per_prompt": 2, "max_new_tokens": 6}}
    write(folder / "grpo.yaml", grpo | {"batch": {"prompts_per_step": 2, "micro_batch": 4}, "training": training()})
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1};"} for n in range(5)] + [
        {"prompt": "1+1=", "completion": None}
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = {
        "study": "four arms",
        "output": "out",
        "seeds": seeds,
        "arms": {
            "sft": "sft.yaml",
            "longer": {"recipe": "sft.yaml", "set": {"training.max_steps": 5}},
            "grpo": {"recipe": "grpo.yaml"},
            "both": {
                "stages": [
                    {"name": "first", "train": "sft.yaml"},
                    {"name": "then", "train": "grpo.yaml", "set": {"model.path": "${first.model}"}},
                ],
                "set": {"first.training.max_steps": 2},
            },
            "broken": {"recipe": "sft.yaml", "set": {"data.completions": {"path": "rows.jsonl", "chat": False}}},
        },
        "evaluate": {
            "benchmarks": [
                {"name": name, "data": CHAIN | {"size": size, "split": "test"}, "verifier": VERIFIER}
                for name, size in (("fresh", 4), ("old", 2))
            ],
            "beside": ["old"],
            "max_new_tokens": 4,
            "points": 1,
        },
    }
    study["arms"] = {name: arm for name, arm in study["arms"].items() if name not in leave_out}
    write(folder / "study.yaml", study)


@pytest.fixture(scope="module")
def start(processes):
    """`start(folder)` -> a process that runs the study of the folder."""
    sys.path.insert(0, str(Path(__file__).parent))  # where the server finds this module
    yield lambda folder: _started(processes, folder)
    sys.path.remove(str(Path(__file__).parent))


def _started(server, folder):
    process = server.Process(target=_run_study, args=(str(folder),))
    process.start()
    return process


def _run_study(folder):
    os.chdir(folder)
    for name in running.LOADED:  # what the server of this session has not
        importlib.import_module(name)
    running.context = lambda: multiprocessing.get_context("fork")  # from this process, which has imported everything
    run_study(load_study(Path("study.yaml")), jobs=2)


def wait_for(process, condition):
    until = time.monotonic() + 1200
    while not condition():
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.02)


def kill_when(process, folder, finished):
    """With SIGKILL, with so many cells done and another one half done; when each result was written."""
    wait_for(process, lambda: len(results(folder)) >= finished and half_done(folder))
    process.kill()
    process.join()
    return {path: (path / "result.json").stat().st_mtime_ns for path in results(folder)}


def end(process):
    process.join(1200)
    assert process.exitcode == 0


def results(folder):
    return {path.parent for path in folder.glob("out/reported/*/*/result.json")}


def half_done(folder):
    """Cells with a checkpoint and no result."""
    return {path.parents[2] for path in folder.glob("out/reported/*/*/t*/checkpoints/*")} - results(folder)


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key not in SECONDS}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


def assert_equal(whole, killed, models):
    """The tables, what they are made of, and the weights of that many models."""
    assert (killed / "out/table.md").read_bytes() == (whole / "out/table.md").read_bytes()
    found = [json.loads((folder / "out/study.json").read_text()) for folder in (whole, killed)]
    assert without_seconds(found[0]) == without_seconds(found[1])
    weights = sorted(path.relative_to(whole) for path in whole.glob("out/reported/*/*/*/model/model.safetensors"))
    assert len(weights) == models
    assert all((whole / path).read_bytes() == (killed / path).read_bytes() for path in weights)
    return {arm["name"]: arm for arm in found[0]["arms"]}


def test_a_study_that_is_killed_ends_with_the_same_table(tiny_model, tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_study(folder, tiny_model, 1, leave_out=["grpo"])
    end(start(whole))
    before = kill_when(start(killed), killed, 1)
    end(start(killed))

    assert all((path / "result.json").stat().st_mtime_ns == written for path, written in before.items())
    arms = assert_equal(whole, killed, 4)  # three arms, one of them in two stages
    (longer,) = arms["longer"]["cells"]
    assert longer["steps"] == 5 and [point["step"] for point in longer["curve"]] == [0, 5]
    spent = [arms[name]["cells"][0]["spent"]["tokens_trained"] for name in ("sft", "longer", "both")]
    assert spent[0] < spent[1] and arms["both"]["cells"][0]["curve"][0]["tokens"] > 0  # its first stage is counted
    assert not arms["broken"]["complete"] and all(arms[name]["complete"] for name in ("sft", "longer", "both"))
    table = (whole / "out/table.md").read_text()
    assert table.count("failed: broken, seed") == 1 and "rows.jsonl" in table
    assert "| beside: old |" in table and list(longer["beside"]) == ["old"] and list(longer["scores"]) == ["fresh"]
    assert (whole / "out/curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_four_arms_of_three_seeds_that_are_killed_twice(tiny_model, tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_study(folder, tiny_model, 3, leave_out=["broken"])
    end(start(whole))
    kill_when(start(killed), killed, 3)
    kill_when(start(killed), killed, 8)
    end(start(killed))
    assert_equal(whole, killed, 15)


def test_a_cell_ends_when_its_study_has_been_killed(tmp_path):
    # As in a real study the cell is forked from a server, which outlives the study for as long as a cell does.
    found = tmp_path / "pid"
    program = Path(__file__).with_name("cell_that_waits.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    study = subprocess.Popen([sys.executable, program, found], env=environment)
    until = time.monotonic() + 300
    while not found.exists():
        assert study.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    cell = Path("/proc") / found.read_text()
    study.kill()
    study.wait()
    while cell.exists():
        assert time.monotonic() < until  # it has not been told
        time.sleep(0.02)


class Command:
    """The command in a folder, on a Ray of this machine; with the names of a process of `multiprocessing`."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "posttrain", "study", "study.yaml", "--address", "local", "--jobs", "2"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        with (folder / "said.txt").open("a") as said:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        self.kill = self.process.kill

    def is_alive(self):
        return self.process.poll() is None

    def join(self, seconds=None):
        self.exitcode = self.process.wait(seconds)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'posttrain[ray]'"
)
def test_two_ray_workers_that_are_killed_twice_end_with_the_table_of_this_machine_alone(tiny_model, tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_study(folder, tiny_model, 3, leave_out=["broken"])
    end(start(whole))
    kill_when(Command(killed), killed, 3)
    kill_when(Command(killed), killed, 8)
    end(Command(killed))
    assert_equal(whole, killed, 15)
