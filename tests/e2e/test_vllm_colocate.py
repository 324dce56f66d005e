"""The colocated engine: a real vLLM in this process, against the trainer's own forward pass."""

import dataclasses
import importlib.util
import json
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from posttrain.errors import EngineError
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_engine import ColocatedVllm, default_kv_cache
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit
from posttrain.trainers.run import train

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (docs/vllm.md)"),
]

PROMPTS = [[1, *(4 + (7 * i + 3 * j) % 14 for j in range(3 + i % 5))] for i in range(8)]
STOP = 2


def policy(folder, *, tied=True, dtype=torch.float32, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=adapter, task_type="CAUSAL_LM"))
    return model


def start(model, max_length=64, max_batch=32, **settings):
    weights = PolicyWeights(model, Accelerator(cpu=True))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    limit = canary_limit(None, trainer_float32=weights.computes_in_float32, engine_dtype=dtype)
    canary = Canary(PROMPTS, STOP, limit)
    return ColocatedVllm(
        weights, canary, stop_ids=[STOP], dtype=dtype, max_length=max_length, max_batch=max_batch, **settings
    )


def disturb(model, size=0.05):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


def logps(model, prompt, ids, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0].float() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


def differences(model, prompts, found, temperature=1.0):
    """Of each sampled token, in nats."""
    return torch.cat(
        [
            (logps(model, prompt, completion.ids, temperature) - torch.tensor(completion.logps)).abs()
            for prompt, group in zip(prompts, found, strict=True)
            for completion in group
        ]
    )


def largest_difference(model, found, temperature=1.0):
    return differences(model, PROMPTS, found, temperature).max().item()


def ids(found):
    return [[completion.ids for completion in group] for group in found]


# One engine at a time in a process: those of these tests end before the one that the tests below share begins.


EXACT, ROUNDED = (3e-7, 2e-6), (6e-3, 3e-2)
"""Mean and largest difference of engine and trainer, in nats, in float32 and in bfloat16."""


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({}, EXACT),
        ({"tied": False}, EXACT),
        ({"adapter": "all-linear"}, EXACT),
        ({"tied": False, "adapter": ["q_proj", "embed_tokens"]}, EXACT),
        ({"dtype": torch.bfloat16}, ROUNDED),
    ],
    ids=["tied", "untied", "lora", "lora on untied embeddings", "bfloat16"],
)
def test_every_kind_of_model_is_synced(vllm_model, settings, limits):
    torch.manual_seed(1)
    model = policy(vllm_model, **settings)
    engine = start(model)
    try:
        engine.sync(0)
        disturb(model)
        before = [parameter.clone() for parameter in model.parameters()]
        mean, most = limits
        assert engine.sync(1)["canary_logp_diff_max"] <= most
        found = differences(model, PROMPTS, engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=12, seed=6)))
        assert found.max() <= most and found.mean() <= mean
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    finally:
        engine.close()


SIZES = {"mixtral": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}}
SIZES["qwen3_moe"] = {"hidden_size": 64, "head_dim": 32}


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("mixtral", {}), ("qwen3_moe", {"moe_intermediate_size": 32}), ("qwen3_moe", {"moe_intermediate_size": 24})],
    ids=["names of their own", "sizes that are packed", "sizes that are padded"],
)
def test_experts_are_synced(small_causal, model_type, sizes):
    model = small_causal.build(model_type, vocab_size=20, eos_token_id=STOP, **SIZES[model_type], **sizes)
    model.config.architectures = [type(model).__name__]
    engine = start(model)
    try:
        for version in range(3):
            assert engine.sync(version)["canary_logp_diff_max"] <= EXACT[1]
            found = differences(model, PROMPTS, engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=12, seed=6)))
            assert found.max() <= EXACT[1]
            disturb(model)
    finally:
        engine.close()


