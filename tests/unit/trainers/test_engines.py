"""What preflight says about engines: keys without effect, and what vLLM cannot do."""

import importlib

import pytest
import torch

from posttrain.config.preflight import check_needs
from posttrain.errors import EngineError, NeedsError, RecipeError, StackError
from posttrain.methods import METHODS
from posttrain.trainers.engines import check_engine


@pytest.fixture
def check(load):
    def run(changes, name="grpo"):
        recipe = load({"name": name}, changes)
        needs = METHODS[name](recipe.method).needs
        check_needs(recipe, needs, name)
        return recipe, needs

    return run


def vllm(**keys):
    return {"rollouts.engine": "vllm", **{f"rollouts.{key}": value for key, value in keys.items()}}


@pytest.mark.parametrize(
    "changes",
    [
        vllm(),
        vllm(temperature=0.7),
        vllm(top_p=0.9),
        vllm(top_k=5),
        vllm(delay=1),
        vllm(importance_cap=2.0),
        vllm(importance={"level": "geometric", "mode": "mask", "low": 0.999, "high": 1.001}),
        vllm(vllm={"kv_cache_mb": 64, "dtype": "bfloat16", "canary_limit": 0.1}),
        vllm(mode="server", vllm={"url": "http://node7:8000", "timeout": 60, "canary_limit": 0.1}),
        vllm(mode="server", pipeline=True),
        vllm(mode="server", pipeline=True, replay={"size": 8, "share": 0.25}),
    ],
)
def test_what_vllm_does(check, changes):
    assert check(changes)[0].rollouts.engine == "vllm"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (vllm(temperature=0.7, top_p=0.9), "temperature other than 1"),
        (vllm(temperature=0.7, top_k=5), "temperature other than 1"),
        (vllm(sync_every=2), "a sampling policy that lags needs engine transformers"),
    ],
)
def test_what_vllm_cannot_do(check, changes, says):
    with pytest.raises(RecipeError, match=says) as raised:
        check(changes)
    assert "engine: transformers" in raised.value.hint


@pytest.mark.parametrize(
    ("changes", "engine"),
    [({"rollouts.pipeline": True}, "transformers"), (vllm(pipeline=True), "vllm with mode: colocate")],
)
def test_only_a_server_samples_beside_the_training(check, changes, engine):
    with pytest.raises(RecipeError, match=f"engine {engine} samples where the policy is trained") as raised:
        check(changes)
    assert raised.value.where.endswith("rollouts.pipeline")
    assert "engine: vllm and mode: server" in raised.value.hint and "delay: 1" in raised.value.hint


def test_an_engine_sleeps_on_a_gpu_only(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="sleep mode moves memory of a GPU") as raised:
        check_engine(*check(vllm(vllm={"sleep": True})))
    assert raised.value.where == "rollouts.vllm.sleep" and "kv_cache_mb" in raised.value.hint


def test_only_an_adapter_is_sent_as_one(check):
    changes = vllm(vllm={"sync": "adapter"})
    with pytest.raises(RecipeError, match="there is no adapter to send") as raised:
        check(changes)
    assert raised.value.where.endswith("rollouts.vllm.sync") and "model.peft: {type: lora}" in raised.value.hint
    check(changes | {"model.peft": {"type": "lora"}})


def test_a_server_needs_a_model_folder(load):
    changes = vllm(mode="server") | {"model": {"init": {"hidden_size": 16, "layers": 1}}}
    recipe = load({"name": "grpo"}, changes)
    with pytest.raises(RecipeError, match="a server needs a model folder"):
        check_needs(recipe, METHODS["grpo"](recipe.method).needs, "grpo")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rollouts.mode": "server"}, "rollouts.mode"),
        ({"rollouts.vllm": {"kv_cache_mb": 8}}, "rollouts.vllm"),
        ({"rollouts.importance_cap": 2.0}, "rollouts.importance_cap"),
        (vllm(vllm={"url": "http://node7:8000"}), "rollouts.vllm.url"),
        (vllm(vllm={"timeout": 9}), "rollouts.vllm.timeout"),
        (vllm(mode="server", vllm={"kv_cache_mb": 8}), "rollouts.vllm.kv_cache_mb"),
        (vllm(mode="server", vllm={"dtype": "float32"}), "rollouts.vllm.dtype"),
        (vllm(mode="server", vllm={"sleep": True}), "rollouts.vllm.sleep"),
        (vllm(delay=1, importance_cap=2.0), "rollouts.importance_cap"),
        (vllm(importance_cap=2.0, importance={"mode": "mask"}), "rollouts.importance_cap"),
        ({"rollouts.importance": {"mode": "mask"}}, "rollouts.importance"),
        (vllm(mode="server", pipeline=True, importance_cap=2.0), "rollouts.importance_cap"),
        (vllm(mode="server", pipeline=True, delay=1), "rollouts.delay"),
        ({"rollouts.vllm": {"sync": "merged"}}, "rollouts.vllm"),
    ],
)
def test_keys_that_nobody_reads_are_refused(check, changes, key):
    with pytest.raises(NeedsError, match="no effect") as raised:
        check(changes)
    assert raised.value.where.endswith(key)


def test_a_key_that_is_not_set_is_named(check, monkeypatch):
    changes = vllm(mode="server", vllm={"api_key_env": "SERVER_KEY"})
    monkeypatch.delenv("SERVER_KEY", raising=False)
    with pytest.raises(EngineError, match="SERVER_KEY is not set"):
        check_engine(*check(changes))
    monkeypatch.setenv("SERVER_KEY", "k")
    check_engine(*check(changes))


def test_a_missing_vllm_is_said_before_anything_is_loaded(check, monkeypatch):
    real = importlib.import_module

    def without(name, *arguments):
        if name == "vllm":
            raise ModuleNotFoundError(name="vllm")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(StackError, match="missing extra 'vllm'") as raised:
        check_engine(*check(vllm()))
    assert "make install-vllm" in raised.value.hint
    check_engine(*check({}))


def test_only_a_loss_that_is_linear_in_the_advantages_says_so(load):
    exponential = load({"name": "rec", "clip": "none", "weight": "advantage"}, {})
    assert not METHODS["rec"](exponential.method).linear_in_advantages
    assert METHODS["rec"](load({"name": "rec"}, {}).method).linear_in_advantages
