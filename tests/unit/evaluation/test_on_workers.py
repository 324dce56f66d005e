"""An evaluation by workers, with what is sent to them and back pickled as Ray does; tests/e2e has the real thing."""

import pickle

import pytest

from posttrain.config.schema import ModelConfig
from posttrain.config.workers import EvaluationRun
from posttrain.errors import EngineError
from posttrain.evaluation import on_workers, runner

SETTINGS = {
    "benchmarks": ["chain-sum-3", "chain-sum-4"],
    "samples": 2,
    "max_new_tokens": 16,
    "limit": 6,
    "max_batch": 2,
}


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.fixture
def reversed_workers(monkeypatch):
    """Two workers, the last part first."""

    def run(job, items, *, workers, address):
        assert (workers, address) == (2, None)
        opened = [pickled(job).open() for _ in range(workers)]
        for number in reversed(range(len(items))):
            for part in opened[number % workers].run(pickled(items[number])):
                yield number, pickled(part)

    monkeypatch.setattr(runner, "require_ray", lambda address: None)
    monkeypatch.setattr(on_workers, "run_on_workers", run)


def test_workers_report_what_one_process_reports(tiny_model, tmp_path, reversed_workers):
    model = ModelConfig(path=str(tiny_model))
    one = runner.evaluate_model(model, EvaluationRun(**SETTINGS), None)
    two = runner.evaluate_model(model, EvaluationRun(**SETTINGS, workers=2), tmp_path / "two.json")
    assert two.engine == one.engine and two.versions == one.versions
    for a, b in zip(one.benchmarks, two.benchmarks, strict=True):
        assert (a.records, a.metrics, a.greedy, a.sampled) == (b.records, b.metrics, b.greedy, b.sampled)
    assert [each.name for each in tmp_path.iterdir()] == ["two.json"]


def test_a_worker_that_finds_another_model_says_so(tiny_model, reversed_workers, monkeypatch):
    monkeypatch.setattr(on_workers, "content_of", lambda renderer, policy: {"weights": "other"})
    with pytest.raises(EngineError, match="a worker finds another model at"):
        runner.evaluate_model(ModelConfig(path=str(tiny_model)), EvaluationRun(**SETTINGS, workers=2), None)
