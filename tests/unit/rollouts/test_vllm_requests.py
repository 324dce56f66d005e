"""Requests of the vLLM engines: seeds, limits, and what counts as a stop."""

import pytest

from posttrain.errors import EngineError
from posttrain.rollouts.engine import Sampling, token_limits
from posttrain.rollouts.vllm_requests import check_request, completion, logprobs_mode, logps_hold, prompt_seed, request
from posttrain.rollouts.vllm_server import ServedVllm


def sample_seeds(sampling, prompts):
    """(number of the prompt, number of the completion) -> seed, as vLLM derives it within a request."""
    found = {}
    for index in range(prompts):
        for k in range(sampling.n):
            found[sampling.draw(index, k)] = prompt_seed(sampling, index) + k
    return found


def test_a_completion_has_the_same_seed_in_any_split_over_calls():
    whole = sample_seeds(Sampling(n=6, seed=3), prompts=5)
    parts = sample_seeds(Sampling(n=6, seed=3), prompts=2)
    parts |= sample_seeds(Sampling(n=6, seed=3, first_prompt=2), prompts=3)
    assert parts == whole
    later = sample_seeds(Sampling(n=2, seed=3, first_sample=4), prompts=5)
    assert later == {key: seed for key, seed in whole.items() if key[1] >= 4}
    picked = sample_seeds(Sampling(n=6, seed=3, prompt_numbers=(4, 1)), prompts=2)
    assert picked == {key: seed for key, seed in whole.items() if key[0] in (4, 1)}


def test_seeds_differ_and_fit_into_64_bits():
    seeds = [seed for s in range(20) for seed in sample_seeds(Sampling(n=4, seed=s), prompts=50).values()]
    assert len(set(seeds)) == len(seeds)
    assert len({seed & 0xFFFFFFFF for seed in seeds}) > 0.999 * len(seeds)  # a CPU generator takes the low half only
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_parameters_of_a_request():
    sampled = request(Sampling(n=3, max_new_tokens=9, temperature=0.7, seed=1), 0, [2, 5], 7)
    assert sampled | {"seed": 0} == {
        "max_tokens": 7,
        "logprobs": 0,
        "stop_token_ids": [2, 5],
        "ignore_eos": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 0,
        "n": 3,
    }
    greedy = request(Sampling(n=3, greedy=True, temperature=0.7), 0, [2], 7)
    assert (greedy["temperature"], greedy["n"]) == (0.0, 1)
    assert "seed" not in greedy and greedy["max_tokens"] == 7


@pytest.mark.parametrize(
    ("sampling", "mode", "holds"),
    [
        (Sampling(temperature=0.6), "processed_logprobs", True),
        (Sampling(top_p=0.9), "processed_logprobs", False),
        (Sampling(top_p=0.9), "raw_logprobs", True),
        (Sampling(temperature=0.6, top_k=5), "raw_logprobs", False),
        (Sampling(temperature=0.6), "raw_logprobs", False),
        (Sampling(temperature=0.6, top_p=0.9, greedy=True), "processed_logprobs", True),
    ],
)
def test_log_probs_are_kept_only_where_they_are_the_promised_ones(sampling, mode, holds):
    assert logps_hold(sampling, mode) is holds
    assert completion([4, 2], [-1.0, -2.0], [2], sampling, mode, 3).logps == ([-1.0, -2.0] if holds else [])


def test_the_mode_serves_the_recipe():
    assert logps_hold(Sampling(temperature=0.6), logprobs_mode(restricted=False))
    assert logps_hold(Sampling(top_p=0.5), logprobs_mode(restricted=True))


def test_only_the_stop_ids_finish_a_completion():
    finishes = [
        completion(ids, [0.0] * len(ids), [2], Sampling(), "processed_logprobs", 1).finish for ids in ([4, 2], [4, 3])
    ]
    assert finishes == ["stop", "length"]


@pytest.mark.parametrize(
    ("prompts", "sampling", "says"),
    [
        ([[1], []], Sampling(max_new_tokens=4), "prompt 1 is empty"),
        ([[1] * 13], Sampling(max_new_tokens=4), r"prompt 0 has 13 tokens; with 4 new ones it exceeds .* 16 positions"),
        ([[1]], Sampling(max_new_tokens=4, beams=2), "no beam search"),
    ],
)
def test_requests_that_cannot_be_served(prompts, sampling, says):
    with pytest.raises(EngineError, match=says):
        check_request(prompts, sampling, 16, token_limits(prompts, sampling, None))


def test_a_prompt_that_just_fits_is_served():
    check_request([[1] * 12], Sampling(max_new_tokens=4), 16, [4])


def test_each_prompt_is_held_to_its_own_limit():
    sampling = Sampling(max_new_tokens=8)
    check_request([[1] * 12, [1] * 8], sampling, 16, [4, 8])
    with pytest.raises(EngineError, match="prompt 1 has 12 tokens; with 5 new ones it exceeds"):
        check_request([[1], [1] * 12], sampling, 16, [8, 5])


class Answers:
    """A server that says which limits it was asked for."""

    def __init__(self):
        self.limits = {}

    def post(self, path, body, **_):
        self.limits[tuple(body["prompt"])] = body["max_tokens"]
        ids = [4] * body["max_tokens"]
        return {"choices": [{"index": 0, "token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}}]}


def test_a_served_engine_asks_for_each_prompts_own_limit(monkeypatch):
    monkeypatch.setattr(ServedVllm, "__init__", lambda self: None)
    monkeypatch.setattr(ServedVllm, "_check_held", lambda *_: None)
    monkeypatch.setattr(ServedVllm, "_model", {})
    engine = ServedVllm()
    engine.client, engine.policy_version, engine.max_length, engine.timeout = Answers(), 1, 16, 9.0
    engine.stop_ids, engine.mode, engine.max_batch = [2], "processed_logprobs", 8
    found = engine.generate([[1], [1] * 12, [3]], Sampling(max_new_tokens=6), [6, 4, 2])
    assert engine.client.limits == {(1,): 6, (1,) * 12: 4, (3,): 2}
    assert [(len(one.ids), one.finish) for (one,) in found] == [(6, "length"), (4, "length"), (2, "length")]
    with pytest.raises(EngineError, match="prompt 0 has 12 tokens; with 6 new ones"):
        engine.generate([[1] * 12], Sampling(max_new_tokens=6))
