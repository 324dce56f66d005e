import json
import math

import pytest
import torch
from safetensors.torch import load_file

from posttrain.errors import ModelError
from posttrain.methods.sft import SFT
from posttrain.objectives.batch import LossSum
from posttrain.trainers.run import train

STEPS = {"training.max_steps": 6, "training.save_steps": 6, "batch.micro_batch": 8}


@pytest.fixture
def poison(monkeypatch):
    """`poison(steps, value)`: the loss of these steps (from 1) is multiplied by `value` in one micro-batch."""

    def make(steps, value=math.nan):
        original, calls = SFT.loss, []

        def loss(self, batch):
            calls.append(1)
            parts = original(self, batch)
            step, micro_batch = divmod(len(calls) - 1, 2)
            if step + 1 not in steps or micro_batch:
                return parts
            return {k: LossSum(p.value * value, p.unit, p.count, p.diagnostics) for k, p in parts.items()}

        monkeypatch.setattr(SFT, "loss", loss)

    return make


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"alarm"' not in line]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_update_is_left_out_counted_and_its_batch_kept(value, poison, load, tmp_path):
    poison({1, 4}, value)
    run = train(load({"name": "sft"}, STEPS)).run_dir
    rows = metrics(run)
    assert [row.get("skipped_updates", 0) for row in rows] == [1, 0, 0, 1, 0, 0]
    assert [row["loss"] is None for row in rows] == [True, False, False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in load_file(run / "model" / "model.safetensors").values())
    saved = torch.load(run / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in saved["state"].values()} == {4}  # Adam counts updates it made

    folder = run / "skipped" / "step-000004-rank-0"
    tensors = load_file(folder / "batch.safetensors")
    assert {"0.ids", "0.mask", "1.ids", "1.attention_mask"} <= set(tensors) and len(tensors["0.ids"]) == 8
    about = json.loads((folder / "batch.json").read_text())
    assert about["step"] == 4 and not math.isfinite(float(about["losses"][0])) and float(about["losses"][1]) > 0


def test_weights_stay_bit_for_bit(poison, load, tmp_path):
    def weights(steps, name):
        result = train(load({"name": "sft"}, {**STEPS, "training.max_steps": steps, "output": str(tmp_path / name)}))
        return load_file(result.model_dir / "model.safetensors")

    before = weights(2, "two")
    poison({3, 4})
    after = weights(4, "four")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_stops_after_too_many_in_a_row(poison, load, tmp_path):
    poison({2, 3, 4, 5})
    with pytest.raises(ModelError, match=r"the loss or gradient of step 5 is not finite.* the 4\. in a row") as caught:
        train(load({"name": "sft"}, STEPS))
    assert "learning_rate" in caught.value.hint and "guards.skipped_updates" in caught.value.hint
    assert len(list((tmp_path / "run" / "skipped").iterdir())) == 4


def test_the_limit_is_the_recipes(poison, load):
    poison({2})
    with pytest.raises(ModelError, match="step 2 is not finite"):
        train(load({"name": "sft"}, {**STEPS, "guards.skipped_updates": 0}))


def test_the_count_goes_on_after_a_resume(poison, load, tmp_path):
    poison({3, 4, 5, 6})
    changes = {**STEPS, "training.save_steps": 4}
    with pytest.raises(ModelError, match="step 6"):
        train(load({"name": "sft"}, changes))
    poison({1, 2})  # steps 5 and 6 of the run
    with pytest.raises(ModelError, match=r"step 6 .* the 4\. in a row"):
        train(load({"name": "sft"}, changes), resume="auto")
