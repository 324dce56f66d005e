"""Before a model scores, its fastest way that is right is found; what is wrong in one way is computed in another."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from posttrain.errors import ModelError
from posttrain.models import attention, proof, scored_head, token_logps
from posttrain.models.proof import prove_scoring
from posttrain.models.value import Critic, attach, value_model
from posttrain.models.value_proof import prove_classifier
from posttrain.objectives.next_token import reverse_kl

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 30, 31, 0, 0], [13, 14, 15, 16, 17, 0, 0, 0]])
ATTENDING = (IDS != 0).long()
MASK = ATTENDING * torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    monkeypatch.setattr(proof, "_known", {})


def sharp(model):
    """Random weights as they are made give distributions that are all alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def own_logits(model):
    """(N, V) logits of the scored places by the model's own forward, every row alone."""
    found = []
    for row, real, scored in zip(IDS, ATTENDING.sum(1), MASK, strict=True):
        logits = model(input_ids=row[None, :real], attention_mask=ATTENDING[:1, :real], use_cache=False).logits[0]
        found.append(logits[scored.nonzero().squeeze(1) - 1])
    return torch.cat(found)


def own_logps(model):
    return own_logits(model).log_softmax(-1).gather(-1, IDS[MASK.bool()][:, None]).squeeze(-1)


def gradients(model, logps):
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    found = torch.autograd.grad((logps * weights).sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


# What stands between hidden states and logits: a cap of another name, a layer before the head, a factor in the forward.
BETWEEN = {"recurrent_gemma": {"logits_soft_cap": 0.2}, "modernbert-decoder": {}, "inkling_text": {}}


@pytest.mark.parametrize("model_type", BETWEEN)
def test_what_stands_between_hidden_states_and_logits_counts(small_causal, model_type):
    model = sharp(small_causal.build(model_type, **BETWEEN[model_type]))
    plain = copy.deepcopy(model)
    assert prove_scoring(model).way == "logits"
    token_logps.prepare(model)
    found = token_logps.token_logps(model, IDS, ATTENDING, MASK.float()).logps[MASK.bool()]
    expected = own_logps(plain)
    # Some layers compute in float32 whatever the model's dtype.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for own, other in zip(gradients(plain, expected), gradients(model, found), strict=True):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-4)
    by_head_alone = scored_head.score(
        copy.deepcopy(plain.get_output_embeddings()),
        plain.base_model(input_ids=IDS, attention_mask=ATTENDING, use_cache=False).last_hidden_state[:, :-1][
            MASK[:, 1:].bool()
        ],
        IDS[MASK.bool()],
        scored_head.LogitMap(),
        entropy=False,
        top1=False,
    ).logps
    assert (by_head_alone - expected).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["llama4", "mllama", "gemma3", "qwen3_5"])
def test_text_models_of_wrappers_have_a_trunk(small_causal, model_type):
    model = sharp(small_causal.build(model_type))
    plain = copy.deepcopy(model)
    assert prove_scoring(model).way == "rows"
    token_logps.prepare(model)
    found = token_logps.token_logps(model, IDS, ATTENDING, MASK.float()).logps[MASK.bool()]
    torch.testing.assert_close(found, own_logps(plain), rtol=1e-5, atol=1e-5)


