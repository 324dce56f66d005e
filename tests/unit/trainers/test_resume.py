"""Resuming through `train`: what is refused, what may change, and what then takes effect."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.errors import DataError, StateError
from posttrain.state.checkpoint import checkpoints, read_state
from posttrain.trainers.run import train
from posttrain.trainers.run_folder import LOCK

SFT = {"name": "sft"}
TWO_OF_FOUR = {"training.max_steps": 4, "training.save_steps": 2}


def names(run):
    return [path.name for path in checkpoints(run / "checkpoints")]


def losses(run, first=1):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] >= first}


def rates(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["learning_rate"] for row in rows]


@pytest.fixture
def finished(load, tmp_path):
    """A run of 4 steps with checkpoints at 2 and 4, cut back to its first checkpoint."""
    train(load(SFT, TWO_OF_FOUR))
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_a_changed_recipe_is_refused_and_shown(finished, load):
    before = sorted(path.name for path in finished.rglob("*"))
    with pytest.raises(StateError) as caught:
        train(load(SFT, {**TWO_OF_FOUR, "training.learning_rate": 0.5, "batch.rows_per_step": 32}), resume="auto")
    text = str(caught.value)
    assert "training.learning_rate: 0.01 -> 0.5" in text and "batch.rows_per_step: 16 -> 32" in text
    assert "--allow-changed training.learning_rate" in text
    assert sorted(path.name for path in finished.rglob("*")) == before


def test_changed_rows_behind_the_same_path_are_refused(load, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": f"{i + 1};"}) + "\n" for i in range(8)))
    data = {"data.completions": {"path": str(rows), "completion": "answer"}, "batch.rows_per_step": 4}
    changes = {**TWO_OF_FOUR, **data, "batch.micro_batch": 4}
    train(load(SFT, changes))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(rows, moved)
    changes["data.completions"] = {"path": str(moved), "completion": "answer"}
    train(load(SFT, changes), resume="auto")

    moved.write_text(moved.read_text().replace("7+1=", "1+7="))
    with pytest.raises(StateError, match=r"content\.rows: [0-9a-f]{12}"):
        train(load(SFT, changes), resume="auto")
    train(load(SFT, changes), resume="auto", allow_changed=["content"])


def test_another_starting_model_behind_the_same_path_is_refused(finished, load, tmp_path, tiny_model):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    shutil.copy(finished / "checkpoints" / "checkpoint-2" / "model.safetensors", other)
    with pytest.raises(StateError, match="content.weights"):
        train(load(SFT, {**TWO_OF_FOUR, "model.path": str(other)}), resume="auto")


def test_other_packages_and_ranks_are_refused(finished, load, monkeypatch):
    from posttrain.state import identity

    versions = identity._versions()
    monkeypatch.setattr(identity, "_versions", lambda: versions | {"torch": "9.9"})
    with pytest.raises(StateError, match="packages.torch: .* -> 9.9"):
        train(load(SFT, TWO_OF_FOUR), resume="auto")
    train(load(SFT, TWO_OF_FOUR), resume="auto", allow_changed=["packages"])


def test_an_allowed_learning_rate_takes_effect_and_is_recorded(finished, load):
    changes = {**TWO_OF_FOUR, "training.learning_rate": 0.5, "training.max_steps": 6}
    first = str(finished / "checkpoints" / "checkpoint-2")
    train(load(SFT, changes), resume=first, allow_changed=["training.learning_rate"])
    assert rates(finished) == [0.01, 0.01, 0.5, 0.5, 0.5, 0.5]
    assert "learning_rate: 0.5" in (finished / "resolved.yaml").read_text()
    entry = json.loads((finished / "resumes.jsonl").read_text())
    assert entry["step"] == 2 and "training.learning_rate: 0.01 -> 0.5" in entry["changed"]
    saved = torch.load(finished / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {group["lr"] for group in saved["param_groups"]} == {0.5}
    train(load(SFT, changes), resume="auto")  # the new value is the run's own from here on


def test_a_longer_run_goes_on_where_the_shorter_ended(finished, load, tmp_path):
    train(load(SFT, {**TWO_OF_FOUR, "training.max_steps": 6}), resume="auto")
    whole = train(load(SFT, {**TWO_OF_FOUR, "training.max_steps": 6, "output": str(tmp_path / "whole")}))
    one, other = (load_file(run / "model" / "model.safetensors") for run in (finished, whole.run_dir))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(finished) == losses(whole.run_dir)


def test_a_shorter_run_than_its_checkpoint_is_refused(finished, load):
    with pytest.raises(StateError, match="at step 4, beyond training.max_steps 3"):
        train(load(SFT, {**TWO_OF_FOUR, "training.max_steps": 3}), resume="auto")


def test_damaged_ones_are_named_and_set_aside(finished, load, capsys):
    weights = finished / "checkpoints" / "checkpoint-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    expected = losses(finished)
    train(load(SFT, TWO_OF_FOUR), resume="auto")
    said = capsys.readouterr().out
    assert "checkpoint-4: the content of model.safetensors does not match its checksum" in " ".join(said.split())
    assert (finished / "checkpoints" / "set-aside" / "checkpoint-4").is_dir()
    assert names(finished) == ["checkpoint-2", "checkpoint-4"]
    assert losses(finished) == expected


def test_auto_without_any_checkpoint_starts_and_says_so(load, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "lo')  # of a start that was killed
    assert train(load(SFT), resume="auto").steps == 3
    assert "starting from the beginning" in " ".join(capsys.readouterr().out.split())
    assert sorted(losses(run)) == [1, 2, 3]
    with pytest.raises(StateError, match="finished and kept no checkpoint"):
        train(load(SFT), resume="auto")
    with pytest.raises(StateError, match="finished or interrupted run"):
        train(load(SFT))


def test_another_run_can_branch_off(finished, load, tmp_path):
    branch = tmp_path / "branch"
    result = train(load(SFT, {**TWO_OF_FOUR, "output": str(branch)}), resume=str(finished / "checkpoints/checkpoint-2"))
    assert result.run_dir == branch and losses(branch) == losses(finished, first=3)
    assert names(branch) == ["checkpoint-4"] and names(finished) == ["checkpoint-2", "checkpoint-4"]


def test_half_written_last_lines_are_dropped(finished, load):
    expected = losses(finished)
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.')
    train(load(SFT, TWO_OF_FOUR), resume="auto")
    assert losses(finished) == expected


def test_log_entries_over_several_steps_survive_a_stop_between_them(load, tmp_path):
    """The checkpoint lies between two entries: sums since the last one are part of it. The last step has its own."""
    changes = {"training.max_steps": 8, "training.save_steps": 2, "training.logging_steps": 3}
    train(load(SFT, changes | {"output": str(tmp_path / "whole")}))
    train(load(SFT, changes))
    first = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    shutil.rmtree(tmp_path / "run" / "model")
    train(load(SFT, changes), resume=str(first))
    found, expected = (
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k and k != "time"}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("run", "whole")
    )
    assert found == expected and [row["step"] for row in found] == [3, 6, 8]


def test_a_run_holds_its_folder(load, tmp_path):
    from posttrain.state.lock import locked

    seen = {}

    class Spy:
        def __call__(self, *_):
            seen["lock"] = json.loads((tmp_path / "run" / LOCK).read_text())["pid"]

    from posttrain.trainers import run as module

    original = module.state_of
    try:
        module.state_of = lambda *args: Spy()() or original(*args)
        train(load(SFT, TWO_OF_FOUR))
    finally:
        module.state_of = original
    assert seen["lock"] == os.getpid()
    with locked(tmp_path / "run" / LOCK, pytest.fail, what="a run"):
        pass


def test_the_state_says_what_the_run_was_made_of(finished):
    state = read_state(finished / "checkpoints" / "checkpoint-4")
    made_by = state["made_by"]
    assert made_by["training"]["learning_rate"] == 0.01 and made_by["world_size"] == 1
    assert set(made_by["content"]) == {"rows", "template", "tokens", "weights"}
    assert state["learning_check"] is True and state["guard"] == {"in_a_row": 0, "total": 0}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 15), (signal.SIGUSR1, 10), (signal.SIGINT, 2)])
def test_a_signal_stops_at_a_checkpoint_and_is_reported(number, code, load, tmp_path, monkeypatch):
    from posttrain.tracking.tracker import Tracker

    log = Tracker.log

    def signalled(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # launchers pass on what the workers got as well

    monkeypatch.setattr(Tracker, "log", signalled)
    result = train(load(SFT, {"training.max_steps": 50}))
    assert (result.stopped, result.signal, result.steps) == (True, code, 3)
    assert names(result.run_dir) == ["checkpoint-3"] and result.checkpoint.name == "checkpoint-3"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


# ----------------------------------------------------------------------------------------- before the first step


def test_gold_answers_that_cannot_be_read_stop_a_run_before_it_starts(load, tmp_path):
    rows = [{"prompt": f"{i}+1=", "gold": "}{" if i == 5 else str(i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "reference": "gold"}
    with pytest.raises(DataError, match="1 of 8 references cannot be read") as caught:
        train(load({"name": "grpo"}, {"data.prompts": data, "verifier": [{"type": "math"}]}))
    assert caught.value.where.endswith("rows.jsonl:6")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_a_corrupt_row_in_the_middle_stops_a_run_before_it_starts(load, tmp_path):
    rows = [json.dumps({"prompt": f"{i}+1=", "answer": f"{i + 1};"}) for i in range(100)]
    rows[60] = rows[60][:-9]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    changes = {"data.completions": {"path": str(tmp_path / "rows.jsonl"), "completion": "answer"}}
    with pytest.raises(DataError, match="not JSON") as caught:
        train(load(SFT, changes))
    assert f"{tmp_path / 'rows.jsonl'}:61:" in caught.value.where
    assert names(tmp_path / "run") == []


# --------------------------------------------------------------------------------------------------------- stages

STAGED = {"name": "curry_dpo", "curriculum": "gap", "stages": 2}
SIX = {"training.max_steps": 6, "training.save_steps": 1, "training.lr_scheduler_type": "constant"}


def test_the_reference_of_a_stage_is_part_of_the_sealed_checkpoint(load, tmp_path):
    train(load(STAGED, SIX))
    run = tmp_path / "run"
    found = {step: read_state(run / "checkpoints" / f"checkpoint-{step}") for step in range(1, 7)}
    assert ["reference.safetensors" in state["files"] for state in found.values()] == [False] * 3 + [True] * 3
    files = [path.name for path in (run / "checkpoints").iterdir()]
    assert sorted(files) == sorted(f"checkpoint-{step}" for step in range(1, 7))  # nothing lies beside them
    references = [load_file(run / "checkpoints" / f"checkpoint-{step}" / "reference.safetensors") for step in (4, 6)]
    start = load_file(run / "checkpoints" / "checkpoint-3" / "model.safetensors")
    for reference in references:
        assert all(torch.equal(reference[name], start[name]) for name in start)


def test_a_longer_run_would_move_the_stages_and_is_refused(load, tmp_path):
    train(load(STAGED, SIX))
    shutil.rmtree(tmp_path / "run" / "model")
    longer = {**SIX, "training.max_steps": 10}
    with pytest.raises(StateError) as caught:
        train(load(STAGED, longer), resume="auto")
    assert "content.stages: steps 0, 3 -> steps 0, 5" in str(caught.value)
    assert train(load(STAGED, longer), resume="auto", allow_changed=["content.stages"]).steps == 10


@pytest.mark.parametrize("model_type", ["mixtral", "gemma3"])
@pytest.mark.parametrize("method", ["sft", "ppo", "ppo with adapters"])
def test_weights_whose_names_in_files_are_others_are_put_back(
    model_type, method, load, small_causal, tiny_model, tmp_path
):
    """Experts are one tensor in memory and several in files; parts of a wrapper have other names there."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    changes = {**TWO_OF_FOUR, "model.path": str(small_start(small_causal, model_type, tokenizer, tmp_path / "start"))}
    if method == "ppo":
        changes["critic"] = {"trunk": "shared"}
    elif method != "sft":
        method, changes["model.peft"] = "ppo", {"type": "lora", "r": 2}
    train(load({"name": method}, {**changes, "output": str(tmp_path / "whole")}))
    from_two = str(tmp_path / "whole" / "checkpoints" / "checkpoint-2")
    train(load({"name": method}, changes), resume=from_two)
    for kind in ("model", "critic") if method == "ppo" else ("model",):
        whole, resumed = (load_file(tmp_path / run / kind / "model.safetensors") for run in ("whole", "run"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
        kinds = {"model": AutoModelForCausalLM, "critic": AutoModelForSequenceClassification}
        _, found = kinds[kind].from_pretrained(tmp_path / "run" / kind, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]


def small_start(small_causal, model_type, tokenizer, folder):
    """A tiny model of the type, with a tokenizer."""
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = small_causal.small_config(model_type)
    config.get_text_config().update({"vocab_size": 48, "max_position_embeddings": 96, **ends})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
