"""Pipelined rollouts with a real server: what they equal, and a trainer or a server that is killed in between."""

import importlib.util
import json
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from posttrain.config.loading import dump_recipe
from posttrain.errors import EngineError
from posttrain.rollouts.vllm_server import ServedVllm
from posttrain.trainers.run import train

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (docs/vllm.md)")

SERVERS = runpy.run_path(str(Path(__file__).with_name("test_vllm_server.py")))
Server, KEY = SERVERS["Server"], SERVERS["KEY"]
METHOD = {"name": "grpo"}
STEPS = 6


@pytest.fixture(scope="module")
def server(vllm_model, tmp_path_factory):
    made = Server(vllm_model, tmp_path_factory.mktemp("server")).wait()
    yield made
    made.end()


@pytest.fixture
def recipe(load_vllm_recipe, tmp_path, monkeypatch):
    """`recipe(server, name, changes)` -> a recipe of some steps on that server."""
    monkeypatch.setenv("SERVER_KEY", KEY)

    def make(server, name, changes=None):
        served = {
            "rollouts.mode": "server",
            "rollouts.max_new_tokens": 48,
            "rollouts.vllm": {"url": server.url, "api_key_env": "SERVER_KEY", "reconnect": 1.0, "start_timeout": 30.0},
            "training.max_steps": STEPS,
            "output": str(tmp_path / name),
        }
        return load_vllm_recipe(METHOD, served | (changes or {"rollouts.pipeline": True}))

    return make


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same_runs(one, other):
    """The same completions and, up to the rounding of the server's batches, the same losses and weights."""
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for key in ("loss", "grad_norm", "reward", "completion_length", "approx_kl", "stale_logp_diff_mean"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
        assert a["rollout_age"] == b["rollout_age"] == (a["step"] > 1)
    one, other = weights(one), weights(other)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4


@pytest.mark.serve
def test_a_pipelined_run_is_a_run_with_a_delay_of_one(server, recipe):
    delayed = train(recipe(server, "delayed", {"rollouts.delay": 1})).run_dir
    pipelined = train(recipe(server, "pipelined")).run_dir
    same_runs(delayed, pipelined)
    rows = metrics(pipelined)
    assert all(row["engine_logp_diff_max"] < 1e-5 for row in rows)
    assert max(row["stale_logp_diff_max"] for row in rows) > 1e-3
    assert all(row["pipeline_overlap_seconds"] > 0 for row in rows[1:])


def test_a_trainer_that_is_killed_while_a_batch_is_sampled_goes_on(server, recipe, tmp_path):
    whole = train(recipe(server, "whole")).run_dir
    killed = recipe(server, "killed", {"rollouts.pipeline": True, "training.save_steps": 2})
    (tmp_path / "killed.yaml").write_text(dump_recipe(killed))
    command = [sys.executable, "-m", "posttrain", "train", str(tmp_path / "killed.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, deadline = Path(killed.output) / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (Path(killed.output) / "model").exists()
    same_runs(whole, train(killed, resume="auto").run_dir)


@pytest.mark.slow
def test_a_server_that_is_killed_beside_the_training_ends_the_run_with_one_message(
    vllm_model, recipe, tmp_path, monkeypatch
):
    server = Server(vllm_model, tmp_path).wait()
    generate, threads = ServedVllm.generate, []

    def die_at_the_fourth(engine, prompts, sampling):
        threads.append(threading.current_thread().name)
        if len(threads) == 4:
            server.end()
        return generate(engine, prompts, sampling)

    changes = {"rollouts.pipeline": True, "training.save_steps": 1}
    try:
        whole = train(recipe(server, "whole", changes)).run_dir
        monkeypatch.setattr(ServedVllm, "generate", die_at_the_fourth)
        with pytest.raises(EngineError, match="sampling with weights 2: the server went away") as raised:
            train(recipe(server, "parts", changes))
        assert threads[-1].startswith("rollouts") and "--resume auto" in raised.value.hint
        monkeypatch.setattr(ServedVllm, "generate", generate)
        server = Server(vllm_model, tmp_path, port=server.port).wait()
        same_runs(whole, train(recipe(server, "parts", changes), resume="auto").run_dir)
    finally:
        server.end()
