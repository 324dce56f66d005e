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


def test_names_what_did_not_move():
    said, model = [], layers()
    model(torch.ones(1, 4)).sum().backward()
    model[0].bias.grad.zero_()
    update(LearningCheck(said.append), model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert said == ["learning check: 1 of 4 trainable tensors did not move in the first update, among them 0.bias"]


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
