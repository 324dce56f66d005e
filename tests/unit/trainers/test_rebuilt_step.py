import json
import shutil

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.replay import replay_command
from posttrain.config.loading import load_recipe
from posttrain.errors import StateError
from posttrain.methods import METHODS
from posttrain.trainers.rebuilt_step import rebuild_step
from posttrain.trainers.run import train

STEPS = {"training.max_steps": 5, "training.save_steps": 2, "batch.micro_batch": 8}
GRPO = {"name": "grpo", "beta": 0.1, "updates_per_rollout": 2}


def logged(run, step):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in rows if row["step"] == step and "loss" in row)


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("method", "step", "checkpoint", "again"),
    [
        ({"name": "sft"}, 1, None, 0),
        (GRPO, 4, "checkpoint-2", 1),
        ({"name": "hypo", "lam": 0.05}, 3, "checkpoint-2", 0),
    ],
)
def test_the_rows_add_up_to_the_loss_that_was_logged(method, step, checkpoint, again, load, tmp_path):
    run = train(load(method, STEPS)).run_dir
    before = content(run)
    found = rebuild_step(run, step)
    assert content(run) == before
    assert (found.checkpoint.name if found.checkpoint else None, found.steps_again) == (checkpoint, again)
    assert found.loss == pytest.approx(logged(run, step), abs=2e-6) and found.logged["loss"] == logged(run, step)
    assert found.differences == []
    for row in found.rows:
        roles = [sequence.role for sequence in row.sequences]
        assert roles in ([[""]] if method["name"] in ("sft", "grpo") else [["chosen", "rejected"], ["sample"]])
        assert (row.advantage is None) == (roles == ["chosen", "rejected"] or method["name"] == "sft")
        for sequence in row.sequences:
            assert sum(len(text) for text, _ in sequence.pieces) > 0 and sequence.pieces[0][1] is False
            assert 0 < sequence.trained < sequence.tokens and sequence.logp < 0
    if method["name"] == "grpo":
        texts = [x for x in (run / "samples.jsonl").read_text().splitlines() if json.loads(x)["step"] == 2]
        first = json.loads(texts[0])
        assert any(row.advantage == pytest.approx(first["advantage"], abs=1e-6) for row in found.rows)


def test_a_damaged_checkpoint_is_passed_over(load, tmp_path):
    run = train(load({"name": "sft"}, STEPS)).run_dir
    (run / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    found = rebuild_step(run, 5)
    assert found.checkpoint.name == "checkpoint-2" and found.steps_again == 2
    assert found.loss == pytest.approx(logged(run, 5), abs=2e-6)
    shutil.rmtree(run / "checkpoints")
    assert rebuild_step(run, 5).loss == pytest.approx(logged(run, 5), abs=2e-6)


def test_the_command(load, tmp_path, capsys):
    run = train(load(GRPO, STEPS)).run_dir
    capsys.readouterr()
    replay_command(run, 2, None, tmp_path / "out.json")
    text = capsys.readouterr().out
    assert f"the run logged {logged(run, 2):.7g}" in text and "advantage" in text and "1.7" in text
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["step"] == 2 and len(data["rows"]) == 16
    replay_command(run, 2, "1.7", None)
    text = capsys.readouterr().out
    assert "[context] " in text and "[trained] " in text and "loss policy" in text


def test_what_is_not_there_is_said(load, tmp_path):
    run = train(load({"name": "sft"})).run_dir
    with pytest.raises(StateError, match="no resolved.yaml here"):
        rebuild_step(tmp_path, 1)
    with pytest.raises(StateError, match="steps 1 to 3, not 4"):
        rebuild_step(run, 4)
    with pytest.raises(StateError, match="no row '9.9'"):
        replay_command(run, 1, "9.9", None)


PAIRS = """
model: {init: {hidden_size: 16, layers: 1, heads: 2, max_length: 64}}
data: {preferences: {path: rows/pairs.jsonl}}
method: {name: dpo}
batch: {rows_per_step: 4, micro_batch: 4}
training: {max_steps: 2, learning_rate: 1.0e-2, logging_steps: 1}
evaluation: {every: 2, preferences: {share: 0.4, kl_prompts: 0}}
tracking: {console: "off", plots: false}
threads: 1
output: runs/OUTPUT
"""


def test_replay_and_compare_from_another_folder(tmp_path, monkeypatch):
    start, here = tmp_path / "start", tmp_path / "here"
    for folder, word in ((start, "good"), (here, "another")):  # there is a file of that name here too
        (folder / "rows").mkdir(parents=True)
        rows = [{"prompt": f"{n}?", "chosen": f"{word} {n}", "rejected": "bad"} for n in range(10)]
        (folder / "rows" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(start)
    for name, rate in (("slow", 1e-3), ("fast", 1e-1)):
        (start / "recipe.yaml").write_text(PAIRS.replace("OUTPUT", name))
        configs = {name: found.Config for name, found in METHODS.items()}
        train(load_recipe(start / "recipe.yaml", [f"training.learning_rate={rate}"], configs))
    monkeypatch.chdir(here)
    run = start / "runs" / "slow"
    found = rebuild_step(run, 2)
    assert found.loss == pytest.approx(logged(run, 2), abs=2e-6) and found.differences == []
    texts = ["".join(text for text, _ in sequence.pieces) for row in found.rows for sequence in row.sequences]
    assert any("good" in text for text in texts) and not any("another" in text for text in texts)
    for words, said in (
        (["replay", str(run), "--step", "1"], f"the run logged {logged(run, 1):.7g}"),
        (["compare", str(run), str(start / "runs" / "fast")], "this compares two models"),
    ):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0 and said in result.output
