"""What trackers get beside Hugging Face's own log: evaluations, samples and curves; the real ones, where they are."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from posttrain.config.loading import as_yaml
from posttrain.contract.recipes import tiny_recipe, write_model
from posttrain.tracking.tracker import Tracker
from posttrain.tracking.trackers import LONGEST, TABLES, WriteToTrackers, _cell
from posttrain.tracking.transcript import Transcript


class Recording(TrainerCallback):
    def __init__(self):
        self.logged, self.tables = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, logs))


def test_new_evaluations_and_samples_are_sent_once(tmp_path, monkeypatch):
    tracker, transcript = Tracker(tmp_path, console="off", total_steps=4), Transcript(tmp_path / "samples.jsonl")
    tracker.log(1, {"loss": 1.0})
    transcript.write(0, {"completion": "before the resumed run"})
    recording = Recording()
    monkeypatch.setitem(TABLES, "Recording", lambda callback, rows, step: callback.tables.append((step, rows)))
    send = WriteToTrackers(tmp_path, [recording], samples=True, draw=None)
    state, control = TrainerState(global_step=3), TrainerControl()
    tracker.log(2, {"eval/gsm8k/greedy": 0.25})
    tracker.log(3, {"loss": float("nan")})  # by the trainer's own log, and its alarm is none of these
    transcript.write(2, {"completion": "x" * (LONGEST + 1), "advantage": [0.5, -0.5], "reward": None})
    (tmp_path / "samples.jsonl").open("a").write('{"step": 3, "comple')
    for _ in range(2):
        send.on_log(None, state, control)
    assert recording.logged == [(2, {"eval_gsm8k/greedy": 0.25})] and state.global_step == 3
    (row,) = recording.tables[0][1]
    assert recording.tables == [(3, [row])] and row["step"] == 2 and row["reward"] is None
    assert len(row["completion"]) == LONGEST and row["advantage"] == "[0.5, -0.5]"
    state.is_world_process_zero = False
    tracker.log(4, {"eval/gsm8k/greedy": 0.5})
    send.on_train_end(None, state, control)
    assert len(recording.logged) == 1


def test_no_text_is_sent_where_the_recipe_says_so(tmp_path):
    transcript = Transcript(tmp_path / "samples.jsonl")
    send = WriteToTrackers(tmp_path, [SimpleNamespace()], samples=False, draw=None)
    transcript.write(0, {"completion": "private"})
    send.on_train_end(None, TrainerState(), TrainerControl())


def test_a_cell_holds_no_markup():
    assert _cell("<b>|`a`\n&") == "&lt;b>&#124;&#96;a&#96;<br>&amp;"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Two steps with an evaluation, sent to the tracker of a name; in a process of its own."""

    def train(name):
        if find_spec(name) is None:
            pytest.skip(f"no {name}: pip install 'posttrain[trackers]'")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        places = {"WANDB_DIR": "", "TRACKIO_DIR": "trackio", "TENSORBOARD_LOGGING_DIR": "tensorboard"}
        environment = {key: str(tmp_path / place) for key, place in places.items()} | {"WANDB_MODE": "offline"}
        recipe = tiny_recipe({"name": "grpo"}, tmp_path, write_model(tmp_path / "model"))
        recipe["tracking"] = {"console": "off", "plots": True}
        recipe["training"] |= {"max_steps": 2, "report_to": [name]}
        recipe["evaluation"] = {"every": 1, "limit": 4, "max_new_tokens": 4, "benchmarks": [PROBLEMS]}
        (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
        command = [sys.executable, "-m", "posttrain", "train", "recipe.yaml"]
        subprocess.run(command, cwd=tmp_path, env=os.environ | environment, check=True, capture_output=True)

    return train


PROBLEMS = {
    "name": "sums",
    "data": {"task": "chain_sum", "levels": [2], "size": 4},
    "verifier": [{"type": "procedural"}],
}


@pytest.mark.slow
def test_tensorboard(trained, tmp_path):
    trained("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("eval/sums/greedy")] == [0, 1, 2]
    assert [event.step for event in found.Scalars("train/reward")] == [1, 2]
    assert [event.step for event in found.Images("curves")] == [2]
    (first, _) = found.Tensors("samples/text_summary")
    assert first.tensor_proto.string_val[0].decode().startswith("| step | problem | prompt |")


@pytest.mark.slow
def test_wandb(trained, tmp_path):
    trained("wandb")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    media = run / "files" / "media"
    (one, two) = sorted((media / "table").glob("samples_*.table.json"), key=os.path.getmtime)
    table = json.loads(one.read_text())
    assert {"prompt", "completion", "verdict", "reward"} <= set(table["columns"]) and len(table["data"]) == 4
    assert len(list((media / "images").glob("curves_*.png"))) == 1


@pytest.mark.slow
def test_mlflow(trained):
    trained("mlflow")
    import mlflow

    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    client = mlflow.MlflowClient()
    assert [each.step for each in client.get_metric_history(run.info.run_id, "eval_sums/greedy")] == [0, 1, 2]
    assert {each.path for each in client.list_artifacts(run.info.run_id)} >= {"plots", "samples.json"}
    table = mlflow.load_table("samples.json", run_ids=[run.info.run_id])
    assert len(table) == 8 and set(table["step"]) == {0, 1}


@pytest.mark.slow
def test_trackio(trained, tmp_path):
    trained("trackio")
    (base,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(base)) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("select metrics from metrics order by id")]
    assert [row["train/global_step"] for row in rows if "eval/sums/greedy" in row] == [0, 1, 2]
    assert [row["train/global_step"] for row in rows if "samples" in row] == [1, 2]
    assert [row["curves"]["_type"] for row in rows if "curves" in row] == ["trackio.image"]
