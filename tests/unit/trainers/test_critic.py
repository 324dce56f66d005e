import torch

from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.trainers.critic import build_critic


def test_the_adapter_of_a_critic_follows_from_the_seed_alone(load):
    recipe = load({"name": "ppo"}, {"model.peft": {"type": "lora", "r": 4}})
    model, tokenizer = load_policy(recipe.model, seed=recipe.seed)
    needs, found = METHODS["ppo"](recipe.method).needs, []
    for drawn in (0, 7):
        torch.rand(drawn)
        before = torch.random.get_rng_state()
        found.append(build_critic(recipe, needs, model, pad_id=tokenizer.pad_token_id).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert any(".lora_A." in name for name in found[0])
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
