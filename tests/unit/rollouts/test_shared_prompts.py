"""Prompts that begin alike: which parts are read once, and that nothing else changes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from posttrain.models import sharing
from posttrain.models.shared_prefix import Costs
from posttrain.rollouts import shared_prompts
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.shared_prompts import PromptPart, plan, plan_for, read, reading_order, tokens_read
from posttrain.rollouts.transformers_engine import TransformersEngine

TOKENS_ONLY = Costs(token=1.0, pair=0.0, call=0.0, merge=0.0)

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
    "gpt2": GPT2Config(
        vocab_size=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gemma3, window wide enough": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=64),
}

PROBLEM, OTHER = list(range(5, 17)), list(range(20, 35))
TRACE, DETOUR = [30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7]
PROMPTS = [
    PROBLEM + TRACE[:3],
    PROBLEM,
    PROBLEM + DETOUR,
    OTHER,
    PROBLEM + TRACE,
    PROBLEM + DETOUR[:9],
    [7, 8],
    PROBLEM + TRACE[:3],
]
COMPUTED = len(PROBLEM + DETOUR) + len(TRACE) + len(OTHER) + 2 + 4  # the last token of each that is contained


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # far from uniform, so that choices matter
    return model.eval()


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


def passes_cost(monkeypatch, flops):
    monkeypatch.setattr(shared_prompts, "PASS_FLOPS", {"cpu": flops, "cuda": flops})


NOTHING, EVERYTHING = 0.0, 1e30
"""Costs of a pass with which all that can be shared is, and nothing is."""


# --------------------------------------------------------------------------------------------------------------- plans


def test_prompts_that_contain_each_other_are_read_as_the_longest_of_them():
    prompts = [list(range(n)) for n in (20, 40, 30)]
    assert plan(prompts, TOKENS_ONLY, 1.0) == ((PromptPart(1),), (PromptPart(2, 1, 29), PromptPart(0, 1, 19)))


def test_branches_of_branches_go_on_from_the_nearest():
    header, problem = [1] * 16, [2] * 16
    prompts = [header + [3] * 40, header + problem + [4] * 20, header + problem + [5] * 20]
    found = plan(prompts, TOKENS_ONLY, 1.0)
    assert found == ((PromptPart(0),), (PromptPart(1, 0, 16),), (PromptPart(2, 1, 32),))
    assert tokens_read(found, prompts) == 56 + 36 + 20


@pytest.mark.parametrize(("shared", "passes"), [(7, 1), (9, 2)])
def test_very_short_beginnings_are_read_again(shared, passes):
    prompts = [[1] * shared + [3] * 30, [1] * shared + [4] * 30]
    assert len(plan(prompts, TOKENS_ONLY, 1.0)) == passes


@pytest.mark.parametrize(("each_pass", "passes"), [(39.0, 2), (41.0, 1)])
def test_a_pass_more_has_to_pay(each_pass, passes):
    prompts = [[1] * 40 + [3] * 10, [1] * 40 + [4] * 10]  # 40 tokens are saved
    assert len(plan(prompts, TOKENS_ONLY, each_pass)) == passes


def test_a_short_rest_is_not_padded_to_a_long_one():
    prompts = [[1] * 50, [1] * 20 + [2] * 29, [1] * 21 + [3] * 9, [1] * 20 + [4] * 8]
    sizes = [[part.prompt for part in parts] for parts in plan(prompts, TOKENS_ONLY, 5.0)]
    assert sizes == [[0], [1], [2, 3]]


def test_what_does_not_fit_into_a_window_is_not_shared():
    prompts = [[1] * 40 + [3] * 10, [1] * 40 + [4] * 10]
    assert len(plan(prompts, TOKENS_ONLY, 1.0, widest=50)) == 2
    assert len(plan(prompts, TOKENS_ONLY, 1.0, widest=49)) == 1


def test_models_that_forget_or_are_not_tested_read_every_prompt_whole(llama, monkeypatch):
    passes_cost(monkeypatch, NOTHING)
    narrow = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=8))
    assert len(plan_for(narrow, PROMPTS)) == 1
    assert len(plan_for(llama, PROMPTS)) > 2
    monkeypatch.setattr(sharing, "SHAREABLE", frozenset())
    assert len(plan_for(llama, PROMPTS)) == 1


def test_prompts_that_begin_alike_stand_together_where_that_saves_more_than_padding_costs(llama, monkeypatch):
    passes_cost(monkeypatch, NOTHING)
    a, b = [1] * 30, [2] * 30
    prompts = [a + [5], b + [5], a + [6, 6], b + [6, 6]]
    assert reading_order(llama, prompts, 2, 8) == [0, 2, 1, 3]
    assert reading_order(llama, prompts, 4, 8) == [0, 1, 2, 3]  # one batch either way: by length
    passes_cost(monkeypatch, EVERYTHING)
    assert reading_order(llama, prompts, 2, 8) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- reading


def test_logits_and_caches_are_those_of_prompts_read_whole(model, monkeypatch):
    passes_cost(monkeypatch, NOTHING)
    assert len(plan_for(model, PROMPTS)) > 2
    with torch.no_grad():
        logits, cache, attention = read(model, PROMPTS, 0)
        passes_cost(monkeypatch, EVERYTHING)
        expected, whole, mask = read(model, PROMPTS, 0)
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(attention, mask)
    real = mask.bool()
    for found, wanted in zip(cache.layers, whole.layers, strict=True):
        for name in ("keys", "values"):
            one, other = (getattr(layer, name).transpose(1, 2)[real] for layer in (found, wanted))
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("max_batch", [64, 8, 2])
@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=16, greedy=True), Sampling(3, 16, seed=3)])
def test_completions_are_those_without_sharing(model, sampling, max_batch, monkeypatch):
    engine = TransformersEngine(model, stop_ids=[2, 3], pad_id=0, max_batch=max_batch)
    passes_cost(monkeypatch, EVERYTHING)
    expected = engine.generate(PROMPTS, sampling)
    assert engine.read_tokens(PROMPTS, sampling) == sum(map(len, PROMPTS)) * (2 if sampling.n > max_batch else 1)
    passes_cost(monkeypatch, NOTHING)
    found = engine.generate(PROMPTS, sampling)
    for group, wanted in zip(found, expected, strict=True):
        assert [c.ids for c in group] == [c.ids for c in wanted]
        for one, other in zip(group, wanted, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-6)  # kept in float32


@pytest.mark.parametrize(("max_batch", "beams"), [(64, 1), (64, 4), (16, 1), (16, 4), (4, 1), (2, 1)])
def test_the_tokens_that_are_charged_are_those_that_the_model_reads(llama, max_batch, beams, monkeypatch):
    passes_cost(monkeypatch, NOTHING)
    read_by_model = 0

    def count(module, arguments, named):
        nonlocal read_by_model
        ids = named["input_ids"]
        read_by_model += int(named["attention_mask"][:, -ids.size(1) :].sum())

    engine = TransformersEngine(llama, stop_ids=[2, 3], pad_id=0, max_batch=max_batch)
    sampling = Sampling(n=4, max_new_tokens=1, seed=1, beams=beams)
    with llama.register_forward_pre_hook(count, with_kwargs=True):
        engine.generate(PROMPTS, sampling)
    assert engine.read_tokens(PROMPTS, sampling) == read_by_model
    if max_batch == 64:
        assert read_by_model == COMPUTED
