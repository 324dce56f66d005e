"""An evaluation that is killed goes on where it was; the journal it keeps."""

import json
import os
import time
from pathlib import Path

import pytest

from posttrain.config.schema import EvaluationConfig, ModelConfig
from posttrain.errors import StateError
from posttrain.evaluation.journal import Chunk, Journal
from posttrain.evaluation.report import Report
from posttrain.evaluation.runner import evaluate_model
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.verifiers.verdict import Status

BENCHMARKS = ["chain-sum-3", "chain-sum-4"]
SETTINGS = {"samples": 2, "max_new_tokens": 24, "limit": 32, "max_batch": 4}


def _config(**keys) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"benchmarks": BENCHMARKS, **SETTINGS, **keys})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of prompts of every call of the real engine."""
    calls: list[int] = []
    generate = TransformersEngine.generate

    def counted(self, prompts, sampling):
        calls.append(len(prompts))
        return generate(self, prompts, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    return calls


def _kill_after(lines: int, model: Path, output: Path, apart) -> list[dict]:
    """Run the command until the journal has so many lines, kill it, and read the journal."""
    arguments = [f"{key}={value}" for key, value in SETTINGS.items()]
    command = ["-m", "posttrain", "eval", model, "--benchmarks", ",".join(BENCHMARKS), "--output", output]
    journal = output.with_name(f"{output.name}.partial.jsonl")
    process = apart([*command, *arguments], Path(os.devnull))
    try:
        for _ in range(12_000):
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                break
            assert process.is_alive(), "the evaluation ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert not output.exists()
    whole, _, _ = journal.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.split(b"\n")]


def test_a_killed_evaluation_goes_on_without_sampling_again(tiny_model: Path, tmp_path: Path, asked: list[int], apart):
    # Each benchmark has 2 chunks of greedy and 4 of sampled completions: 7 lines reach into the second one.
    done = _kill_after(7, tiny_model, tmp_path / "report.json", apart)
    said: list[str] = []
    model = ModelConfig(path=str(tiny_model))
    resumed = evaluate_model(model, _config(), tmp_path / "report.json", say=said.append)
    finished = sum(len(chunk["statuses"]) for chunk in done)
    assert finished >= 32 + 32 + 16  # the whole first benchmark, and more
    assert sum(asked) == 2 * (32 + 32) - finished
    assert "interrupted" in said[0]
    assert Report.load(tmp_path / "report.json") == resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]
    # The same numbers as without interruption, and for other chunks.
    whole = evaluate_model(model, _config(max_batch=256), None)
    for ours, theirs in zip(resumed.benchmarks, whole.benchmarks, strict=True):
        assert (ours.records, ours.metrics) == (theirs.records, theirs.metrics)
        assert (ours.greedy, ours.sampled) == (theirs.greedy, theirs.sampled)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, 0),
        ({"max_batch": 64}, 0),
        ({"k": [2]}, 0),
        ({"seed": 1}, 32),  # greedy completions do not depend on it
        ({"temperature": 0.5}, 32),
        ({"limit": 31}, 62),
        ({"max_new_tokens": 8}, 64),
    ],
)
def test_only_what_is_the_same_is_taken_from_the_journal(
    change: dict, again: int, tiny_model: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
):
    output, model = tmp_path / "report.json", ModelConfig(path=str(tiny_model))
    monkeypatch.setattr(Report, "save", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
    config = {"benchmarks": ["chain-sum-3"], "max_new_tokens": 6}
    with pytest.raises(KeyboardInterrupt):  # everything is done, nothing is saved
        evaluate_model(model, _config(**config), output)
    monkeypatch.undo()
    asked.clear()
    generate = TransformersEngine.generate
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda self, p, s: (asked.append(len(p)), generate(self, p, s))[1]
    )
    evaluate_model(model, _config(**(config | change)), output)
    assert sum(asked) == again


def test_another_models_results_are_not_taken(tiny_model: Path, tmp_path: Path, asked: list[int]):
    output = tmp_path / "report.json"
    config = _config(benchmarks=["chain-sum-3"], max_new_tokens=4, limit=4, greedy=False)
    journal = Journal(output.with_name("report.json.partial.jsonl"), {"content": "of another model"})
    journal.append(Chunk(journal.key({}), 0, [[Status.CORRECT] * 2] * 4, [[None] * 2] * 4, 0, 1, 1, 0.1))
    journal.close()
    report = evaluate_model(ModelConfig(path=str(tiny_model)), config, output)
    assert sum(asked) == 4
    assert report.benchmarks[0].metrics["avg@2"].value == 0.0


# ----------------------------------------------------------------------------------------------------------- journal


def _chunk(key: str, start: int, size: int = 2) -> Chunk:
    return Chunk(key, start, [[Status.CORRECT, Status.WRONG]] * size, [[None, "7"]] * size, 1, 10, 20, 0.5)


def test_a_journal_gives_back_what_was_written_and_drops_an_unfinished_line(tmp_path: Path):
    path = tmp_path / "out.partial.jsonl"
    journal = Journal(path, {"model": 1})
    key, other = journal.key({"pass": "greedy"}), journal.key({"pass": "sampled"})
    assert key != other != Journal(tmp_path / "second.jsonl", {"model": 2}).key({"pass": "sampled"})
    for chunk in (_chunk(key, 9), _chunk(other, 0), _chunk(key, 2), _chunk(key, 0)):
        journal.append(chunk)
    journal.close()
    with path.open("ab") as stream:
        stream.write(b'{"key": "half a li')
    journal = Journal(path, {"model": 1})
    assert journal.done(key) == [_chunk(key, 0), _chunk(key, 2), _chunk(key, 9)]  # several workers leave gaps
    journal.append(_chunk(key, 4))
    assert len(path.read_bytes().splitlines()) == 5
    journal.remove()
    assert not path.exists()


def test_a_journal_has_one_writer(tmp_path: Path, apart):
    path = tmp_path / "out.partial.jsonl"
    (tmp_path / "writer.py").write_text(f"""
import time
from pathlib import Path
from posttrain.evaluation.journal import Journal
journal = Journal(Path({str(path)!r}), {{}})
print("open", flush=True)
time.sleep(300)
""")
    said = tmp_path / "said"
    process = apart([tmp_path / "writer.py"], said)
    try:
        while not (said.exists() and said.read_text() == "open\n"):
            assert process.is_alive(), said.read_text()
            time.sleep(0.01)
        with pytest.raises(StateError, match="another evaluation"):
            Journal(path, {})
    finally:
        process.kill()
        process.join()
    Journal(path, {}).close()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path):
    path = tmp_path / "out.partial.jsonl"
    path.write_text('{"hello": 1}\n')
    with pytest.raises(StateError, match="not a chunk") as caught:
        Journal(path, {})
    assert caught.value.where == f"{path}:1"