def test_cached_prefixes_are_used_and_forgotten_with_the_weights(monkeypatch):
    """vLLM caches blocks of 128 tokens."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**settings, vocab_size=20, max_position_embeddings=320, eos_token_id=STOP))
    prompts, sampling = [PROMPTS[4] * 35], Sampling(max_new_tokens=12, seed=6)
    assert 256 < len(prompts[0]) < 300
    engine = start(model, max_length=320)
    read, generate = [], engine._llm.generate

    def noted(*arguments, **how):
        outputs = generate(*arguments, **how)
        read.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(engine._llm, "generate", noted)
    try:
        engine.sync(0)
        first = engine.generate(prompts, sampling)
        assert engine.generate(prompts, sampling) == first
        assert read[-2:] == [[0], [256]]
        disturb(model)
        engine.sync(1)
        assert differences(model, prompts, engine.generate(prompts, sampling)).max() < 1e-5
        assert read[-1] == [0]
        disturb(model)
        monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        engine.sync(2)
        assert differences(model, prompts, engine.generate(prompts, sampling)).max() > 1e-3  # what it would do else
    finally:
        engine.close()


def test_more_tokens_than_vllm_reads_at_once_change_no_draw(vllm_model):
    """128 completions whose prompts together exceed what vLLM reads in one pass (4,096 tokens)."""
    model = policy(vllm_model)
    prompts = [prompt * 10 for prompt in PROMPTS]
    sampling = Sampling(n=32, max_new_tokens=8, seed=4)
    assert sampling.n * sum(map(len, prompts)) > 2 * 4096
    engine = start(model, max_length=96, max_batch=256)
    try:
        engine.sync(0)
        found = engine.generate(prompts, sampling)
        assert differences(model, prompts, found).max() < EXACT[1]
        for number, prompt in enumerate(prompts):
            alone = engine.generate([prompt], dataclasses.replace(sampling, first_prompt=number))
            assert ids(alone) == [ids(found)[number]]
    finally:
        engine.close()


def test_a_cache_too_small_for_all_changes_no_draw(vllm_model):
    """vLLM puts sequences off, forgets what it read of them and reads it again, with what it drew so far."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**settings, vocab_size=20, max_position_embeddings=320, eos_token_id=STOP))
    prompts = [prompt * 40 for prompt in PROMPTS]
    prompts = [prompt[: 110 + number] for number, prompt in enumerate(prompts)]  # a block has 128 tokens
    sampling = Sampling(n=8, max_new_tokens=40, seed=4)
    found, put_off = {}, {}
    for name, sequences in (("roomy", 64), ("small", 5)):
        cache = default_kv_cache(model.config, "float32", 256, 1) // 2 * sequences
        engine = start(model, max_length=320, max_batch=64, kv_cache_bytes=cache)
        scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
        preempt, times = scheduler._preempt_request, []
        scheduler._preempt_request = lambda *a, preempt=preempt, times=times, **k: (times.append(1), preempt(*a, **k))
        try:
            engine.sync(0)
            found[name], put_off[name] = engine.generate(prompts, sampling), len(times)
            assert differences(model, prompts, found[name]).max() < 1e-5
        finally:
            engine.close()
    assert put_off["roomy"] == 0 < put_off["small"]
    assert ids(found["small"]) == ids(found["roomy"])


def test_with_top_p_log_probs_are_those_of_the_whole_distribution(vllm_model):
    engine = start(policy(vllm_model), restricted=True)
    try:
        engine.sync(0)
        found = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=12, top_p=0.7, seed=1))
        assert largest_difference(engine.weights.model, found) < 1e-5
        assert engine.generate(PROMPTS[:1], Sampling(max_new_tokens=4, top_p=0.7, temperature=0.5))[0][0].logps == []
    finally:
        engine.close()


def test_the_default_cache_follows_from_the_sequences():
    config = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    per_token = 3 * 2 * 2 * 16 * 4
    assert default_kv_cache(config, "float32", max_length=200, max_batch=10) == 10 * (256 + 128) * per_token
    assert default_kv_cache(config, "float32", max_length=200, max_batch=10**9) == 4 << 30
    assert default_kv_cache(config, "bfloat16", max_length=10**9, max_batch=1) > 4 << 30


# --------------------------------------------------------------------------------------------------------- whole runs


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_run_agrees_with_its_engine_and_resumes_exactly(load_vllm_recipe, tmp_path):
    changes = {"training.max_steps": 4, "training.save_steps": 2, "output": str(tmp_path / "run")}
    run = train(load_vllm_recipe({"name": "grpo"}, changes)).run_dir
    rows, expected = metrics(run), load_file(run / "model" / "model.safetensors")
    assert len(rows) == 4
    assert all(row["engine_logp_diff_max"] < 1e-5 and row["canary_logp_diff_max"] < 1e-5 for row in rows)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    train(load_vllm_recipe({"name": "grpo"}, changes), resume="auto")
    found = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [row["reward"] for row in metrics(run)] == [row["reward"] for row in rows]


