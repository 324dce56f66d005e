"""Models with other states than a cache of keys and values are sampled from in the fastest way that is right."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from posttrain.errors import ModelError
from posttrain.rollouts import texts
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.texts import sampling_way
from posttrain.rollouts.transformers_engine import TransformersEngine

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [5, 6, 7, 8, 9, 20, 21], [30]]
# Linear attention, state spaces, convolutions, gated recurrences, and caches that only fit texts of equal length.
STATES = {
    "qwen3_5_text": "padded",
    "qwen3_next": "padded",
    "mamba": "padded",
    "mamba2": "padded",
    "lfm2": "padded",
    "jamba": "padded",
    "bart": "equal",
    "recurrent_gemma": "whole",
    "rwkv": "whole",
}


def sharp(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def engine(model, **sizes):
    return TransformersEngine(model, stop_ids=[2], pad_id=0, **{"max_batch": 16} | sizes)


@torch.no_grad()
def own(model, ids):
    """Log-probs (V,) of what follows, by the model's own forward."""
    row = torch.tensor([ids])
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -1]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("model_type", STATES)
def test_completions_are_those_of_the_models_own_forward(small_causal, model_type):
    model = sharp(small_causal.build(model_type))
    sampling = Sampling(n=3, max_new_tokens=5, temperature=1.0, seed=3)
    made = engine(model)
    found = made.generate(PROMPTS, sampling)
    assert made._way == STATES[model_type]
    for prompt, group in zip(PROMPTS, found, strict=True):
        for completion in group:
            for place, (token, logp) in enumerate(zip(completion.ids, completion.logps, strict=True)):
                assert float(own(model, prompt + completion.ids[:place])[token]) == pytest.approx(logp, abs=1e-4)
    # A draw depends on its seed, prompt, completion and place alone, however the batches are cut.
    again = engine(model, max_batch=2).generate(PROMPTS, sampling)
    assert [[c.ids for c in group] for group in again] == [[c.ids for c in group] for group in found]
    greedy = made.generate(PROMPTS, Sampling(n=1, max_new_tokens=4, greedy=True, seed=0))
    for prompt, (completion,) in zip(PROMPTS, greedy, strict=True):
        ids = list(prompt)
        for token in completion.ids:
            assert token == int(own(model, ids).argmax())
            ids.append(token)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "bart", "rwkv"])
def test_beams_and_training_mode(small_causal, model_type):
    model = sharp(small_causal.build(model_type)).train()
    sampling = Sampling(n=2, max_new_tokens=4, temperature=1.0, seed=0, beams=3)
    found = engine(model).generate(PROMPTS[:2], sampling)
    assert model.training
    model.eval()
    for prompt, group in zip(PROMPTS, found, strict=False):
        for beam in group:
            expected = [float(own(model, prompt + beam.ids[:n])[token]) for n, token in enumerate(beam.ids)]
            assert beam.logps == pytest.approx(expected, abs=1e-4)


def test_the_slower_ways_are_said_once(small_causal, caplog):
    texts._say.cache_clear()
    texts._known.clear()
    for model_type in ("bart", "bart", "rwkv", "llama"):
        texts.sampling_way(small_causal.build(model_type), 0)
        texts._known.clear()
    said = [record.message for record in caplog.records if record.name == texts.__name__]
    assert len(said) == 2 and "equal length" in said[0] and "'rwkv'" in said[1]


def test_a_model_without_any_right_way_is_refused(small_causal):
    with pytest.raises(ModelError, match="cannot be sampled from"):
        sampling_way(small_causal.build("xlnet"), 0)


def test_asking_draws_nothing_and_leaves_the_model_as_it_was(small_causal):
    model, state = small_causal.build("qwen3_5_text").train(), torch.get_rng_state()
    texts._known.clear()
    assert sampling_way(model, 0) == "padded"
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_trainers_autocast_is_no_difference_between_the_ways(small_causal):
    model = small_causal.build("llama")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        texts._known.clear()
        casting = model.forward
        assert sampling_way(model, 0) == "padded"
        assert model.forward is casting
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
