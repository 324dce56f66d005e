"""Router logits from our passes: those of real tokens, as often as rows hold them, with the model's own gradients."""

import copy

import pytest
import torch

from posttrain.errors import ModelError
from posttrain.models import shared_prefix, sharing, token_logps
from posttrain.models.router import collecting
from posttrain.models.router_proof import loss_of, prove_router_loss

TYPES = ["mixtral", "olmoe", "qwen3_moe"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 30, 31, 0, 0], [13, 14, 15, 16, 17, 0, 0, 0]])
LENGTHS = (8, 6, 5)
REAL = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long()
MASK = REAL.bool() & (torch.arange(8) >= 4)  # the first two rows share four tokens


def own(model):
    """The model's own loss of the tokens that something is predicted from."""
    before = REAL[:, :-1] * (torch.arange(7) < torch.tensor(LENGTHS)[:, None] - 1)
    return model(IDS[:, :-1], attention_mask=before, output_router_logits=True, use_cache=False).aux_loss


def gradients(model, loss):
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("way", ["shared", "packed", "rows", "logits"])
def test_loss_and_gradients_are_the_models_own(small_causal, model_type, way, monkeypatch):
    monkeypatch.setitem(shared_prefix.CALL_FLOPS, "cpu", 0.0 if way == "shared" else 1e12)
    monkeypatch.setattr(shared_prefix, "MERGE_FLOPS", 0)
    if way in ("rows", "logits"):
        monkeypatch.setattr(sharing, "SHAREABLE", frozenset())
    model = small_causal.build(model_type)
    plain = copy.deepcopy(model)
    if way == "logits":
        found = token_logps.prove_scoring(model)
        monkeypatch.setattr(token_logps, "prove_scoring", lambda _: type(found)("logits", "for this test"))
    token_logps.prepare(model)
    with collecting(gradient=True) as passes:
        token_logps.token_logps(model, IDS, REAL, MASK)
    computed = sum(len(each.weights) for each in passes)
    assert computed == {"shared": 4 + 3 + 1 + 4, "packed": 7 + 5 + 4, "rows": 3 * 7, "logits": 3 * 8}[way]
    assert sum(int(each.weights.sum()) for each in passes) == sum(LENGTHS) - len(LENGTHS)
    ours, theirs = loss_of(passes, 2), own(plain)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected, grads = gradients(plain, theirs), gradients(model, ours)
    assert grads.keys() >= expected.keys() and expected
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_gradient_checkpointing_computes_router_logits_again(small_causal):
    grads = []
    for checkpointing in (False, True):
        model = small_causal.build("mixtral")
        token_logps.prepare(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with collecting(gradient=True) as passes:
            token_logps.token_logps(model, IDS, REAL, MASK)
        grads.append(gradients(model, loss_of(passes, 2)))
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-8, msg=name)


def test_only_passes_that_are_meant_are_collected(small_causal):
    model = small_causal.build("mixtral")
    token_logps.prepare(model)
    with collecting(gradient=True) as passes, torch.no_grad():
        token_logps.token_logps(model, IDS, REAL, MASK)  # a reference
    assert passes == []
    with collecting(gradient=True) as passes:
        token_logps.token_logps(model, IDS, REAL, torch.zeros_like(MASK))
    assert sum(int(each.weights.sum()) for each in passes) == 0  # nothing scored, nothing counted
    token_logps.token_logps(model, IDS, REAL, MASK)
    assert len(passes) == 1


@pytest.mark.parametrize("model_type", TYPES)
def test_the_proof_accepts_these_types_and_no_dense_one(small_causal, model_type):
    model = small_causal.build(model_type)
    token_logps.prepare(model)
    prove_router_loss(model, [[5, 6, 7], [8, 9, 10, 11]])
    model.config.num_experts_per_tok = 1
    with pytest.raises(ModelError, match="another load-balancing loss"):
        prove_router_loss(model)
    dense = small_causal.build("llama")
    token_logps.prepare(dense)
    with pytest.raises(ModelError, match="'llama' give no load-balancing loss"):
        prove_router_loss(dense)