def test_the_rounding_of_a_bfloat16_engine_is_logged_and_weighed(load_vllm_recipe, tmp_path):
    changes = {"rollouts.vllm": {"dtype": "bfloat16"}, "rollouts.importance_cap": 1.5, "training.max_steps": 2}
    run = train(load_vllm_recipe({"name": "grpo"}, {**changes, "output": str(tmp_path / "run")})).run_dir
    for row in metrics(run):
        assert 1e-5 < row["engine_logp_diff_max"] < 0.1
        assert 0 < abs(row["engine_weight_mean"] - 1) < 0.01
        assert row["engine_weight_capped_share"] == 0


def test_methods_with_samples_of_their_own_and_evaluation_use_it_too(load_vllm_recipe, tmp_path):
    benchmark = {
        "name": "sums",
        "data": {"task": "chain_sum", "levels": [2], "size": 4, "split": "test"},
        "verifier": [{"type": "procedural"}],
    }
    changes = {
        "evaluation": {"benchmarks": [benchmark], "every": 2, "samples": 2, "max_new_tokens": 6, "temperature": 0.7},
        "training.max_steps": 2,
        "output": str(tmp_path / "run"),
    }
    run = train(load_vllm_recipe({"name": "hypo"}, changes)).run_dir
    rows = metrics(run)
    assert all("canary_logp_diff_max" in row for row in rows)
    reports = sorted((run / "evaluation").glob("*.json"))
    assert [path.name for path in reports] == ["step-000000.json", "step-000002.json"]
    assert json.loads(reports[0].read_text())["engine"] == "ColocatedVllm"


# --------------------------------------------------------------------------------------------------- one shared engine


@pytest.fixture(scope="module")
def engine(vllm_model):
    torch.manual_seed(0)
    made = start(policy(vllm_model))
    disturb(made.weights.model, 0.1)  # far from uniform
    made.sync(0)
    yield made
    made.close()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_trainers(engine, temperature):
    found = engine.generate(PROMPTS, Sampling(n=3, max_new_tokens=20, temperature=temperature, seed=4))
    assert largest_difference(engine.weights.model, found, temperature) < 1e-5
    assert {len(group) for group in found} == {3}


def test_a_completion_depends_on_its_numbers_alone(engine):
    whole = ids(engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=12, seed=9)))
    assert ids(engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=12, seed=9))) == whole
    assert ids(engine.generate(PROMPTS[5:], Sampling(n=4, max_new_tokens=12, seed=9, first_prompt=5))) == whole[5:]
    later = ids(engine.generate(PROMPTS, Sampling(n=1, max_new_tokens=12, seed=9, first_sample=3)))
    assert later == [group[3:] for group in whole]
    backwards = Sampling(n=4, max_new_tokens=12, seed=9, prompt_numbers=tuple(range(7, -1, -1)))
    assert ids(engine.generate(PROMPTS[::-1], backwards)) == whole[::-1]
    assert ids(engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=12, seed=10))) != whole
    assert all(len({tuple(one) for one in group}) > 1 for group in whole)


def test_tokens_come_as_often_as_the_policy_says(engine):
    found = engine.generate(PROMPTS[:1], Sampling(n=4000, max_new_tokens=1, seed=1))
    counts = np.bincount([completion.ids[0] for completion in found[0]], minlength=18)
    with torch.no_grad():
        expected = engine.weights.model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1).double().numpy() * 4000
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 45  # chi-square, 17 degrees of freedom: above that with probability 2e-4


def test_only_the_stop_ids_end_a_completion(engine):
    found = [c for group in engine.generate(PROMPTS, Sampling(n=8, max_new_tokens=20, seed=2)) for c in group]
    assert {c.finish for c in found} == {"stop", "length"}
    for completion in found:
        stopped = completion.ids[-1] == STOP
        assert (completion.finish == "stop") == stopped
        assert STOP not in completion.ids[:-1]
        assert stopped or len(completion.ids) == 20


def test_each_prompt_has_its_own_limit_and_the_draws_stay(engine):
    sampling, limits = Sampling(n=4, max_new_tokens=12, seed=9), [12, 1, 5, 12, 3, 12, 8, 12]
    whole, cut = engine.generate(PROMPTS, sampling), engine.generate(PROMPTS, sampling, limits)
    for limit, every, some in zip(limits, ids(whole), cut, strict=True):
        assert [one.ids for one in some] == [tokens[:limit] for tokens in every]
        assert all((one.finish == "stop") == (one.ids[-1] == STOP) for one in some)
    (only,) = engine.generate([[1] * 60], sampling, [4])  # 64 positions
    assert max(len(one.ids) for one in only) <= 4


