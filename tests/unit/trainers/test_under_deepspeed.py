"""Where DeepSpeed is asked for: no number of a loss is cast, and no dead build is waited for. Without DeepSpeed."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from posttrain.trainers import run as run_module
from posttrain.trainers.run import SHELLS, train


@pytest.mark.parametrize("shell", SHELLS)
def test_what_a_loss_reads_passes_uncast(shell):
    """The Trainer casts all floats of a batch to the precision of DeepSpeed's engine."""
    module, name = SHELLS[shell]
    cls = getattr(import_module(module), name)
    trainer = cls.__new__(cls)
    engine = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.args, trainer.is_deepspeed_enabled = SimpleNamespace(device=torch.device("cpu")), True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=engine))
    inputs = {
        "ids": torch.tensor([[3, 4]]),
        "mask": torch.tensor([[False, True]]),
        "advantages": torch.tensor([1 / 3]),
        "old_logps": torch.tensor([[0.0, -1 / 3]], dtype=torch.float64),
    }
    assert Trainer._prepare_input(trainer, inputs)["advantages"].dtype == torch.bfloat16
    found = trainer._prepare_inputs(inputs)
    assert found.keys() == inputs.keys()
    for key, value in inputs.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


class Reached(Exception):
    """The run has come to the start of its ranks."""


def test_the_lock_of_a_dead_build_goes_before_anything_is_compiled(load, tmp_path, monkeypatch):
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()

    def ranks(**_):
        assert not lock.exists()
        raise Reached

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(run_module, "extensions_folder", lambda: tmp_path / "extensions")
    monkeypatch.setattr(run_module, "PartialState", ranks)
    with pytest.raises(Reached):
        train(load({"name": "sft"}))
