"""Value models: in the policy's pass, on their own, saved and loaded, with an adapter, with a shared trunk."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification

from posttrain.config.schema import Lora, ModelConfig
from posttrain.errors import ModelError
from posttrain.models.adapters import adapted_name, lora_config
from posttrain.models.heads import Head, Heads
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.token_logps import prepare, token_logps, token_logps_and_values, token_values
from posttrain.models.value import (
    Critic,
    ValueScorer,
    _merged,
    attach,
    head_of,
    load_value_model,
    of_heads,
    save_value_model,
    split_state,
    value_model,
)


@pytest.fixture
def policy(tiny_model):
    return load_policy(ModelConfig(path=str(tiny_model)), seed=0)[0].double()


@pytest.fixture
def rows():
    """Two prompts of three completions each, ragged, long enough that sharing the prompt pays."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, 18, (2, 40), generator=generator)
    ids, mask, attending = torch.zeros(6, 60, dtype=torch.long), torch.zeros(6, 60).bool(), torch.zeros(6, 60)
    for row, length in enumerate((20, 7, 1, 13, 20, 4)):
        ids[row, :40] = prompts[row // 3]
        ids[row, 40 : 40 + length] = torch.randint(4, 18, (length,), generator=generator)
        mask[row, 40 : 40 + length] = 1
        attending[row, : 40 + length] = 1
    return ids, attending.long(), mask


def critic_of(policy, separate=True, noise=0.3, heads=1):
    critic = Critic(value_model(policy, pad_token_id=0, heads=heads), separate=separate)
    with torch.no_grad():
        critic.head.weight.normal_(std=noise, generator=torch.Generator().manual_seed(1))
        if separate:
            for p in critic.backbone.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype))
    return critic


@pytest.mark.parametrize("separate", [True, False])
def test_values_are_those_of_the_plain_forward_one_token_earlier(policy, rows, separate):
    critic = critic_of(policy, separate)
    ids, attending, mask = rows
    backbone = critic.backbone if separate else policy.base_model
    with torch.no_grad():
        plain = critic.head(backbone(input_ids=ids, attention_mask=attending).last_hidden_state).squeeze(-1)
    expected = torch.nn.functional.pad(plain[:, :-1], (1, 0)) * mask
    prepare(policy)
    before = token_logps(policy, *rows)
    attach(policy, Critic(_classifier(critic, policy), separate=separate))
    (logps, _, _), values = token_logps_and_values(policy, *rows)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logps, before.logps, rtol=0, atol=0)
    torch.testing.assert_close(token_values(policy, *rows), values, rtol=0, atol=1e-14)


def _classifier(critic, policy):
    """A classifier that holds the critic's weights, to build another one from."""
    model = value_model(policy, pad_token_id=0)
    if critic.separate:
        model.base_model.load_state_dict(critic.backbone.state_dict())
    head_of(model).load_state_dict(critic.head.state_dict())
    return model


def test_gradients_go_to_the_critic_and_not_to_a_policy_with_its_own_trunk(policy, rows):
    prepare(policy)
    attach(policy, critic_of(policy))
    token_values(policy, *rows).sum().backward()
    assert all(p.grad is None for name, p in policy.named_parameters() if not name.startswith("critic."))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.critic.parameters())


def test_a_fresh_value_model_values_everything_at_zero(policy, rows):
    prepare(policy)
    attach(policy, Critic(value_model(policy, pad_token_id=0), separate=True))
    assert (token_values(policy, *rows) == 0).all()


def test_the_policys_state_leaves_the_critic_out(policy):
    names = set(policy.state_dict())
    attach(policy, critic_of(policy))
    mine, its = split_state(policy.state_dict())
    assert set(mine) == names
    assert set(its) == set(policy.critic.state_dict())


@pytest.mark.parametrize("separate", [True, False])
def test_each_of_several_heads_is_bit_for_bit_the_only_head_of_another_critic(policy, rows, separate):
    prepare(policy)
    both = critic_of(policy, separate, heads=2)
    attach(policy, both)
    values = token_values(policy, *rows)
    assert values.shape == (2, 6, 60) and not torch.equal(values[0], values[1])
    scale = torch.linspace(0.3, 1.7, 60, dtype=torch.float64)
    for head in (0, 1):
        policy.zero_grad()
        found = of_heads(token_values(policy, *rows), torch.full((6,), head))
        (found * scale).sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        alone = critic_of(policy, separate)
        with torch.no_grad():
            alone.head.weight.copy_(both.head.weight[head : head + 1])
        attach(policy, alone)
        policy.zero_grad()
        single = token_values(policy, *rows)
        (single * scale).sum().backward()
        assert torch.equal(found, single) and torch.equal(found, values[head])
        weight = gradients.pop("critic.head.weight")
        assert torch.equal(weight[head], alone.head.weight.grad[0]) and (weight[1 - head] == 0).all()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, policy.get_parameter(name).grad), name
        attach(policy, both)


def test_each_row_has_the_values_of_its_own_head():
    values = torch.arange(12.0).view(2, 3, 2)
    assert of_heads(values, torch.tensor([0, 1, 0])).tolist() == [[0, 1], [8, 9], [4, 5]]


