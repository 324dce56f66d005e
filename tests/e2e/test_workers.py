"""Sampling and evaluation by several workers on a real Ray: equal to one process, also after something was killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # comes with accelerate
import pytest
import yaml

from posttrain.cli.evaluate import evaluation_config
from posttrain.config.collection import SampleConfig
from posttrain.config.loading import load_config
from posttrain.config.schema import ModelConfig
from posttrain.data.traces import read_traces
from posttrain.errors import EngineError, RecipeError
from posttrain.evaluation.report import Report
from posttrain.evaluation.runner import evaluate_model
from posttrain.rollouts.collect import collect
from posttrain.rollouts.workers import run_on_workers

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'posttrain[ray]'"
)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (docs/vllm.md)")
PATIENCE = 600.0
"""Seconds for what takes half a minute on a quiet machine."""


@pytest.fixture
def settings(vllm_model, tmp_path):
    """`settings(output, **keys)`: a file of settings, 24 prompts in chunks of 4 and rounds of 4."""
    rows = [{"prompt": f"{i}+{j}=", "answer": "0123456789+=;#"[(2 * i + j) % 14]} for i in range(4) for j in range(6)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(output: str, **keys) -> Path:
        whole = {
            "model": {"path": str(vllm_model)},
            "data": {"prompts": {"path": str(data), "reference": "answer"}},
            "verifier": [{"type": "exact", "pattern": "^(.)"}],
            "verifier_pool": {"workers": 0},
            "rollouts": {"samples_per_prompt": 12, "max_new_tokens": 8, "temperature": 1.3},
            "stop_at_correct": 2,
            "samples_per_round": 4,
            "prompts_per_chunk": 4,
            "threads": 1,
            "output": str(tmp_path / output),
        }
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(whole | keys))
        return path

    return make


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "posttrain", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def run(*words: object) -> str:
    return finish(start(*words))


def sample_here(path: Path) -> None:
    """With one worker, and without the seconds that a new process takes."""
    config = load_config(path, SampleConfig)
    collect(config, Path(config.output), say=lambda line: None)


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    for _ in range(int(PATIENCE / 0.02)):
        if condition():
            return
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)
    raise AssertionError("waited too long")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def processes_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[str]:
    return [each.name() for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [each for each in processes_of(process) if "_Worker" in " ".join(each.cmdline())]


@needs_ray
def test_a_killed_worker_loses_nothing_and_repeats_nothing(settings, tmp_path):
    sample_here(settings("one.jsonl"))
    process = start("sample", settings("two.jsonl"), "--workers", 2)
    two = tmp_path / "two.jsonl"
    wait_for(lambda: lines(two) > 0, process)
    victims = workers_of(process)
    assert len(victims) == 2
    victims[0].kill()
    everything = processes_of(process)
    output = finish(process)
    assert two.read_bytes() == (tmp_path / "one.jsonl").read_bytes(), output
    assert "24 of 24 prompts done" in output
    wait_for(lambda: not alive(everything))


@needs_ray
def test_a_killed_command_leaves_no_process_and_is_gone_on_with(settings, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    sample_here(settings("one.jsonl"))
    process = start("sample", settings("two.jsonl"), "--workers", 2)
    wait_for(lambda: lines(two) > 0, process)
    everything = processes_of(process)
    assert len(everything) >= 4  # the workers, and Ray's own
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = lines(two)
    assert 0 < found < lines(one)
    wait_for(lambda: not alive(everything))
    output = run("sample", settings("two.jsonl"), "--workers", 3)
    assert f"found {found:,} completions" in output
    expected, traces = read_traces([one]).traces, read_traces([two]).traces  # refuses one that stands there twice
    assert [(t.problem_id, t.sample, t.ids, t.logps) for t in traces] == [
        (t.problem_id, t.sample, t.ids, t.logps) for t in expected
    ]
    assert f"{sum(t.read_tokens for t in traces):,} tokens read" in output
    assert f"{sum(len(t.ids) for t in traces):,} sampled" in output


@needs_vllm
@needs_ray
def test_two_workers_with_vllm_give_the_rows_of_one(settings, tmp_path):
    run("sample", settings("one.jsonl"), "--engine", "vllm")
    run("sample", settings("two.jsonl"), "--engine", "vllm", "--workers", 2)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    traces = read_traces([tmp_path / "one.jsonl"]).traces
    assert len(traces) >= 24 * 4 and all(len(t.ids) == len(t.logps) for t in traces)


@needs_vllm
def test_vllm_gives_the_log_probs_of_the_model(settings, tmp_path, vllm_model):
    import torch
    from transformers import AutoModelForCausalLM

    keys = {"rollouts": {"samples_per_prompt": 4, "max_new_tokens": 8}, "stop_at_correct": None}
    output = run("sample", settings("one.jsonl", **keys), "--engine", "vllm")
    assert "96 traces of 24 prompts" in output
    model = AutoModelForCausalLM.from_pretrained(vllm_model)
    for trace in read_traces([tmp_path / "one.jsonl"]).traces[::7]:
        with torch.no_grad():
            logits = model(torch.tensor([trace.prompt_ids + trace.ids])).logits[0].float()
        expected = logits.log_softmax(-1)[len(trace.prompt_ids) - 1 : -1].gather(1, torch.tensor(trace.ids)[:, None])
        assert (expected[:, 0] - torch.tensor(trace.logps)).abs().max() < 1e-5
    again = run("sample", settings("one.jsonl", **keys), "--engine", "vllm")
    assert "96 traces of 24 prompts (96 of them found)" in again


OVERRIDES = ["benchmarks=[chain-sum-3,chain-sum-4]", "samples=2", "max_batch=4", "max_new_tokens=40", "limit=24"]
EVALUATION = ["--benchmarks", "chain-sum-3,chain-sum-4", *OVERRIDES[1:]]


def same(a: Path, b: Path) -> bool:
    one, two = Report.load(a), Report.load(b)
    assert one.engine == two.engine and one.versions == two.versions
    counts = [[(x.records, x.metrics, x.greedy, x.sampled) for x in report.benchmarks] for report in (one, two)]
    return counts[0] == counts[1]


@needs_ray
def test_an_evaluation_by_workers_is_that_of_one_process_also_after_a_kill(vllm_model, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    config = evaluation_config(None, OVERRIDES)
    evaluate_model(ModelConfig(path=str(vllm_model)), config, one)
    journal = tmp_path / "two.json.partial.jsonl"
    process = start("eval", vllm_model, *EVALUATION, "--workers", 2, "--output", two)
    wait_for(lambda: lines(journal) > 1, process)
    everything = processes_of(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(everything))
    found = lines(journal)
    # As several workers may leave it: the first chunk is missing.
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[1:]))
    assert "holds results" in run("eval", vllm_model, *EVALUATION, "--workers", 2, "--output", two)
    assert same(one, two) and found > 1 and not journal.exists()


@needs_vllm
def test_an_evaluation_with_vllm_in_one_process(vllm_model, tmp_path):
    out = tmp_path / "report.json"
    run("eval", vllm_model, *EVALUATION, "--engine", "vllm", "--output", out)
    report = Report.load(out)
    assert report.engine == "FixedVllm" and "vllm" in report.versions
    assert [len(benchmark.records) for benchmark in report.benchmarks] == [24, 24]
    assert all(benchmark.sampled.completions == 48 for benchmark in report.benchmarks)


# ------------------------------------------------------------------------------------------- the pool, without a model


class Squares:
    """A job: the parts of item n are n, n squared; some items end badly."""

    def open(self):
        return self

    def run(self, item: int):
        if item == 100:
            raise RecipeError("a hundred", where="here", hint="not that")
        if item == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
        yield item**2


@needs_ray
def test_parts_come_in_order_and_errors_are_said_once():
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:  # a program that uses Ray itself keeps it
        found = list(run_on_workers(Squares(), range(20), workers=2, address=None))
        assert ray.is_initialized()
        assert {n: [part for m, part in found if m == n] for n in range(20)} == {n: [n, n * n] for n in range(20)}
        with pytest.raises(RecipeError, match="a hundred") as caught:
            list(run_on_workers(Squares(), [1, 100, 2], workers=2, address=None))
        assert caught.value.hint == "not that"
        with pytest.raises(RecipeError, match="4 workers need a CPU each, and Ray has 3") as caught:
            list(run_on_workers(Squares(), range(20), workers=4, address=None))
        assert caught.value.hint == "set workers: 3"
        with pytest.raises(EngineError, match="a worker died 3 times"):
            list(run_on_workers(Squares(), [1, 200], workers=1, address=None))
        assert list(run_on_workers(Squares(), [], workers=2, address=None)) == []
    finally:
        ray.shutdown()
