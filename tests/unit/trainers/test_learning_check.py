from types import SimpleNamespace

import pytest
import torch

from posttrain.errors import ModelError
from posttrain.trainers.learning_check import LearningCheck


def update(check, model, optimizer, step=0):
    """One optimizer step with the callback's hooks around it, as the Trainer calls them."""
    hooks = {"model": model, "optimizer": optimizer}
    state, control = SimpleNamespace(global_step=step), SimpleNamespace()
    check.on_pre_optimizer_step(None, state, control, **hooks)
    optimizer.step()
    check.on_optimizer_step(None, state, control, **hooks)


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=dtype), torch.nn.Linear(4, 4, dtype=dtype))


def test_silent_when_everything_moves():
    said, model = [], layers()
    model(torch.ones(1, 4)).sum().backward()
    update(LearningCheck(said.append), model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert said == []


def run_updates(model, loss, *, lr=0.1, updates=3, skip=()):
    """What the check says over some updates; tensors named in `skip` get no gradient."""
    said, check = [], LearningCheck(print)
    check.say, optimizer = said.append, torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(updates):
        optimizer.zero_grad()
        loss().backward()
        for name, parameter in model.named_parameters():
            if name in skip:
                parameter.grad.zero_()
        update(check, model, optimizer, step)
    return said, check


def test_names_what_no_gradient_reached_once_it_can_tell():
    model = layers()
    said, check = run_updates(model, lambda: model(torch.ones(1, 4)).sum(), updates=2, skip={"0.bias"})
    assert said == [] and not check.done
    said, check = run_updates(model, lambda: model(torch.ones(1, 4)).sum(), skip={"0.bias"})
    assert check.done and said == [
        "learning check: 1 of 4 trainable tensors did not move in the first 3 updates (no gradient reached them), "
        "among them 0.bias"
    ]


def test_names_what_was_rounded_away():
    model = layers()
    model[1].weight.data.fill_(1e9)
    said, _ = run_updates(model, lambda: (model(torch.ones(1, 4)) * 1e-9).sum(), lr=1e-3)
    assert len(said) == 1 and "(their updates are rounded away), among them" in said[0] and "1.weight" in said[0]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["1"]}])
def test_an_adapter_begins_with_zeros_and_is_no_fault(options):
    """B is zero at the start, so A gets its first gradient in the second update."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(layers(), LoraConfig(r=2, target_modules=["0"], **options))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    said, check = run_updates(model, lambda: model(torch.ones(1, 4)).square().sum(), updates=2)
    assert said == [] and check.done and len(trained) >= 2
    dead = next(name for name in trained if "lora_B" in name)
    said, _ = run_updates(model, lambda: model(torch.ones(1, 4)).square().sum(), skip={dead})
    assert len(said) == 1 and dead in said[0]


def test_what_is_behind_a_head_of_zeros_moves_in_the_second_update():
    model = layers()
    torch.nn.init.zeros_(model[1].weight)
    said, check = run_updates(model, lambda: model(torch.ones(1, 4)).square().sum() + model[1].bias.sum(), updates=3)
    assert said == [] and check.done and check.updates == 2


def test_measures_the_share_of_low_precision_weights_that_moved():
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(model.weight, std=0.02)
    said, check = [], LearningCheck(print)
    check.say, optimizer = said.append, torch.optim.Adam(model.parameters(), lr=1e-6)
    model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    before = model.weight.detach().clone()
    update(check, model, optimizer)
    moved = float((model.weight != before).double().mean())
    assert 0 < moved < 0.1 and f"the first update moved {moved:.1%} of the bfloat16 weights" in said[0]
    assert "training.bf16" in said[0]


def test_updates_that_leave_a_part_as_it_is_are_not_looked_at():
    said, model = [], layers()
    check = LearningCheck(said.append, after=2)
    for step in range(3):
        model(torch.ones(1, 4)).sum().backward()
        if step < 2:
            model[0].bias.grad = None
        update(check, model, torch.optim.SGD(model.parameters(), lr=0.1), step)
        assert check.done == (step == 2)
    assert said == []


def test_updates_lost_in_bfloat16_stop_the_run():
    model = layers(torch.bfloat16)
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(ModelError, match="moved none of 4"):
        update(LearningCheck(print), model, torch.optim.SGD(model.parameters(), lr=1e-6))


def test_waits_for_a_gradient_and_a_learning_rate():
    said, model = [], layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    check = LearningCheck(said.append)
    model(torch.ones(1, 4)).sum().backward()
    update(check, model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad.zero_()
    update(check, model, optimizer)
    assert not check.done
    model(torch.ones(1, 4)).sum().backward()
    update(check, model, optimizer)
    assert check.done and said == []