def test_adapters_of_a_bfloat16_critic_are_in_float32_as_those_of_the_policy(policy):
    critic = critic_of(policy.bfloat16(), True)
    critic.add_adapter(lora_config(Lora(r=2)))
    types = {name: parameter.dtype for name, parameter in critic.backbone.named_parameters()}
    assert {types[name] for name in types if ".lora_" in name} == {torch.float32}
    assert {types[name] for name in types if ".lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_saved_and_loaded_it_gives_the_same_values(policy, rows, tiny_model, tmp_path, separate, adapted, heads):
    critic = critic_of(policy, separate, heads=heads)
    if adapted:
        critic.add_adapter(lora_config(Lora(r=2)))
        with torch.no_grad():
            for name, p in critic.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        if separate:
            assert {n for n, p in critic.named_parameters() if p.requires_grad} == {
                n for n, _ in critic.named_parameters() if "lora_" in n or n == "head.weight"
            }
    prepare(policy)
    attach(policy, critic.double())
    expected = token_values(policy, *rows)
    (tmp_path / "critic").mkdir()
    tensors, of_critic = split_state(policy.state_dict())
    save_value_model(critic, of_critic, tensors, tmp_path / "critic", dtype=torch.float64)
    load_policy(ModelConfig(path=str(tiny_model)), seed=0)[1].save_pretrained(tmp_path / "critic")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    how = {"like": ModelConfig(path=str(tiny_model)), "vocabulary": 18}
    loaded = load_value_model(str(tmp_path / "critic"), heads=heads, **how)
    del policy.critic
    attach(policy, Critic(loaded.double(), separate=True))
    torch.testing.assert_close(token_values(policy, *rows), expected, rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match=f"classifier with {heads} outputs? and should have {3 - heads}") as caught:
        load_value_model(str(tmp_path / "critic"), heads=3 - heads, **how)
    assert caught.value.where == "critic.path" and "several value heads" in caught.value.hint


def test_adapters_on_fused_experts_are_merged_as_pefts_own(small_causal):
    critic = Critic(value_model(small_causal.build("mixtral"), pad_token_id=0), separate=True)
    critic.add_adapter(lora_config(Lora(r=2)))
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if ".lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    state = critic.backbone.state_dict()
    merged, seen = _merged(state, critic.backbone), set()
    for name, layer in critic.backbone.named_modules():
        if isinstance(layer, LoraLayer):
            target = adapted_name(name, layer)
            seen.add(target.rpartition(".")[2])
            weight = dict(layer.get_base_layer().named_parameters())[target.rpartition(".")[2]]
            torch.testing.assert_close(merged[target], weight + layer.get_delta_weight("default"))
    assert seen == {"weight", "gate_up_proj", "down_proj"}


def test_scorer_values_the_state_after_the_last_token(policy, rows):
    critic, (ids, attending, _) = critic_of(policy), rows
    with torch.no_grad():
        plain = critic.head(critic.backbone(input_ids=ids, attention_mask=attending).last_hidden_state).squeeze(-1)
    lengths = attending.sum(1).tolist()
    scorer = ValueScorer(_classifier(critic, policy), pad_id=0, max_batch=4)
    found = scorer([ids[row, :n].tolist() for row, n in enumerate(lengths)])
    assert found == pytest.approx([float(plain[row, n - 1]) for row, n in enumerate(lengths)], abs=1e-10)


def test_a_language_model_becomes_a_value_model_with_a_head_of_zeros(tiny_model):
    for heads in (1, 2):
        loaded = load_value_model(str(tiny_model), like=ModelConfig(path=str(tiny_model)), vocabulary=18, heads=heads)
        assert head_of(loaded).weight.shape == (heads, 16) and (head_of(loaded).weight == 0).all()


def test_another_vocabulary_is_refused(tiny_model):
    with pytest.raises(ModelError, match="18 embeddings and the policy 99") as caught:
        load_value_model(str(tiny_model), like=ModelConfig(path=str(tiny_model)), vocabulary=99)
    assert caught.value.where == "critic.path"


def test_a_missing_folder_names_the_key(tiny_model):
    with pytest.raises(ModelError, match="no model folder") as caught:
        load_value_model(f"{tiny_model}s", like=ModelConfig(path=str(tiny_model)), vocabulary=18)
    assert caught.value.where == "critic.path" and "did you mean" in caught.value.hint


@pytest.mark.parametrize(("kind", "heads"), [(Head, 1), (Heads, 2)])
def test_values_are_float32_where_an_engine_holds_the_head_in_bfloat16(kind, heads):
    layer = torch.nn.Linear(64, heads, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kind(layer)(hidden)
    expected = hidden.double() @ layer.weight.double().t()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.t() if heads > 1 else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_scores_of_a_bfloat16_classifier_are_float32_whatever_its_head_is_held_in(tiny_model, held):
    model = load_classifier(ModelConfig(path=str(tiny_model), dtype="bfloat16"), seed=0)[0]
    model.score.weight.data = model.score.weight.data.to(held)  # as DeepSpeed does beside an adapter in float32
    assert model(torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32
