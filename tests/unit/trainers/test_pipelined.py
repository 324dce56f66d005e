"""Rollouts sampled beside the training, with an engine that holds a copy of the weights as a server does."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.contract.shell import CLOCK as SHELL_CLOCK
from posttrain.data.sample import Origin, Sample
from posttrain.errors import EngineError
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.weight_sync import COMPARED_ROWS, COMPARED_TOKENS, PolicyWeights, engine_differences
from posttrain.trainers import run as run_module
from posttrain.trainers.online import OnlineShell
from posttrain.trainers.online_state import OF_RANK
from posttrain.trainers.pipelined import Pipeline
from posttrain.trainers.rollout_step import Batch
from posttrain.trainers.run import train

SERVER = {"rollouts.engine": "vllm", "rollouts.mode": "server", "training.max_steps": 6}
PIPELINE = {**SERVER, "rollouts.pipeline": True}
DELAY = {**SERVER, "rollouts.delay": 1}
METHODS_RUN = [
    {"name": "grpo", "beta": 0.1},
    {"name": "grpo", "updates_per_rollout": 2},
    {"name": "rec", "clip": "none", "drop": "balanced"},
    {"name": "prefixrl", "adapt": "success"},
    {"name": "ppo", "epochs": 2},
]
CLOCK = (*SHELL_CLOCK, "pipeline_overlap_seconds", "pipeline_wait_seconds")
COUNTED = ("tokens_", "flops")
LIMIT = 60.0


class CopyEngine:
    """What a server does for a run, in this process: holds a copy of the weights, and may sample in any thread.

    Attributes:
        threads: of each call of `generate`, by name.
        gate: returns when a call in the background may go on.
    """

    made: list["CopyEngine"] = []

    def __init__(self, shell, renderer, tokenizer):
        self.weights = PolicyWeights(shell.model, shell.accelerator)
        config = copy.deepcopy(self.weights.config)
        self.copy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
        self.inner = TransformersEngine(
            self.copy, stop_ids=renderer.stop_ids, pad_id=tokenizer.pad_token_id, max_batch=256
        )
        self.threads, self.versions, self.gate, self.sampling = [], [], lambda: None, threading.Lock()
        self.made.append(self)

    @property
    def policy_version(self):
        return self.inner.policy_version

    @property
    def positions(self):
        return self.inner.positions

    def sync(self, version):
        assert self.sampling.acquire(blocking=False), "weights are sent while completions are sampled"
        missing, unexpected = self.copy.load_state_dict(dict(self.weights.named_tensors()), strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected
        self.sampling.release()
        self.versions.append(version)
        return self.inner.sync(version)

    def generate(self, prompts, sampling, limits=None):
        name = threading.current_thread().name
        self.threads.append(name)
        with self.sampling:
            if name.startswith("rollouts"):
                self.gate()
            return self.inner.generate(prompts, sampling, limits)

    def logps(self, sequences):
        return PolicyWeights(self.copy, self.weights.accelerator).logps(sequences)

    def read_tokens(self, *arguments):
        return self.inner.read_tokens(*arguments)

    def together(self):
        return self.inner.together()

    def close(self):
        self.gate = lambda: None


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    monkeypatch.setattr(CopyEngine, "made", [])
    monkeypatch.setattr(
        run_module,
        "build_engine",
        lambda recipe, needs, shell, renderer, tokenizer, *_: CopyEngine(shell, renderer, tokenizer),
    )
    return CopyEngine.made


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder, leave_out=CLOCK):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(leave_out)} for row in rows if "loss" in row]


def samples(folder):
    return (folder / "samples.jsonl").read_text()


@pytest.fixture
def trained(load, tmp_path):
    """`trained(method, changes, name)` -> the folder of a whole run."""

    def make(method, changes, name, **how):
        return train(load(method, {**changes, "output": str(tmp_path / name)}), **how).run_dir

    return make


# ------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize(
    ("method", "late"),
    [*((method, False) for method in METHODS_RUN), (METHODS_RUN[1], True)],
    ids=[*("-".join(map(str, method.values())) for method in METHODS_RUN), "late"],
)
def test_a_pipelined_run_is_a_run_with_a_delay_of_one_bit_for_bit(method, late, trained, engines, monkeypatch):
    delayed = trained(method, DELAY, "delayed")
    settle, waited_for = OnlineShell.settle, threading.Event()

    def settle_and_tell(self):
        waited_for.set()
        settle(self)
        waited_for.clear()

    if late:  # all updates of a window are done before a token of the next is sampled
        monkeypatch.setattr(OnlineShell, "settle", settle_and_tell)
        monkeypatch.setattr(CopyEngine, "close", lambda self: waited_for.set() or setattr(self, "gate", lambda: None))
        init = CopyEngine.__init__

        def gated(self, *arguments):
            init(self, *arguments)
            self.gate = lambda: waited_for.wait(LIMIT)

        monkeypatch.setattr(CopyEngine, "__init__", gated)
    pipelined = trained(method, PIPELINE, "pipelined")
    assert same(weights(delayed), weights(pipelined)) and samples(delayed) == samples(pipelined)
    one, other = metrics(delayed, CLOCK + COUNTED), metrics(pipelined, CLOCK + COUNTED)
    assert one == other
    windows = 6 // method.get("updates_per_rollout", method.get("epochs", 1))
    threads = [name.split("_")[0] for name in engines[-1].threads[:windows]]
    assert threads == ["MainThread"] + ["rollouts"] * (windows - 1)
    assert engines[-1].versions == list(range(windows))
    ages = [row["rollout_age"] for row in one if "rollout_age" in row]
    assert ages == [0] + [1] * (windows - 1)
    assert all(row["engine_logp_diff_max"] < 1e-5 for row in one if "engine_logp_diff_max" in row)
    assert max(row["stale_logp_diff_max"] for row in one if "stale_logp_diff_max" in row) > 1e-3


def test_the_log_has_the_time_that_was_overlapped_and_every_token_once(trained, engines):
    delayed, pipelined = trained({"name": "grpo"}, DELAY, "delayed"), trained({"name": "grpo"}, PIPELINE, "pipelined")
    rows = metrics(pipelined, ("time",))
    assert "pipeline_overlap_seconds" not in rows[0]
    for row in rows[1:]:
        overlap, waited = row["pipeline_overlap_seconds"], row["pipeline_wait_seconds"]
        work = row["rollout_seconds"] + row["verify_seconds"]
        assert 0 < overlap and 0 <= waited and overlap + waited == pytest.approx(work, abs=0.02)
    # With a delay the first entry has two rollouts, and the last one is left over.
    each = [row["tokens_sampled"] for row in rows]
    in_turn = [row["tokens_sampled"] for row in metrics(delayed, ("time",))]
    assert in_turn[0] == each[0] + each[1] and in_turn[1:5] == each[2:]
    assert sum(in_turn) > sum(each) == rows[-1]["tokens_sampled_total"]


def test_evaluation_waits_for_the_batch_and_changes_nothing(trained, engines):
    alone = trained({"name": "grpo"}, PIPELINE, "alone")
    benchmark = {
        "name": "sums",
        "data": {"task": "chain_sum", "levels": [2], "size": 4},
        "verifier": [{"type": "procedural"}],
    }
    between = {"evaluation": {"benchmarks": [benchmark], "every": 2, "max_new_tokens": 8}}
    measured = trained({"name": "grpo"}, {**PIPELINE, **between}, "measured")
    assert same(weights(alone), weights(measured)) and samples(alone) == samples(measured)
    assert metrics(alone) == metrics(measured)
    assert engines[-1].versions == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6]


def test_replayed_groups_stand_beside_pipelined_ones(trained):
    replay = {"rollouts.replay": {"size": 6, "share": 0.5}}
    delayed = trained({"name": "grpo"}, {**DELAY, **replay}, "delayed")
    pipelined = trained({"name": "grpo"}, {**PIPELINE, **replay}, "pipelined")
    assert same(weights(delayed), weights(pipelined))
    assert metrics(delayed, CLOCK + COUNTED) == metrics(pipelined, CLOCK + COUNTED)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_run_that_is_made_longer_is_the_longer_run(trained):
    method, steps = {"name": "grpo", "updates_per_rollout": 2, "beta": 0.1}, 3
    saved = {**PIPELINE, "training.save_steps": steps}
    whole = trained(method, {**saved, "training.max_steps": 9}, "whole")
    first = trained(method, {**saved, "training.max_steps": steps}, "parts")
    assert (first / "checkpoints" / f"checkpoint-{steps}" / OF_RANK.format(0, 1)).exists()
    longer = trained(method, {**saved, "training.max_steps": 9}, "parts", resume="auto")
    assert same(weights(whole), weights(longer)) and samples(whole) == samples(longer)
    assert metrics(whole) == metrics(longer)


def test_a_run_without_checkpoints_does_not_wait_for_a_batch_that_no_step_trains_on(trained, engines, monkeypatch):
    init, ended = CopyEngine.__init__, threading.Event()

    def gated(self, *arguments):
        init(self, *arguments)
        self.gate = lambda: len(self.threads) <= 2 or ended.wait(LIMIT)

    monkeypatch.setattr(CopyEngine, "__init__", gated)
    monkeypatch.setattr(CopyEngine, "close", lambda self: None)
    started = time.monotonic()
    trained({"name": "grpo"}, {**PIPELINE, "training.max_steps": 2}, "run")
    while len(engines[-1].threads) < 3 and time.monotonic() - started < LIMIT:
        time.sleep(0.01)
    assert engines[-1].sampling.locked()  # the third batch is still being sampled
    ended.set()


def test_stopped_while_a_batch_is_sampled_and_resumed(load, tmp_path, engines, monkeypatch):
    whole = train(load({"name": "grpo"}, {**PIPELINE, "output": str(tmp_path / "whole")})).run_dir
    compute_loss, update = OnlineShell.compute_loss, threading.Event()

    def interrupted(self, *arguments, **named):
        if self.state.global_step == 2:
            self.parts.engine.gate = lambda: update.wait(LIMIT)
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.5, update.set).start()  # the checkpoint is made while the batch is not there yet
        return compute_loss(self, *arguments, **named)

    monkeypatch.setattr(OnlineShell, "compute_loss", interrupted)
    recipe = load({"name": "grpo"}, {**PIPELINE, "output": str(tmp_path / "parts")})
    stopped = train(recipe)
    assert stopped.stopped and stopped.steps == 3
    monkeypatch.setattr(OnlineShell, "compute_loss", compute_loss)
    resumed = train(recipe, resume="auto").run_dir
    assert same(weights(whole), weights(resumed)) and samples(whole) == samples(resumed)
    assert metrics(whole) == metrics(resumed)
    # None lost, none sampled twice: seven batches, of which the last is for a longer run.
    assert len(engines[1].threads) == 4 and len(engines[2].threads) in (2, 3)


# ----------------------------------------------------------------------------------------------------------- errors


def test_an_error_in_the_background_ends_the_run_with_its_own_message_and_the_run_goes_on(load, tmp_path, monkeypatch):
    saved = {**PIPELINE, "training.save_steps": 1}
    whole = train(load({"name": "grpo"}, {**saved, "output": str(tmp_path / "whole")})).run_dir
    generate = CopyEngine.generate

    def fail_at_the_fourth(self, *arguments):
        found = generate(self, *arguments)
        if len(self.threads) == 4:
            raise EngineError("sampling with weights 2: the server went away", where="rollouts.vllm", hint="go on")
        return found

    monkeypatch.setattr(CopyEngine, "generate", fail_at_the_fourth)
    recipe = load({"name": "grpo"}, {**saved, "output": str(tmp_path / "parts")})
    with pytest.raises(EngineError, match="sampling with weights 2: the server went away") as raised:
        train(recipe)
    assert raised.value.where == "rollouts.vllm" and raised.value.__context__ is None
    monkeypatch.setattr(CopyEngine, "generate", generate)
    resumed = train(recipe, resume="auto").run_dir
    assert same(weights(whole), weights(resumed)) and metrics(whole) == metrics(resumed)


def test_a_defect_in_the_background_keeps_its_traceback(trained, monkeypatch):
    monkeypatch.setattr(CopyEngine, "generate", lambda self, *_: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        trained({"name": "grpo"}, PIPELINE, "run")


def batch():
    return Batch([], 0, 0, {})


def test_one_batch_at_a_time():
    pipeline = Pipeline(lambda request: batch())
    assert pipeline.finish() is None
    pipeline.start(3, None)
    with pytest.raises(RuntimeError, match="a batch is being sampled already"):
        pipeline.start(4, None)
    assert pipeline.finish()[0] == 3 and pipeline.finish() is None


@pytest.mark.parametrize(("work", "training"), [(0.3, 0.0), (0.0, 0.3)], ids=["sampling", "training"])
def test_overlap_and_wait_add_up_to_the_work(work, training):
    pipeline = Pipeline(lambda request: time.sleep(work) or batch())
    pipeline.start(0, None)
    time.sleep(training)
    _, found = pipeline.finish()
    overlap, waited = (found.seconds[f"pipeline_{name}_seconds"] for name in ("overlap", "wait"))
    assert overlap + waited == pytest.approx(work, abs=0.1)
    assert waited == pytest.approx(work - training if work else 0.0, abs=0.1)


# -------------------------------------------------------------------------------------------------------- two ranks


@pytest.fixture
def on_two_ranks(tiny_model, make_recipe_data, tmp_path):
    """`on_two_ranks(method, changes of each recipe, environment)` -> what the ranks printed."""

    def make(method, of_recipes, **environment):
        paths = []
        for number, changes in enumerate(of_recipes):
            paths.append(tmp_path / f"two-{number}.yaml")
            paths[-1].write_text(yaml.safe_dump(make_recipe_data(tiny_model, tmp_path, method, changes)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launched = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
            + [str(Path(__file__).with_name("train_pipelined.py")), *map(str, paths)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **environment},
        )
        assert launched.returncode == 0, launched.stdout + launched.stderr
        return launched.stdout

    return make


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one_and_go_on_from_a_batch_ahead(on_two_ranks, trained, tmp_path):
    method = {"name": "grpo", "updates_per_rollout": 2}
    descent = {"training.optim": "sgd", "training.learning_rate": 0.5, "training.max_grad_norm": 0.0}
    changes = {**PIPELINE, **descent, "batch.micro_batch": 4, "training.save_steps": 3}
    two = {**changes, "output": str(tmp_path / "two")}
    on_two_ranks(method, [{**two, "training.max_steps": 3}, {**two, "training.max_steps": 7}])
    files = {path.name for path in (tmp_path / "two" / "checkpoints" / "checkpoint-3").glob("rollouts-rank*")}
    assert files == {OF_RANK.format(0, 2), OF_RANK.format(1, 2)}
    alone = trained(method, {**changes, "training.max_steps": 7}, "alone")
    one, other = weights(alone), weights(tmp_path / "two")
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5
    chosen = (*CLOCK, "engine_logp_diff")  # compared on as many completions of each rank
    for single, double in zip(metrics(alone, chosen), metrics(tmp_path / "two", chosen), strict=True):
        assert set(single) == set(double)
        assert all(double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5) for key in single)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_all_ranks_say_what_failed_on_one(rank, on_two_ranks, tmp_path):
    said = on_two_ranks(
        {"name": "grpo"}, [{**PIPELINE, "batch.micro_batch": 4, "output": str(tmp_path / "two")}], FAIL=rank
    )
    for each in ("0", "1"):
        assert f"rank {each}: sampling with weights 1: the server went away" in said


# ------------------------------------------------------------------------------- the engine's difference by itself


def test_the_comparison_counts_sampled_tokens_among_the_last_ones():
    class Scores:
        def __init__(self, shift):
            self.shift, self.asked, self.policy = shift, [], None

        def logps(self, sequences):
            self.asked.append(sequences)
            return [[-1.0 - token * self.shift for token in sequence[1:]] for sequence in sequences]

    engine = Scores(0.5)
    engine.weights = Scores(0.0)
    long = Sample(list(range(200)), [0] * 190 + [1] * 10, Origin.POLICY, "p", 0)
    short = Sample([7, 1, 2, 3], [0, 0, 1, 1], Origin.POLICY, "p", 1)
    found = engine_differences(engine, [long, short])
    assert found == [0.5 * token for token in (*range(190, 200), 2, 3)]
    assert engine.asked == engine.weights.asked
    assert [len(sequence) for sequence in engine.asked[0]] == [COMPARED_TOKENS, 4]
    engine_differences(engine, [short] * 50)
    assert len(engine.asked[1]) == COMPARED_ROWS
