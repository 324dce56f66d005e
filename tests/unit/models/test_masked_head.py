"""Masked log-probs from the model's tiled pass, against the whole logits, in float64."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.models import masked_head, scored_head
from posttrain.models.token_logps import prepare, token_logps
from posttrain.objectives.action_mask import ActionMask, MaskRule, masked_logps, nucleus

CONFIG = LlamaConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
RULE = MaskRule(top_p=0.6, min_tokens=3, update_interval=1)


def random_model(seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def policy():
    return random_model(0)


@pytest.fixture
def mask(policy):
    """A mask model with other weights, and its log: how often it stood in place."""
    other = [p.detach().clone() for p in random_model(1).parameters()]

    @contextmanager
    def in_place():
        def exchange():
            for i, parameter in enumerate(policy.parameters()):
                parameter.data, other[i] = other[i], parameter.data

        exchange()
        yield
        exchange()

    return ActionMask(in_place, RULE, always=(2,))


IDS = torch.randint(3, 37, (4, 9), generator=torch.Generator().manual_seed(0))
IDS[1, :4] = IDS[0, :4]
ATTENDED = torch.ones_like(IDS)
SCORED = torch.zeros(4, 9, dtype=torch.float64)
SCORED[:, 4:] = 1
SCORED[2, 7:] = 0


def expected(policy, temperature):
    logits = policy(IDS).logits[:, :-1] / temperature
    with torch.no_grad():
        likely = random_model(1)(IDS).logits[:, :-1] / temperature
    allowed = nucleus(likely.flatten(0, 1), RULE.top_p, RULE.min_tokens).view(likely.shape)
    allowed[..., 2] = True
    allowed = allowed.scatter(-1, IDS[:, 1:, None], True)
    logps = masked_logps(logits, allowed)
    tokens = logps.gather(-1, IDS[:, 1:, None]).squeeze(-1)
    finite = logps.masked_fill(~allowed, 0.0)
    entropies = -(finite.exp() * finite * allowed).sum(-1)
    return [torch.nn.functional.pad(x, (1, 0)) * SCORED for x in (tokens, entropies)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tile", [None, 5])
def test_log_probs_and_gradients_are_those_of_whole_logits(policy, mask, temperature, tile, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(masked_head, "tile_rows", lambda *_: tile)
    plain = copy.deepcopy(policy)
    want, entropies = expected(plain, temperature)
    weights = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    (want * weights).sum().backward()
    prepare(policy, temperature=temperature)
    found = token_logps(policy, IDS, ATTENDED, SCORED, entropy=True, action_mask=mask)
    (found.logps * weights).sum().backward()
    torch.testing.assert_close(found.logps, want.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.entropies, entropies.detach(), rtol=1e-10, atol=1e-10)
    for (name, one), other in zip(policy.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10, msg=name)
    assert policy.training


def test_a_mask_that_allows_everything_is_no_mask(policy):
    @contextmanager
    def in_place():
        yield

    everything = ActionMask(in_place, MaskRule(1.0, 37, 1), always=())
    prepare(policy)
    found = token_logps(policy, IDS, ATTENDED, SCORED, top1=True, action_mask=everything)
    plain = token_logps(policy, IDS, ATTENDED, SCORED, top1=True)
    torch.testing.assert_close(found.logps, plain.logps, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.top1, plain.top1)
    ours, theirs = (torch.autograd.grad(each.logps.sum(), list(policy.parameters())) for each in (found, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_nothing_scored_gives_a_zero_to_call_backward_on(policy, mask):
    prepare(policy)
    found = token_logps(policy, IDS, ATTENDED, torch.zeros_like(SCORED), action_mask=mask)
    assert not found.logps.any()
    found.logps.sum().backward()


@pytest.mark.parametrize("width", [1, 8, 13, 40])
def test_bits_hold_what_was_put_in(width):
    allowed = torch.rand(5, width, generator=torch.Generator().manual_seed(width)) < 0.5
    bits = masked_head._pack(allowed)
    assert bits.shape == (5, -(-width // 8)) and bits.dtype == torch.uint8
    assert torch.equal(masked_head._unpack(bits, width), allowed)


def test_tiles_follow_the_heads_budget():
    head = torch.nn.Linear(4, 10, bias=False)
    rows = scored_head.tile_rows(10, torch.float32, torch.device("cpu"))
    assert [t.stop - t.start for t in masked_head._tiles(head, torch.zeros(3, 4))] == [rows]
