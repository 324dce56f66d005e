"""Settings of who samples: what is refused, and what is said then."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from posttrain.cli.evaluate import evaluation_config, refuse_beside_rewards
from posttrain.config.collection import SampleSettings
from posttrain.config.loading import parse_config
from posttrain.config.workers import EvaluationRun
from posttrain.errors import EngineError, RecipeError, StackError
from posttrain.rollouts import workers
from posttrain.rollouts.collect import collect, engine_settings
from posttrain.rollouts.standalone import EngineSettings, Extent, FixedVllm
from posttrain.rollouts.workers import require_ray, run_on_workers

JUDGE = {"type": "judge", "endpoint": "http://127.0.0.1:1/v1", "model": "m", "principles": ["p"]}


def sample(**keys) -> SampleSettings:
    whole = {
        "model": {"path": "model"},
        "data": {"prompts": {"path": "p.jsonl", "reference": "answer"}},
        "verifier": [{"type": "exact"}],
    }
    return parse_config(whole | keys, SampleSettings)


def evaluation(**keys) -> EvaluationRun:
    return parse_config({"benchmarks": ["chain-sum-3"]} | keys, EvaluationRun)


@pytest.mark.parametrize("make", [sample, evaluation])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": -1}, "workers"),
        ({"address": "head:6379"}, "no effect with one worker, which is this process: set `workers`"),
    ],
)
def test_workers_that_cannot_be(make, keys, message):
    with pytest.raises(RecipeError, match=message):
        make(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rollouts": {"engine": "vlm"}}, "'transformers' or 'vllm'|vllm"),
        ({"rollouts": {"engine": "vllm"}, "beams": 16}, "does no beam search.*engine transformers"),
        ({"rollouts": {"engine": "vllm", "vllm": {"url": "http://a:1"}}}, "rollouts.vllm.url would have no effect"),
        ({"rollouts": {"vllm": {"dtype": "bfloat16"}}}, "rollouts.engine transformers does not read `rollouts.vllm`"),
        ({"rollouts": {"engine": "vllm", "mode": "server"}}, "rollouts.mode would have no effect"),
        ({"rollouts": {"delay": 2, "sync_every": 2}}, "rollouts.sync_every, rollouts.delay would have no effect"),
        ({"rollouts": {"engine": "vllm", "top_p": 0.9, "temperature": 0.5}}, "log-probs.*or take engine transformers"),
        ({"workers": 2, "verifier": [JUDGE | {"max_requests": 5}]}, "each spend them: set workers to 1"),
    ],
)
def test_sampling_that_cannot_be(keys, message):
    with pytest.raises(RecipeError, match=message):
        sample(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"engine": "vlm"}, "'transformers' or 'vllm'|vllm"),
        ({"engine": "vllm", "beams": 4}, "does no beam search.*engine transformers"),
        ({"engine": "vllm", "vllm": {"timeout": 3}}, "vllm.timeout would have no effect"),
        ({"vllm": {"dtype": "bfloat16"}}, "engine transformers does not read `vllm`; engine vllm does"),
    ],
)
def test_evaluations_that_cannot_be(keys, message):
    with pytest.raises(RecipeError, match=message):
        evaluation(**keys)


def test_what_may_be():
    assert sample(workers=3, address="auto", verifier=[JUDGE]).workers == 3
    assert sample(verifier=[JUDGE | {"max_requests": 5}]).workers == 1
    assert evaluation(engine="vllm", top_p=0.9, temperature=0.5, vllm={"dtype": "bfloat16"}).engine == "vllm"
    assert evaluation_config(None, ["benchmarks=[chain-sum-3]", "engine=vllm", "workers=2"]).workers == 2
    with pytest.raises(RecipeError, match="--workers has no effect with --rewards"):
        refuse_beside_rewards(None, {"--engine": None, "--workers": 2})


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    found, modules = importlib.util.find_spec, {"vllm": None, "ray": None, "ray.data": None, "pyarrow": None}
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)  # import then raises ModuleNotFoundError
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    with pytest.raises(StackError, match="missing extra 'vllm'") as caught:
        collect(sample(rollouts={"engine": "vllm"}), tmp_path / "t.jsonl", say=print)
    assert "make install-vllm" in caught.value.hint
    with pytest.raises(StackError, match="missing extra 'ray'") as caught:
        collect(sample(workers=2), tmp_path / "t.jsonl", say=print)
    assert caught.value.hint == "pip install 'posttrain[ray]'"
    with pytest.raises(StackError, match="missing extra 'ray'"):
        require_ray(None)
    with pytest.raises(StackError, match="missing extra 'ray'"):
        next(run_on_workers(None, [1], workers=1, address=None))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def environment(monkeypatch):
    """One that Ray has not been seen in."""
    fresh = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(workers.os, "environ", fresh)
    monkeypatch.setattr(workers, "require", lambda extra, module: module)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return fresh


def test_ray_says_nothing_to_anyone_unless_told(environment):
    environment["RAY_USAGE_STATS_ENABLED"] = "1"
    assert require_ray("head:6379") == "ray"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "1"  # the user's own
    assert environment["RAY_USAGE_STATS_PROMPT_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("address", "before", "locked"),
    [
        (None, {}, True),
        ("local", {}, True),
        ("auto", {}, False),
        (None, {"RAY_ADDRESS": "head:6379"}, False),
        (None, {"RAY_AUTH_MODE": "disabled"}, False),
    ],
)
def test_a_ray_of_its_own_is_locked(environment, address, before, locked):
    environment.update(before)
    require_ray(address)
    assert (environment.get("RAY_AUTH_MODE") == "token") == locked == ("RAY_AUTH_TOKEN" in environment)
    assert not locked or len(environment["RAY_AUTH_TOKEN"]) == 64


def test_the_engine_has_room_for_all_prompts_and_no_more():
    class Policy:
        class config:
            max_position_embeddings = 96

    prompts = [([1] * 5, 10), ([1] * 9, 4), ([1] * 20, 10)]
    assert Extent.of(prompts, Policy, grows=False).max_length == 30
    assert Extent.of(prompts, Policy, grows=True).max_length == 96
    assert Extent.of([([1] * 90, 10)], Policy, grows=False).max_length == 96
    assert Extent.of(prompts * 3, Policy, grows=False).canary == [[1] * 5, [1] * 9, [1] * 20, [1] * 5]


def test_what_samples_depend_on():
    settings = engine_settings(sample(rollouts={"engine": "vllm", "top_k": 3, "vllm": {"dtype": "bfloat16"}}))
    assert settings.restricted and settings.kind is FixedVllm
    assert settings.identity(None) == {"engine": "vllm", "engine_dtype": "bfloat16"}
    plain = EngineSettings("transformers", settings.model, 8)
    assert plain.identity(None) == {} and plain.versions() == {} and plain.kind.__name__ == "TransformersEngine"


class SlowRay:
    """Comes up at the given attempt."""

    def __init__(self, attempt: int) -> None:
        self.attempt, self.folders, self.shut = attempt, [], 0

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str, _temp_dir: str, include_dashboard: bool, **settings) -> None:
        assert (address, include_dashboard, settings["num_cpus"]) == ("local", False, 3)
        self.folders.append(_temp_dir)
        if len(self.folders) < self.attempt:
            raise Exception("The current node timed out during startup.")

    def shutdown(self) -> None:
        self.shut += 1


def test_ray_that_does_not_come_up_is_tried_again(environment):
    slow = SlowRay(3)
    with workers._connected(slow, None, 2):
        (folder,) = {Path(each).parent for each in slow.folders}
        assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0  # nobody else looks into it
    assert len(set(slow.folders)) == 3 and slow.shut == 3 and not folder.exists()
    never = SlowRay(9)
    with pytest.raises(EngineError, match="did not start in 3 attempts: The current node timed out") as caught:
        with workers._connected(never, None, 2):
            raise AssertionError("there is no Ray")
    assert "workers: 1" in caught.value.hint and not Path(never.folders[0]).parent.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there(environment, address):
    with pytest.raises(EngineError, match=f"no Ray cluster answers at {address}") as caught:
        with workers._connected(SlowRay(1), address, 2):
            raise AssertionError("there is no Ray")
    assert "RAY_ADDRESS" in caught.value.hint


@pytest.mark.parametrize(
    ("resources", "workers_asked", "expected"),
    [({"CPU": 8.0, "GPU": 2.0}, 2, 1), ({"CPU": 8.0}, 8, 0), ({"CPU": 8.0, "GPU": 0.0}, 3, 0)],
)
def test_a_worker_has_a_gpu_where_there_are_any(resources, workers_asked, expected):
    assert workers._check_room(resources, workers_asked) == expected


@pytest.mark.parametrize(
    ("resources", "message", "hint"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, "9 workers need a GPU each, and Ray has 2", "set workers: 2"),
        ({"CPU": 8.0}, "9 workers need a CPU each, and Ray has 8", "set workers: 8"),
        ({}, "9 workers need a CPU each, and Ray has 0", "start nodes of the cluster first"),
    ],
)
def test_more_workers_than_there_is_room_for(resources, message, hint):
    with pytest.raises(RecipeError, match=message) as caught:
        workers._check_room(resources, 9)
    assert caught.value.hint == hint
