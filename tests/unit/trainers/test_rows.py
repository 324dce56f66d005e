"""What check and train refuse alike, what a run says on its way, and what a failure leaves behind."""

from __future__ import annotations

import json

import pytest

from posttrain.cli.check import check_recipe
from posttrain.errors import ModelError, PosttrainError
from posttrain.trainers.run import train

CURRY = {"name": "curry_dpo"}
MASKED = {"name": "nlpo", "top_p": 0.5, "min_tokens_to_keep": 500}
REFUSED = [
    (CURRY, {"model.peft": {"type": "lora", "r": 2}}, "method.refresh_reference"),
    (MASKED, {}, "method.min_tokens_to_keep"),
    (CURRY, {"training.max_steps": 1}, "training.max_steps"),
    ({"name": "grpo"}, {"training.optim": "adamw_torc"}, "training.optim"),
    (
        {"name": "grpo"},
        {"evaluation": {"benchmarks": ["countdown-3"], "every": 1, "best": {"benchmark": "gsm8k"}}},
        "evaluation.best",
    ),
]


@pytest.mark.parametrize(("method", "changes", "key"), REFUSED)
def test_check_and_train_refuse_alike_and_leave_nothing(write_recipe, load, tmp_path, method, changes, key) -> None:
    said = []
    for ask in (
        lambda: check_recipe(write_recipe(method, changes), [], online=False, world_size=1),
        lambda: train(load(method, changes)),
    ):
        with pytest.raises(PosttrainError) as caught:
            ask()
        assert key in caught.value.where
        said.append(caught.value.what)
    assert said[0] == said[1]
    assert not (tmp_path / "run").exists()


def test_a_failure_before_the_first_step_leaves_no_folder(load, tmp_path) -> None:
    changes = {"model.path": str(tmp_path / "nowhere"), "output": str(tmp_path / "deep" / "er" / "run")}
    with pytest.raises(ModelError, match="no model folder"):
        train(load({"name": "sft"}, changes))
    assert not (tmp_path / "deep").exists()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="no model folder"):
        train(load({"name": "sft"}, changes))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["notes.txt"]


def test_phases_and_one_completion_of_an_odd_number_of_prompts(load, capsys) -> None:
    """One line for each phase that lasts, in order; TRL's own grouping of completions asks for nothing."""
    changes = {"rollouts.samples_per_prompt": 1, "batch": {"prompts_per_step": 3, "micro_batch": 3}}
    result = train(load({"name": "ppo"}, {**changes, "training.max_steps": 1}))
    captured = capsys.readouterr()
    said = [line.split("] ", 1)[1] for line in captured.err.splitlines() if " s] " in line]
    begins = ["reading the data", "verifying the references", "loading the model", "rendering"]
    begins += ["comparing our scores", "loading the models beside the policy"]
    begins += ["importing and preparing the trainer", "preparing the first of 1 steps"]
    assert len(said) == len(begins) and all(line.startswith(b) for line, b in zip(said, begins, strict=True)), said
    assert "writing the trained model" in captured.out and result.steps == 1
    train(load({"name": "sft"}, {"tracking.console": "off", "training.max_steps": 1, "output": f"{result.run_dir}-2"}))
    captured = capsys.readouterr()
    assert " s] " not in captured.err and captured.out == ""


@pytest.fixture(scope="module")
def trained(tiny_model, make_recipe_data, tmp_path_factory):
    """A model that ends its answers, so that what follows on it is healthy."""
    folder = tmp_path_factory.mktemp("trained")
    return _run(make_recipe_data(tiny_model, folder, {"name": "sft"}, {"training.max_steps": 60})), folder


def _run(data):
    from posttrain.config.loading import build_recipe
    from posttrain.config.locations import Locations
    from posttrain.methods import METHODS

    return train(build_recipe(data, Locations("test"), {name: cls.Config for name, cls in METHODS.items()}))


def test_healthy_runs_raise_no_alarm(trained, make_recipe_data, tmp_path, capsys) -> None:
    start, _ = trained
    lora = {"model.peft": {"type": "lora", "r": 4}, "training.learning_rate": 1e-3}
    runs = {
        "sft": ({"name": "sft"}, lora),
        "grpo": ({"name": "grpo"}, {**lora, "rollouts.max_new_tokens": 24}),
        "dpo": ({"name": "dpo"}, {"training.learning_rate": 1e-3}),
        "reward": ({"name": "reward"}, {"training.learning_rate": 1e-3}),
    }
    for name, (method, changes) in runs.items():
        folder = tmp_path / name
        folder.mkdir()
        changes = {"model.path": str(start.model_dir), "training.max_steps": 6, **changes}
        result = _run(make_recipe_data(start.model_dir, folder, method, changes))
        events = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [event["text"] for event in events if "alarm" in event] == [], name
        out = capsys.readouterr().out
        assert "learning check" not in out and "warning" not in out and "ALARM" not in out, (name, out)
