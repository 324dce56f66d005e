"""The example of docs/python.md: an objective of ours in a stock trainer of TRL's, beside TRL's own."""

import math
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_objective_of_the_docs_trains_as_trls_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, example = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    as_it_stands, ours = {}, {}
    exec(compile(example, str(PAGE), "exec"), as_it_stands)
    assert 0 < as_it_stands["trainer"].state.log_history[-1]["train_loss"] < math.log(2)  # where it starts
    # TRL has no conservative loss, and the robust one of both is the same.
    exec(compile(example.replace('loss="conservative"', 'loss="robust"'), str(PAGE), "exec"), ours)
    stock = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(ours["folder"]),
        ref_model=AutoModelForCausalLM.from_pretrained(ours["folder"]),
        args=DPOConfig(
            output_dir="runs/stock",
            max_steps=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            learning_rate=1e-3,
            loss_type="robust",
            beta=0.1,
            label_smoothing=0.2,
        ),
        train_dataset=Dataset.from_list(ours["rows"]),
        processing_class=AutoTokenizer.from_pretrained(ours["folder"]),
    )
    stock.train()
    found, expected = ours["trainer"].state.log_history[-1], stock.state.log_history[-1]
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    moved = zip(ours["trainer"].model.parameters(), stock.model.parameters(), strict=True)
    assert max((one - other).abs().max() for one, other in moved) < 1e-5
