"""A run over three sources by weight: killed and resumed it is the same run, and each source is counted and logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config.loading import load_recipe
from posttrain.errors import DataError, NeedsError, RecipeError
from posttrain.methods import METHODS
from posttrain.trainers.run import train

RECIPE = """
model: {init: {hidden_size: 16, layers: 1, heads: 2, max_length: 64}}
data:
  completions:
    - {path: FOLDER/math.jsonl, weight: 3}
    - {path: FOLDER/talk.jsonl, weight: 2, source: chat}
    - {path: FOLDER/few.jsonl, weight: 1, max_epochs: 2}
method: {name: sft}
batch: {rows_per_step: 6, micro_batch: 3}
training: {max_steps: 8, learning_rate: 1.0e-2, save_steps: 2, logging_steps: 1}
tracking: {console: "off", plots: false}
threads: 1
output: OUTPUT
"""


@pytest.fixture
def recipe(tmp_path: Path):
    sizes = {"math": 20, "talk": 9, "few": 3}
    for name, size in sizes.items():
        rows = [{"prompt": f"{name} {i}", "completion": f"answer {i}"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(output: str) -> Path:
        file = tmp_path / f"{output}.yaml"
        file.write_text(RECIPE.replace("FOLDER", str(tmp_path)).replace("OUTPUT", str(tmp_path / output)))
        return file

    return make


def load(file: Path, *overrides: str):
    return load_recipe(file, list(overrides), {name: method.Config for name, method in METHODS.items()})


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [{key: value for key, value in line.items() if key.startswith("source/")} for line in lines]
    return [values for values in found if values]


@pytest.mark.parametrize("streaming", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted(recipe, killed_at, tmp_path, streaming):
    streamed = f"data.streaming={streaming}"
    train(load(recipe("whole"), streamed))
    broken = recipe("broken")
    broken.write_text(broken.read_text().replace("data:\n", f"data:\n  streaming: {streaming}\n"))
    killed_at(("update", 6), broken)
    assert not (tmp_path / "broken" / "model").exists() and list((tmp_path / "broken" / "checkpoints").iterdir())
    train(load(broken), resume="auto")
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "broken")]
    assert weights[0] == weights[1]
    logged = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "broken") == logged and len(logged) == 8
    last = logged[-1]
    # `few` is drawn once a step, and ends after two passes over its three rows: of 48 rows 6.
    assert last["source/few/epoch"] == 2 and last["source/few/share"] == pytest.approx(6 / 48)
    # Six steps of 3, 2 and 1 rows, then two that the others share as 3 to 2.
    assert last["source/math/share"] == pytest.approx((18 + 12 * 0.6) / 48, abs=2 / 48)
    assert all(f"source/{name}/nll" in logged[0] for name in ("math", "chat", "few"))
    assert "source/few/nll" not in last
    counts = [json.loads((tmp_path / run / "data.json").read_text())["sources"] for run in ("whole", "broken")]
    assert counts[0] == counts[1]
    read = {"math": 20, "chat": 9, "few": 3}
    if streaming == "true":  # each reading of a row counts
        shares = {name: last[f"source/{name}/share"] for name in read}
        read = {name: round(share * 48) for name, share in shares.items()}
    assert {name: each["kept"] for name, each in counts[0].items()} == read


def test_a_source_that_ends_and_new_proportions_are_said(recipe, tmp_path, capsys):
    file = recipe("said")
    file.write_text(file.read_text().replace("weight: 3}", "weight: {0: 3, 6: 1}}"))
    train(load(file, "tracking.console=plain"))
    lines = capsys.readouterr().out.splitlines()
    # Of a step of six rows `few` has one; two passes over its three rows are six steps.
    assert [line for line in lines if line.startswith("source few ends")] == [
        "source few ends with step 6: 6 rows were drawn of it"
    ]
    assert [line for line in lines if line.startswith("from step")] == [
        "from step 7 on the sources have these weights: math 33.3%, chat 66.7%, few 0.0%"
    ]
    assert any(line.strip().startswith("source few: weight 16.7%, 0.0% from step 7 on; over the run 6 rows (12.5%)")
               for line in lines)  # fmt: skip


def test_a_run_that_outlasts_all_sources_is_refused(recipe):
    with pytest.raises(DataError, match="all sources have ended before step 1, and the run has 8 steps"):
        few = "{path: " + str(recipe("x").parent / "few.jsonl") + ", weight: 1, max_epochs: 1}"
        train(load(recipe("short"), f"data.completions=[{few}, {few}]"))


PROMPTS = """
model: {init: {hidden_size: 16, layers: 1, heads: 2, max_length: 96}}
data:
  prompts:
    - {task: chain_sum, levels: [2], size: 12, source: sums, weight: 1, verifier: [{type: procedural}]}
    - path: FOLDER/colours.jsonl
      prompt: question
      reference: colour
      template: "Q: {question} A:"
      weight: {0: 3, 1: 1}
      verifier: [{type: exact}, {type: length, weight: 0.5, max: 9, buffer: 1}]
