"""The transformers engine with a mask model beside the policy, and with a limit for each prompt."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from posttrain.errors import EngineError
from posttrain.objectives.action_mask import ActionMask, MaskRule, masked_logps, nucleus
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=96,
)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 8]]
RULE = MaskRule(top_p=0.5, min_tokens=2, update_interval=1)


def random_model(seed, config=CONFIG):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


def engine(model, max_batch=64):
    return TransformersEngine(model, stop_ids=(2, 3), pad_id=0, max_batch=max_batch)


def weights_of(model, other):
    @contextmanager
    def in_place():
        held = copy.deepcopy(model.state_dict())
        model.load_state_dict(other.state_dict())
        yield
        model.load_state_dict(held)

    return in_place


@pytest.mark.parametrize("max_batch", [64, 5])
def test_tokens_and_log_probs_are_those_of_the_masked_policy(max_batch):
    policy, other = random_model(0), random_model(1)
    mask = ActionMask(weights_of(policy, other), RULE, always=(2,))
    sampling = Sampling(n=3, max_new_tokens=12, temperature=0.8, seed=4)
    sampler = engine(policy, max_batch)
    with sampler.masked(mask):
        found = sampler.generate(PROMPTS, sampling)
    lengths = set()
    for prompt, group in zip(PROMPTS, found, strict=True):
        for completion in group:
            lengths.add(len(completion.ids))
            ids, tokens = torch.tensor([prompt + completion.ids]), torch.tensor(completion.ids)
            with torch.no_grad():
                ours, theirs = ((each(ids).logits[0, len(prompt) - 1 : -1] / 0.8) for each in (policy, other))
            allowed = nucleus(theirs, RULE.top_p, RULE.min_tokens)
            allowed[:, 2] = True
            assert allowed.gather(1, tokens[:, None]).all()
            assert not allowed.all()
            expected = masked_logps(ours, allowed).gather(1, tokens[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=2e-5, rtol=1e-4)
    assert len(lengths) > 1  # rows left the batch while others went on
    assert engine(policy).generate(PROMPTS, sampling) != found  # the mask is gone behind its block


def test_a_limit_for_each_prompt():
    model = random_model(0)
    sampling = Sampling(n=2, max_new_tokens=10, seed=4)
    free = engine(model).generate(PROMPTS, sampling)
    limits = [10, 1, 4, 7]
    found = engine(model).generate(PROMPTS, sampling, limits=limits)
    for group, whole, limit in zip(found, free, limits, strict=True):
        for completion, unlimited in zip(group, whole, strict=True):
            assert completion.ids == unlimited.ids[:limit]
            stops = unlimited.finish == "stop" and len(unlimited.ids) <= limit
            assert completion.finish == ("stop" if stops else "length")


def test_prompts_near_the_end_of_the_positions_stop_at_their_own_limit():
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    sampler = engine(random_model(0, config))
    found = sampler.generate([[5] * 11, [6] * 2], Sampling(max_new_tokens=10, seed=1), limits=[1, 10])
    assert len(found[0][0].ids) == 1
    with pytest.raises(EngineError, match="prompt 0 has 11 tokens; with 2 new ones"):
        sampler.generate([[5] * 11], Sampling(max_new_tokens=10), limits=[2])