def test_greedy_is_that_of_the_transformers_engine(engine):
    reference = TransformersEngine(engine.weights.model, stop_ids=[STOP], pad_id=0, max_batch=32)
    sampling = Sampling(n=2, max_new_tokens=20, greedy=True)
    found, expected = engine.generate(PROMPTS, sampling), reference.generate(PROMPTS, sampling)
    assert ids(found) == ids(expected)
    assert largest_difference(engine.weights.model, found) < 1e-5


def test_a_prefix_is_continued_from_its_exact_ids(engine):
    sampling = Sampling(max_new_tokens=16, greedy=True)
    whole = [group[0].ids for group in engine.generate(PROMPTS, sampling)]
    prefixed = [prompt + answer[:5] for prompt, answer in zip(PROMPTS, whole, strict=True)]
    rest = engine.generate(prefixed, Sampling(max_new_tokens=11, greedy=True))
    for answer, group in zip(whole, rest, strict=True):
        if STOP not in answer[:5]:
            assert answer[:5] + group[0].ids == answer


def test_top_k_one_is_greedy_and_has_no_log_probs_here(engine):
    found = engine.generate(PROMPTS, Sampling(max_new_tokens=9, top_k=1, seed=3))
    assert ids(found) == ids(engine.generate(PROMPTS, Sampling(max_new_tokens=9, greedy=True)))
    assert all(completion.logps == [] for group in found for completion in group)


def test_the_trainers_random_numbers_and_threads_stay(engine):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(3), torch.get_num_threads()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    engine.sync(0)
    engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=6))
    assert (random.random(), np.random.random()) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])
    torch.set_num_threads(expected[3])
    assert torch.get_num_threads() == expected[3]


def test_new_weights_arrive_and_samples_carry_their_version(engine):
    sampling = Sampling(n=2, max_new_tokens=12, seed=6)
    disturb(engine.weights.model)
    stale = engine.generate(PROMPTS, sampling)
    assert largest_difference(engine.weights.model, stale) > 1e-3
    metrics = engine.sync(7)
    fresh = engine.generate(PROMPTS, sampling)
    assert largest_difference(engine.weights.model, fresh) < 1e-5
    assert {completion.policy_version for group in fresh for completion in group} == {7}
    assert metrics["canary_logp_diff_max"] < 1e-5
    assert metrics["sync_seconds"] > 0


def test_an_engine_that_sleeps_is_awake_whenever_it_is_used(engine, monkeypatch):
    """What can be seen on a CPU: the calls and their order; vLLM moves memory of GPUs only."""
    happened, generate = [], engine._llm.generate
    for name in ("sleep", "wake_up"):
        monkeypatch.setattr(
            engine._llm, name, lambda *a, name=name, **how: happened.append((name, *how.values())), raising=True
        )
    monkeypatch.setattr(engine._llm, "generate", lambda *a, **how: happened.append("used") or generate(*a, **how))
    monkeypatch.setattr(engine, "sleeps", True)
    engine.sync(9)
    assert happened == ["used"]
    sampling = Sampling(n=2, max_new_tokens=4, seed=6)
    found = engine.generate(PROMPTS, sampling)
    assert engine.generate(PROMPTS, sampling) == found
    assert happened == ["used", "used", ("sleep", 1), ("wake_up",), "used", ("sleep", 1)]
    engine.logps(PROMPTS)  # while it sleeps: so it does again
    assert happened[-3:] == [("wake_up",), "used", ("sleep", 1)]
    engine.sync(9)
    assert happened[-3:] == [("sleep", 1), ("wake_up",), "used"]


def test_wrong_weights_are_noticed(engine, monkeypatch):
    right = engine.weights.named_tensors

    def wrong(**how):
        for name, tensor in right(**how):
            yield name, tensor + 0.01 if name.endswith("mlp.down_proj.weight") else tensor

    monkeypatch.setattr(engine.weights, "named_tensors", wrong)
    with pytest.raises(EngineError, match=r"weight sync 8: engine and trainer differ by up to .* canary tokens"):
        engine.sync(8)
    monkeypatch.undo()
    engine.sync(8)


def test_what_cannot_be_sampled_is_refused(engine):
    with pytest.raises(EngineError, match="exceeds the engine's 64 positions"):
        engine.generate([[1] * 60], Sampling(max_new_tokens=5))
    assert engine.positions == 64
