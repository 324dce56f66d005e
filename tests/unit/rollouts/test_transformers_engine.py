"""The engine against the model's own forward pass and against transformers' generate."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from posttrain.errors import EngineError
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine

SHAPE = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral with a sliding window": MistralConfig(**SHAPE, sliding_window=8),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [5, 6, 7, 8], [20, 21]]


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # far from uniform, so that choices matter
    return model.eval()


def engine(model, max_batch=64, stop_ids=(2, 3)):
    return TransformersEngine(model, stop_ids=stop_ids, pad_id=0, max_batch=max_batch)


def flat(results):
    return [completion for group in results for completion in group]


def test_log_probs_are_those_of_a_plain_forward_pass(model):
    sampling = Sampling(n=3, max_new_tokens=24, temperature=0.7, seed=5)
    for prompt, group in zip(PROMPTS, engine(model).generate(PROMPTS, sampling), strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion.ids])
            with torch.no_grad():
                logps = (model(ids).logits / 0.7).log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = logps.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("max_batch", [1, 2, 4, 7])
def test_draws_do_not_depend_on_the_batch(model, max_batch):
    sampling = Sampling(n=3, max_new_tokens=16, seed=1)
    expected = flat(engine(model).generate(PROMPTS, sampling))
    found = flat(engine(model, max_batch).generate(PROMPTS, sampling))
    assert [c.ids for c in found] == [c.ids for c in expected]


def test_a_share_of_the_prompts_samples_what_the_whole_would(model):
    whole = engine(model).generate(PROMPTS, Sampling(n=2, max_new_tokens=12, seed=4))
    share = engine(model).generate(PROMPTS[2:], Sampling(n=2, max_new_tokens=12, seed=4, first_prompt=2))
    assert [c.ids for c in flat(share)] == [c.ids for c in flat(whole[2:])]


def test_samples_of_a_prompt_differ_and_seeds_matter(model):
    first = engine(model).generate([PROMPTS[0]], Sampling(n=8, max_new_tokens=12, seed=1))[0]
    assert len({tuple(c.ids) for c in first}) > 1
    second = engine(model).generate([PROMPTS[0]], Sampling(n=8, max_new_tokens=12, seed=2))[0]
    assert [c.ids for c in first] != [c.ids for c in second]


def test_greedy_is_that_of_transformers_generate(model):
    results = engine(model).generate(PROMPTS, Sampling(max_new_tokens=20, greedy=True))
    for prompt, (completion,) in zip(PROMPTS, results, strict=True):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[2, 3], pad_token_id=0
        )
        assert output[0, len(prompt) :].tolist() == completion.ids


def test_stop_tokens_end_a_completion_and_are_part_of_it(model):
    completions = flat(engine(model).generate(PROMPTS, Sampling(n=16, max_new_tokens=30, seed=3)))
    finishes = {c.finish for c in completions}
    assert finishes == {"stop", "length"}
    for completion in completions:
        inner = completion.ids[:-1] if completion.finish == "stop" else completion.ids
        assert not {2, 3} & set(inner)
        assert (completion.ids[-1] in (2, 3)) == (completion.finish == "stop")
        assert completion.finish == "stop" or len(completion.ids) == 30
        assert len(completion.logps) == len(completion.ids)


def test_the_mode_of_the_model_is_restored_and_the_version_stamped(model):
    model.train()
    try:
        sampler = engine(model)
        sampler.sync(7)
        completion = sampler.generate([[5]], Sampling(max_new_tokens=2))[0][0]
        assert completion.policy_version == 7 and model.training
    finally:
        model.eval()


def test_sampling_leaves_the_global_generators_alone(model):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    engine(model).generate([[5]], Sampling(max_new_tokens=4))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("prompts", "word"), [([[5], []], "prompt 1 is empty"), ([[5] * 90], "exceeds the model's 96")]
)
def test_prompts_that_cannot_be_completed_are_refused(model, prompts, word):
    with pytest.raises(EngineError, match=word):
        engine(model).generate(prompts, Sampling(max_new_tokens=10))
