"""Adapter sync with a real vLLM: only the adapter is sent, and what is sampled is the adapted policy's."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.errors import EngineError
from posttrain.rollouts.adapter_sync import AdapterWeights
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.vllm_client import VllmClient
from posttrain.rollouts.vllm_engine import ColocatedVllm
from posttrain.rollouts.vllm_server import ServedVllm
from posttrain.rollouts.weight_sync import Canary, PolicyWeights
from posttrain.trainers.run import train

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (docs/vllm.md)")

SERVERS = runpy.run_path(str(Path(__file__).with_name("test_vllm_server.py")))
Server, KEY, PROMPTS, STOP = (SERVERS[name] for name in ("Server", "KEY", "PROMPTS", "STOP"))
largest_difference = SERVERS["largest_difference"]
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LORA = {"model.peft": {"type": "lora", "r": 4}}
ADAPTER = {"rollouts.vllm": {"sync": "adapter"}}
LIMIT = 1e-5


@pytest.fixture(scope="module")
def server(vllm_model, tmp_path_factory):
    options = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *LINEAR]
    made = Server(vllm_model, tmp_path_factory.mktemp("server"), options=options).wait()
    yield made
    made.end()


def adapter(folder, targets="all-linear", r=4):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = get_peft_model(model, LoraConfig(r=r, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    return AdapterWeights(PolicyWeights(policy, Accelerator(cpu=True)))


def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def connect(server, adapter):
    client = VllmClient(server.url, api_key=KEY, reconnect=1.0)
    return ServedVllm(
        adapter.weights, PROMPTS, client=client, stop_ids=[STOP], max_batch=32, timeout=120.0, adapter=adapter
    )


def check(engine, monkeypatch):
    """Several syncs in turn: each sends an adapter, and the samples are the new policy's, not the one's before."""
    model, sent = engine.weights.model, []
    named_tensors = PolicyWeights.named_tensors
    monkeypatch.setattr(
        PolicyWeights, "named_tensors", lambda self, **how: sent.append(how) or named_tensors(self, **how)
    )
    before = None
    for version in range(3):
        disturb(model)
        assert engine.sync(version)["canary_logp_diff_max"] < LIMIT
        found = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=12, seed=6))
        assert largest_difference(model, found) < LIMIT
        assert {completion.policy_version for group in found for completion in group} == {version}
        assert found != before
        before = found
    return sent


def test_colocated_the_base_is_sent_once_and_then_the_adapter(vllm_model, monkeypatch):
    mine = adapter(vllm_model, ["q_proj", "v_proj", "down_proj"])
    canary = Canary(PROMPTS, STOP, 1e-4)
    engine = ColocatedVllm(
        mine.weights, canary, stop_ids=[STOP], dtype="float32", max_length=64, max_batch=32, adapter=mine
    )
    try:
        assert check(engine, monkeypatch) == [{"merged": False}]
    finally:
        engine.close()


@pytest.mark.serve
def test_served_only_the_adapter_is_sent(server, vllm_model, monkeypatch):
    assert check(connect(server, adapter(vllm_model)), monkeypatch) == []
    assert not list(Path("/dev/shm").glob("posttrain-weights-*"))


def test_adapters_whose_answers_are_lost_are_sent_again(server, vllm_model, monkeypatch):
    engine = connect(server, adapter(vllm_model))
    lost = SERVERS["lose_answers"](engine.client, monkeypatch)
    check(engine, monkeypatch)
    paths = [request.split()[0] for request in lost]
    assert paths.count("/v1/load_lora_adapter") == 3 and paths.count("/v1/unload_lora_adapter") == 2


def test_a_second_run_takes_the_server_over_and_the_first_notices(server, vllm_model):
    first, second = connect(server, adapter(vllm_model)), connect(server, adapter(vllm_model))
    first.sync(0)
    second.sync(0)
    with pytest.raises(EngineError, match="holds weights of another run"):
        first.generate(PROMPTS, Sampling(max_new_tokens=4))


def test_another_base_on_the_server_stops_the_run(server, vllm_model):
    mine = adapter(vllm_model)
    with torch.no_grad():
        mine.weights.policy.get_output_embeddings().weight += 0.05
    with pytest.raises(EngineError, match="weight sync 0: engine and trainer differ by up to"):
        connect(server, mine).sync(0)


def test_a_larger_rank_than_the_server_was_started_for_is_said_at_the_start(server, vllm_model):
    with pytest.raises(EngineError, match="start: .* takes no adapters of rank 12") as raised:
        connect(server, adapter(vllm_model, r=12))
    assert "--enable-lora --max-lora-rank 16 --lora-target-modules down_proj" in raised.value.hint


def test_runs_with_either_sync_train_the_same_model(server, load_vllm_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    served = {"url": server.url, "api_key_env": "SERVER_KEY", "sync": "adapter"}
    runs = {
        "merged": {},
        "colocated": ADAPTER,
        "served": {"rollouts.mode": "server", "rollouts.vllm": served},
    }
    found = {}
    for name, changes in runs.items():
        run = train(load_vllm_recipe({"name": "grpo"}, {**LORA, **changes, "output": str(tmp_path / name)})).run_dir
        found[name] = load_file(run / "model" / "model.safetensors"), (run / "samples.jsonl").read_text()
    for name in ("colocated", "served"):
        assert found[name][1] == found["merged"][1]
        for key, expected in found["merged"][0].items():
            assert (found[name][0][key] - expected).abs().max() < 1e-4
