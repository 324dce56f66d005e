"""The KL over the whole vocabulary from the scoring pass: equal to that of whole logits, value and gradient."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.models import token_logps
from posttrain.models.reference import Reference
from posttrain.objectives.next_token import generalised_jsd, on_support, reverse_kl
from posttrain.objectives.policy_gradient import kl_k3

VOCABULARY = 19


def model(seed, hidden=16):
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).double()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # far from uniform
    return made


def rows():
    """Two completions of one prompt, and a shorter row of another one."""
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[1, :4] = ids[0, :4]
    attention, mask = torch.ones_like(ids), torch.zeros(3, 9, dtype=torch.bool)
    mask[:, 4:] = 1
    attention[2, 7:], mask[2, 7:] = 0, False
    mask[0, 6] = 0  # somebody else's token
    return ids, attention, mask


def by_whole_logits(policy, reference, ids, attention, mask):
    own, other = (m(input_ids=ids, attention_mask=attention).logits.log_softmax(-1) for m in (policy, reference))
    kl = (own.exp() * (own - other.detach())).sum(-1)
    return torch.nn.functional.pad(kl[:, :-1], (1, 0)) * mask


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("tile", [None, 2], ids=["one tile", "many tiles"])
def test_it_equals_that_of_whole_logits(share, tile, monkeypatch):
    if not share:
        monkeypatch.setattr("posttrain.models.proof.sharing_obstacle", lambda model: "a test")
    if tile is not None:
        monkeypatch.setattr("posttrain.models.full_divergence.tile_rows", lambda *_: tile)
    policy, reference = model(0), model(1, hidden=32).requires_grad_(False)  # it need not be of the same size
    plain = copy.deepcopy(policy)
    expected = by_whole_logits(plain, copy.deepcopy(reference), *rows())
    token_logps.prepare(policy)
    token_logps.prepare(reference)
    states = Reference(reference).token_states(*rows())
    scores, values, kl = token_logps.token_logps_and_divergence(policy, *rows(), states, reverse_kl)
    assert values is None and expected.max() > 0.1
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores.logps, token_logps.token_logps(policy, *rows()).logps)
    weights = torch.rand(kl.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (kl * weights).sum().backward()
    (expected * weights).sum().backward()
    for found, own in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, own.grad, rtol=1e-8, atol=1e-10)


def jsd(logps, frozen_logps):
    return generalised_jsd(logps, frozen_logps, 0.3)


def likeliest(logps, frozen_logps):
    return reverse_kl(*on_support(logps, frozen_logps, 4, "policy", tail=True))


HEADS = {  # what is trained, and what keeps the head from being a plain product
    "kept": lambda policy: None,
    "frozen": lambda policy: policy.lm_head.requires_grad_(False),
    "head alone": lambda policy: policy.model.requires_grad_(False),
    "sharded": lambda policy: setattr(policy.lm_head.weight, "ds_id", 0),
}


@pytest.mark.parametrize("divergence", [reverse_kl, jsd, likeliest])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "computed again"])
def test_every_divergence_through_every_head(divergence, head, cached, monkeypatch):
    """A smaller vocabulary and a temperature included; weights other than 1 arrive from the loss."""
    monkeypatch.setattr("posttrain.models.full_divergence.tile_rows", lambda *_: 3)
    if not cached:
        monkeypatch.setattr("posttrain.models.scored_head.CACHE_BYTES", 0)
    policy, reference = model(0), model(1).requires_grad_(False)
    reference.resize_token_embeddings(VOCABULARY - 2)
    HEADS[head](policy)
    plain, weights = copy.deepcopy(policy), torch.rand(3, 9, generator=torch.Generator().manual_seed(2)).double()
    ids, attention, mask = rows()
    ids = ids.clamp(max=VOCABULARY - 3)
    found = []
    token_logps.prepare(policy, temperature=0.7)
    token_logps.prepare(reference)
    states = Reference(reference).token_states(ids, attention, mask)
    _, _, got = token_logps.token_logps_and_divergence(policy, ids, attention, mask, states, divergence)
    own = plain(input_ids=ids, attention_mask=attention).logits / 0.7
    other = reference(input_ids=ids, attention_mask=attention).logits
    shown = divergence(own[..., : VOCABULARY - 2].flatten(0, 1).log_softmax(-1), other.flatten(0, 1).log_softmax(-1))
    expected = torch.nn.functional.pad(shown.view(3, 9)[:, :-1], (1, 0)) * mask
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    for loss in (got, expected):
        (loss * weights).sum().backward()
    for name, parameter in policy.named_parameters():
        theirs = plain.get_parameter(name).grad
        assert (parameter.grad is None) == (theirs is None), name
        if theirs is not None:
            found.append(name)
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-8, atol=1e-10)
    assert found


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]], ids=["with its head", "without"])
def test_the_reference_may_be_the_policy_without_its_adapter(targets):
    base = model(0)
    start = copy.deepcopy(base)
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    policy.double()
    tuned = copy.deepcopy(policy)
    expected = by_whole_logits(tuned, start, *rows())
    token_logps.prepare(base)
    states = Reference(policy, policy.disable_adapter).token_states(*rows())
    _, _, kl = token_logps.token_logps_and_divergence(policy, *rows(), states, reverse_kl)
    assert expected.max() > 1e-5
    torch.testing.assert_close(kl, expected, rtol=1e-8, atol=1e-10)


def test_a_batch_without_a_scored_token_gives_zeros_with_a_gradient():
    policy, reference = model(0), model(1).requires_grad_(False)
    token_logps.prepare(policy)
    token_logps.prepare(reference)
    ids, attention, mask = rows()
    nothing = ids, attention, torch.zeros_like(mask)
    _, _, kl = token_logps.token_logps_and_divergence(
        policy, *nothing, Reference(reference).token_states(*nothing), reverse_kl
    )
    kl.sum().backward()
    assert kl.abs().max() == 0


def test_a_rank_with_fewer_tiles_adds_empty_ones(monkeypatch):
    """Each call of a sharded head gathers it, on all ranks."""
    policy, reference = model(0), model(1).requires_grad_(False)
    expected = by_whole_logits(copy.deepcopy(policy), copy.deepcopy(reference), *rows())
    token_logps.prepare(policy)
    token_logps.prepare(reference)
    policy.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it shards
    monkeypatch.setattr("posttrain.models.full_divergence._tiles_of_all_ranks", lambda n, rows, device: 3)
    calls = []
    policy.lm_head.register_forward_hook(lambda *_: calls.append("policy"))
    reference.lm_head.register_forward_hook(lambda *_: calls.append("reference"))
    _, _, kl = token_logps.token_logps_and_divergence(
        policy, *rows(), Reference(reference).token_states(*rows()), reverse_kl
    )
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-10)
    forward = calls.count("reference")
    kl.sum().backward()
    assert forward == 3 and calls.count("reference") == 6  # again in the backward pass


def test_unlike_the_estimate_it_sees_where_probability_goes_that_no_trace_holds():
    """Two policies that took the same from the one token that traces hold, and gave it to different ones."""
    reference = torch.tensor([0.80, 0.19, 0.01], dtype=torch.float64)
    to_a_likely_one, to_a_rare_one = (
        torch.tensor(p, dtype=torch.float64) for p in ([0.4, 0.59, 0.01], [0.4, 0.19, 0.41])
    )
    estimates = [kl_k3(p[0].log(), reference[0].log()) for p in (to_a_likely_one, to_a_rare_one)]
    exact = [(p * (p / reference).log()).sum() for p in (to_a_likely_one, to_a_rare_one)]
    assert estimates[0] == estimates[1]
    assert exact[1] > 3 * exact[0]