class Halved(LlamaForCausalLM):
    """A Llama whose forward does something that no field of its config speaks of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def llama(kind=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return sharp(kind(LlamaConfig(**sizes, **heads, **changes)).eval())


def test_a_forward_that_no_config_speaks_of_is_found_out():
    model = llama(Halved)
    plain = copy.deepcopy(model)
    assert token_logps.prepare(model) is False
    found = token_logps.token_logps(model, IDS, ATTENDING, MASK.float()).logps[MASK.bool()]
    torch.testing.assert_close(found, own_logps(plain))
    assert "log-probs differ" in prove_scoring(model).why


def test_attention_that_does_not_follow_a_layout_is_found_out(monkeypatch):
    assert prove_scoring(llama()).way == "packed"
    monkeypatch.setattr(proof, "_known", {})
    monkeypatch.setattr(attention, "flash_is_usable", lambda: True)
    real = attention._Merged.apply
    monkeypatch.setattr(attention._Merged, "apply", lambda *arguments: real(*arguments) * 1.01)
    found = prove_scoring(llama())
    assert found.way == "rows" and "with them, log-probs differ" in found.why


def test_gradients_are_compared_too(monkeypatch):
    real = scored_head._TiledHead.backward

    def wrong(ctx, *upstream):
        hidden, *others = real(ctx, *upstream)
        return hidden * 1.001, *others

    monkeypatch.setattr(scored_head._TiledHead, "backward", staticmethod(wrong))
    found = prove_scoring(llama())
    assert found.way == "logits" and "gradients differ" in found.why


def test_a_model_that_reads_ahead_is_refused(small_causal):
    with pytest.raises(ModelError, match="reads tokens behind the one that it predicts") as error:
        prove_scoring(sharp(small_causal.build("bert", is_decoder=False)))
    assert "is_decoder" in error.value.hint
    assert prove_scoring(sharp(small_causal.build("bert"))).way == "logits"  # a layer stands before its head


def test_a_model_that_needs_more_than_tokens_is_refused(small_causal):
    model = small_causal.build("xmod", default_language=None)
    with pytest.raises(ModelError, match="cannot be called with token ids alone: ValueError"):
        prove_scoring(model)


def test_a_proof_changes_nothing_that_a_run_computes():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prove_scoring(model, [[7, 8, 9] * 30])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rows_of_the_run_are_read(monkeypatch):
    model, rows = llama(), [[9, 9, 8], list(range(10, 40)), list(range(10, 47))]
    first, second, third = proof.trial_rows(model, rows)
    assert first == [9, 9, 8, *range(10, 23)] and second[:8] == first[:8] and len(third) == 9
    assert {*second, *third} <= set(sum(rows, []))
    assert all(0 <= token < 48 for row in proof.trial_rows(model, None) for token in row)


def test_a_copy_is_not_asked_again_and_another_attention_is(monkeypatch):
    model = llama()
    prove_scoring(model)
    monkeypatch.setattr(proof, "_prove", lambda *_: pytest.fail("asked again"))
    assert prove_scoring(copy.deepcopy(model)).way == "packed" == prove_scoring(llama()).way
    monkeypatch.undo()
    model.set_attn_implementation("eager")
    assert prove_scoring(model).way == "rows"


@pytest.fixture
def whole_logits():
    """A model that is scored by its own logits, and the logits of the scored places."""
    model = llama(Halved)
    logits = own_logits(copy.deepcopy(model)).detach()
    return model, logits


def test_everything_that_is_asked_of_log_probs_is_asked_of_whole_logits(whole_logits):
    model, logits = whole_logits
    token_logps.prepare(model, temperature=0.7)
    logps = (logits / 0.7).log_softmax(-1)
    scores = token_logps.token_logps(model, IDS, ATTENDING, MASK.float(), entropy=True, top1=True)
    targets = IDS[MASK.bool()]
    torch.testing.assert_close(scores.entropies[MASK.bool()], -(logps.exp() * logps).sum(-1))
    assert torch.equal(scores.top1[MASK.bool()], (logps.argmax(-1) == targets).to(logps.dtype))
    states = token_logps.token_states(model, IDS, ATTENDING, MASK.float())
    torch.testing.assert_close(states.logps(states.hidden[MASK.bool()]), logps)
    other = llama()
    token_logps.prepare(other)
    _, _, kl = token_logps.token_logps_and_divergence(other, IDS, ATTENDING, MASK.float(), states, reverse_kl)
    theirs = own_logits(llama()).log_softmax(-1)
    torch.testing.assert_close(kl[MASK.bool()], (theirs.exp() * (theirs - logps)).sum(-1))


@pytest.mark.parametrize("separate", [True, False])
def test_values_beside_whole_logits(whole_logits, separate):
    model, _ = whole_logits
    classifier = value_model(model, pad_token_id=0)
    torch.nn.init.normal_(classifier.score.weight)
    critic = Critic(copy.deepcopy(classifier), separate=separate)
    token_logps.prepare(model)
    attach(model, critic)
    scores, values = token_logps.token_logps_and_values(model, IDS, ATTENDING, MASK.float())
    hidden = classifier.base_model(input_ids=IDS, attention_mask=ATTENDING).last_hidden_state
    expected = torch.nn.functional.pad(classifier.score(hidden).squeeze(-1)[:, :-1], (1, 0)) * MASK
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(token_logps.token_values(model, IDS, ATTENDING, MASK.float()), expected)


def test_a_critic_whose_head_reads_something_else_is_refused():
    classifier = value_model(llama(), pad_token_id=0)
    classifier.score.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1.01,))
    with pytest.raises(ModelError, match="reads something else than the last hidden states"):
        Critic(classifier, separate=True)


def test_a_classifier_scores_padded_rows_as_alone():
    classifier = AutoModelForSequenceClassification.from_config(llama().config, dtype=torch.float32).eval()
    prove_classifier(classifier, [[5, 6, 7], [0, 8, 9, 10]])
    classifier.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None, "input_ids": kwargs["input_ids"].flip(1)}),
        with_kwargs=True,
    )
    with pytest.raises(ModelError, match="score a padded row otherwise than alone"):
        prove_classifier(classifier, [[5, 6, 7], [8, 9, 10, 11]])


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_are_chosen_token_by_token_so_prompts_can_be_shared(small_causal, model_type):
    assert prove_scoring(sharp(small_causal.build(model_type))).way == "packed"