method: {name: grpo}
rollouts: {samples_per_prompt: 2, max_new_tokens: 4}
batch: {prompts_per_step: 4, micro_batch: 4}
training: {max_steps: 2, learning_rate: 1.0e-3, logging_steps: 1}
tracking: {console: "off", plots: false}
threads: 1
output: OUTPUT
"""


def run_of(tmp_path: Path, text: str) -> list[dict[str, float]]:
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("FOLDER", str(tmp_path)).replace("OUTPUT", str(tmp_path / "run")))
    train(load(file))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_prompts_of_each_source_have_their_own_columns_verifiers_weights_and_counts(tmp_path):
    rows = [{"question": f"colour {n}?", "colour": "red"} for n in range(9)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, last = run_of(tmp_path, PROMPTS)
    assert first["source/sums/share"] == 0.25 and last["source/sums/share"] == pytest.approx((1 + 2) / 8)
    # Only the second source has a verifier of the length, which gives every answer half a point here.
    assert first["source/colours/reward"] == pytest.approx(0.5) and first["source/sums/reward"] == 0
    assert first["reward"] == pytest.approx(0.5 * 3 / 4)
    for line in (first, last):
        both = line["source/sums/tokens"] + line["source/colours/tokens"]
        assert both == line["tokens_trained"] and line["source/sums/tokens"] > 0
    assert last["source/sums/tokens_total"] == first["source/sums/tokens"] + last["source/sums/tokens"]
    texts = [json.loads(line)["prompt"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert any("Q: colour" in text for text in texts)


PAIRS = """
model: {init: {hidden_size: 16, layers: 1, heads: 2, max_length: 96}}
data:
  preferences:
    - {path: FOLDER/one.jsonl, weight: 1}
    - {path: FOLDER/two.jsonl, chosen: good, rejected: bad, weight: 1}
method: {name: METHOD}
batch: {rows_per_step: 4, micro_batch: 2}
training: {max_steps: 2, learning_rate: 1.0e-2, logging_steps: 1}
EVALUATION
tracking: {console: "off", plots: false}
threads: 1
output: OUTPUT
"""
HELD_OUT = "evaluation: {every: 1, preferences: {share: 0.3, kl_prompts: 0}}"


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_pairs_of_each_source_are_counted_and_measured(tmp_path, method):
    one = [{"prompt": f"one {n}", "chosen": "yes", "rejected": "no"} for n in range(8)]
    two = [{"prompt": f"two {n}", "good": "a long answer", "bad": "none"} for n in range(8)]
    for name, rows in (("one", one), ("two", two)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = PAIRS.replace("METHOD", method).replace("EVALUATION", HELD_OUT if method == "dpo" else "")
    first, last = run_of(tmp_path, text)
    for line in (first, last):
        assert line["source/one/tokens"] + line["source/two/tokens"] == line["tokens_trained"]
        assert line["source/one/tokens"] < line["source/two/tokens"]
    mean = (last["source/one/accuracy"] + last["source/two/accuracy"]) / 2
    assert mean == pytest.approx(last["pairs/accuracy"]) and {last["source/one/accuracy"]} <= {0, 0.5, 1}
    if method == "dpo":
        report = json.loads((tmp_path / "run" / "held_out" / "step-000002.json").read_text())
        assert set(report["sources"]) == {"one", "two"}
        assert sum(each["pairs"] for each in report["sources"].values()) == report["accuracy"]["pairs"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (("weight: 1", "limit: 4"), "talk has no weight, and other sources of the list have"),
        (("weight: {0: 1, 4: 0}", "weight: {2: 1, 5: 0}"), "no source has a weight from step 5 on"),
        (("weight: {3: 1}", "weight: {1: 2}"), "no source has a weight from step 0 on"),
        (("weight: -1", "weight: 1"), "a weight is greater than 0"),
        (("weight: {-1: 2}", "weight: 1"), "steps count from 0"),
    ],
)
def test_weights_that_leave_no_source_are_refused(recipe, weights, message):
    folder = recipe("x").parent
    entries = [f"{{path: {folder / name}.jsonl, {key}}}" for name, key in zip(("math", "talk"), weights, strict=True)]
    with pytest.raises(RecipeError, match=message):
        train(load(recipe("refused"), f"data.completions=[{', '.join(entries)}]"))


TRACES = """
model: {init: {hidden_size: 16, layers: 1, heads: 2, max_length: 64}}
data:
  max_length: 40
  max_lost_share: 0.5
  traces:
    - {path: FOLDER/one.jsonl, completion: text}
    - {task: chain_sum, levels: [2], size: 6, source: sums}
    - {path: FOLDER/two.jsonl, prompt: q, completion: a, source: other EXTRA}
method: {name: sft}
batch: {rows_per_step: 4, micro_batch: 4}
training: {max_steps: 1, learning_rate: 1.0e-3}
tracking: {console: "off", plots: false}
threads: 1
output: OUTPUT
"""


def test_traces_of_several_sources_are_put_together_and_counted_by_source(tmp_path):
    one = [{"prompt": f"one {n}", "text": "yes" if n else ""} for n in range(5)]
    two = [{"q": f"two {n}", "a": "no" * (1 + 40 * (n == 2))} for n in range(4)]
    for name, rows in (("one", one), ("two", two)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_of(tmp_path, TRACES.replace("EXTRA", ""))
    counts = json.loads((tmp_path / "run" / "data.json").read_text())
    found = {name: (each["kept"], each["dropped"]) for name, each in counts["sources"].items()}
    assert found == {"one": (4, 1), "sums": (6, 0), "other": (3, 1)} and counts["kept"] == 13
    with pytest.raises(NeedsError, match="traces of several sources are put together"):
        run_of(tmp_path, TRACES.replace("EXTRA", ", weight: 2"))
