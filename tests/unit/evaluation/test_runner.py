"""Whole evaluations: real tasks, tokenizer, renderer and verifiers; an engine whose accuracy is known."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from posttrain.config.schema import EvaluationConfig, ModelConfig, TokenizerInit, VerifierPoolConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.data.tasks import TASKS
from posttrain.errors import DataError, EngineError, RecipeError
from posttrain.evaluation.report import Report
from posttrain.evaluation.runner import evaluate, evaluate_model, problem_hash
from posttrain.models.tokenizer import build_tokenizer
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.verifiers import pool
from posttrain.verifiers.pool import VerifierPool, _Worker
from posttrain.verifiers.verdict import Status

IN_PROCESS = VerifierPoolConfig(workers=0)


class KnownEngine:
    """Answers right with a known probability, else wrongly or, cut at the limit, not at all; and keeps count."""

    policy_version = 0

    def __init__(self, tokenizer, renderer: Renderer, asked: list[Problem], accuracy: float, seed: int = 0) -> None:
        self.tokenizer, self.accuracy, self.rng = tokenizer, accuracy, random.Random(seed)
        self.by_prompt = {tuple(renderer.prompt_ids(problem)): problem for problem in asked}
        self.outcomes: dict[str, list[list[str]]] = {}
        self.lengths: Counter[str] = Counter()

    def generate(self, prompts, sampling: Sampling) -> list[list[Completion]]:
        name = "greedy" if sampling.greedy else "sampled"
        groups = [[self._complete(tuple(prompt), name) for _ in range(sampling.n)] for prompt in prompts]
        self.outcomes[name] = [[outcome for outcome, _ in group] for group in groups]
        return [[completion for _, completion in group] for group in groups]

    def sync(self, version: int) -> None:
        raise EngineError("an evaluation does not change the weights")

    def close(self) -> None:
        raise EngineError("the caller's engine stays open")

    def _complete(self, prompt: tuple[int, ...], name: str) -> tuple[str, Completion]:
        trace = TASKS["chain_sum"].expert_trace(self.by_prompt[prompt])
        outcome = "right" if self.rng.random() < self.accuracy else self.rng.choice(("wrong", "cut"))
        text = {"right": trace, "wrong": trace + "7", "cut": trace.partition("#")[0]}[outcome]
        ids = self.tokenizer.encode(text) + [self.tokenizer.eos_token_id] * (outcome != "cut")
        self.lengths[name] += len(ids)
        return outcome, Completion(ids, [0.0] * len(ids), "length" if outcome == "cut" else "stop", 0)


def _config(**keys) -> EvaluationConfig:
    data = {"task": "chain_sum", "levels": [4], "size": 200, "split": "test"}
    benchmark = {"name": "sums", "data": data, "verifier": [{"type": "procedural"}]}
    return EvaluationConfig.model_validate({"benchmarks": [benchmark], "samples": 4, "k": [1, 2, 4]} | keys)


def _evaluate(
    config: EvaluationConfig, accuracy: float = 0.6, seed: int = 0, pool: VerifierPoolConfig = IN_PROCESS
) -> tuple[Report, KnownEngine]:
    tokenizer = build_tokenizer(TokenizerInit(), None)
    renderer = Renderer(tokenizer)
    asked = problems(config.benchmarks[0].data, "sums")
    engine = KnownEngine(tokenizer, renderer, asked, accuracy, seed)
    return evaluate(engine, renderer, pool, config, model_label="known"), engine


@pytest.mark.parametrize("accuracy", [0.05, 0.6, 0.95])
def test_numbers_equal_a_hand_count_and_intervals_hold_the_truth(accuracy: float):
    report, engine = _evaluate(_config(), accuracy)
    (found,) = report.benchmarks
    greedy, sampled = engine.outcomes["greedy"], engine.outcomes["sampled"]
    count, metrics = len(sampled), found.headline()
    assert len(found.records) == count
    assert metrics["greedy"].value == pytest.approx(sum(group == ["right"] for group in greedy) / count)
    assert metrics["avg@4"].value == pytest.approx(sum(group.count("right") for group in sampled) / (4 * count))
    pairs = [("right" in pair) for group in sampled for pair in itertools.combinations(group, 2)]
    assert metrics["pass@2"].value == pytest.approx(sum(pairs) / len(pairs))
    assert metrics["pass@4"].value == pytest.approx(sum("right" in group for group in sampled) / count)
    assert metrics["pass@1"] == metrics["avg@4"]
    for name, truth in {"greedy": 1, "avg@4": 1, "pass@2": 2, "pass@4": 4}.items():
        assert metrics[name].low <= 1 - (1 - accuracy) ** truth <= metrics[name].high
        assert metrics[name].problems == count


def test_benchmarks_of_equal_verifiers_share_a_worker(monkeypatch: pytest.MonkeyPatch):
    started: list[int] = []

    class Counted(_Worker):
        def __init__(self, pool: VerifierPool) -> None:
            super().__init__(pool)
            started.append(self.process.pid)

    monkeypatch.setattr(pool, "_Worker", Counted)
    benchmark = _config().benchmarks[0].model_dump(mode="json", exclude_unset=True)
    other = benchmark | {"name": "other", "verifier": [{"type": "procedural", "profile": "lenient"}]}
    config = _config(benchmarks=[benchmark, other, benchmark | {"name": "again"}], limit=8)
    report, _ = _evaluate(config, pool=VerifierPoolConfig())
    assert len(started) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    sums, _, again = report.benchmarks
    assert sums.problem_hash == again.problem_hash and again.sampled.completions == 32


def test_lengths_truncation_and_verdicts_equal_a_hand_count():
    report, engine = _evaluate(_config())
    (found,) = report.benchmarks
    for name, counts in (("greedy", found.greedy), ("sampled", found.sampled)):
        outcomes = Counter(outcome for group in engine.outcomes[name] for outcome in group)
        assert counts.completions == outcomes.total()
        assert counts.truncated == outcomes["cut"]
        assert counts.statuses[Status.CORRECT] == outcomes["right"]
        assert counts.statuses[Status.NO_ANSWER] == outcomes["cut"]
        assert counts.no_answer_rate == counts.truncation_rate == outcomes["cut"] / outcomes.total()
        assert counts.new_tokens == engine.lengths[name]
        assert counts.mean_length == engine.lengths[name] / outcomes.total()
        assert counts.unknown == {}
    record, group = found.records[7], engine.outcomes["sampled"][7]
    assert (record.samples, record.judged, record.correct) == (4, 4, group.count("right"))


def test_a_report_says_how_it_was_made():
    report, _ = _evaluate(_config(temperature=0.7, max_new_tokens=99, seed=5))
    (found,) = report.benchmarks
    assert (report.model_label, report.engine) == ("known", "KnownEngine")
    assert {"posttrain", "torch", "transformers", "math-verify", "python"} <= report.versions.keys()
    assert (found.sampling.temperature, found.sampling.max_new_tokens, found.sampling.seed) == (0.7, 99, 5)
    assert [(verifier["type"], verifier["profile"]) for verifier in found.verifier] == [("procedural", "strict")]
    assert found.revision.startswith("posttrain ")
    assert found.licence is None  # nobody said
    assert found.data["levels"] == [4]


def test_greedy_can_be_left_out_and_a_benchmark_may_set_its_token_limit():
    config = _config(greedy=False)
    benchmark = config.benchmarks[0].model_copy(update={"max_new_tokens": 33})
    report, engine = _evaluate(config.model_copy(update={"benchmarks": [benchmark]}))
    (found,) = report.benchmarks
    assert list(engine.outcomes) == ["sampled"]
    assert found.greedy is None
    assert "greedy" not in found.metrics
    assert {record.greedy for record in found.records} == {None}
    assert found.sampling.max_new_tokens == 33


def test_limit_takes_the_first_problems_and_changes_the_hash():
    whole, first = (_evaluate(config)[0].benchmarks[0] for config in (_config(), _config(limit=10)))
    assert [record.id for record in first.records] == [record.id for record in whole.records[:10]]
    assert first.problem_hash != whole.problem_hash


def test_repeated_problems_count_once():
    data = {"task": "chain_sum", "levels": [2], "size": 120, "split": "test"}
    config = _config(benchmarks=[{"name": "sums", "data": data, "verifier": [{"type": "procedural"}]}])
    prompts = [problem.prompt for problem in problems(config.benchmarks[0].data, "sums")]
    found = _evaluate(config)[0].benchmarks[0]
    assert len(found.records) == len(set(prompts)) < 120
    assert found.repeated == 120 - len(set(prompts))
    assert found.metrics["greedy"].problems == len(set(prompts))


def test_json_round_trip(tmp_path: Path):
    report, _ = _evaluate(_config())
    assert Report.from_json(report.to_json()) == report
    path = tmp_path / "evaluation" / "step-1.json"
    report.save(path)
    assert Report.load(path) == report
    assert [file.name for file in path.parent.iterdir()] == ["step-1.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw | {"schema": 99}, "schema version 99"),
        (lambda raw: {"hello": 1}, "not an evaluation report"),
        (lambda raw: {key: value for key, value in raw.items() if key != "versions"}, "versions"),
        (lambda raw: raw | {"benchmarks": [{"name": "sums"}]}, "damaged"),
    ],
)
def test_files_that_are_no_report_are_refused(change, message: str, tmp_path: Path):
    raw = json.loads(_evaluate(_config(limit=5))[0].to_json())
    path = tmp_path / "report.json"
    path.write_text(json.dumps(change(raw)))
    with pytest.raises(DataError, match=message) as caught:
        Report.load(path)
    assert caught.value.where == str(path)


def test_half_a_file_and_no_file_are_refused(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(_evaluate(_config(limit=5))[0].to_json()[:300])
    with pytest.raises(DataError, match="not JSON"):
        Report.load(path)
    with pytest.raises(DataError, match="no such report"):
        Report.load(tmp_path / "absent.json")


# ------------------------------------------------------------------------------------------------- files and mistakes


class SayingEngine:
    """Gives every prompt the same answers."""

    policy_version = 0

    def __init__(self, tokenizer, answers: list[str]) -> None:
        self.completions = [
            Completion(ids, [0.0] * len(ids), "stop", 0)
            for ids in ([*tokenizer.encode(answer), tokenizer.eos_token_id] for answer in answers)
        ]

    def generate(self, prompts, sampling: Sampling) -> list[list[Completion]]:
        return [self.completions[: sampling.n] for _ in prompts]

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


def _file_benchmark(tmp_path: Path, rows: list[dict], verifier: str, **keys) -> EvaluationConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = {"name": "rows", "data": {"path": str(path)} | keys, "verifier": [{"type": verifier}]}
    return EvaluationConfig.model_validate({"benchmarks": [benchmark], "samples": 2, "k": [1, 2]})


def _say(config: EvaluationConfig, answers: list[str]) -> Report:
    tokenizer = build_tokenizer(TokenizerInit(), None)
    return evaluate(SayingEngine(tokenizer, answers), Renderer(tokenizer), IN_PROCESS, config, model_label="saying")


def test_unknown_verdicts_are_left_out_and_counted(tmp_path: Path):
    rows = [{"prompt": f"{i}?", "gold": gold} for i, gold in enumerate(["4", "5", "not a number"])]
    found = _say(_file_benchmark(tmp_path, rows, "numeric", reference="gold"), ["4", "5"]).benchmarks[0]
    assert found.sampled.unknown == {Status.BAD_REFERENCE: 2}
    assert [(record.judged, record.correct) for record in found.records] == [(2, 1), (2, 1), (0, 0)]
    assert [record.greedy for record in found.records] == [Status.CORRECT, Status.WRONG, Status.BAD_REFERENCE]
    assert found.metrics["greedy"].problems == found.metrics["avg@2"].problems == 2
    assert found.metrics["avg@2"].value == 0.5
    assert found.metrics["pass@2"].value == 1.0


def test_the_majority_answer_is_counted_where_verdicts_name_answers(tmp_path: Path):
    rows = [{"prompt": "1+1=", "gold": "2"}, {"prompt": "1+2=", "gold": "3"}]
    config = _file_benchmark(tmp_path, rows, "numeric", reference="gold")
    config = config.model_copy(update={"samples": 5, "maj": [1, 5]})
    found = _say(config, ["2", "2", "3", "4", "nothing"]).benchmarks[0]
    assert [record.votes for record in found.records] == [(1, 1), (2, 1)]
    assert found.metrics["maj@5"].value == 0.5  # 2 wins both: right once
    assert found.metrics["maj@1"].value == pytest.approx(3 / 10)
    assert found.metrics["avg@5"].value == pytest.approx(3 / 10)
    assert _say(config.model_copy(update={"maj": []}), ["2"] * 5).benchmarks[0].records[0].votes == ()


def test_a_benchmark_that_cannot_be_judged_has_no_numbers(tmp_path: Path):
    rows = [{"prompt": "1+1="}, {"prompt": "1+2="}]
    report = _say(_file_benchmark(tmp_path, rows, "procedural"), ["#2", "#3"])
    assert report.benchmarks[0].headline() == {}
    assert set(report.benchmarks[0].metrics) == {"greedy", "avg@2", "pass@1", "pass@2"}
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("verifier", ["math", "exact", "numeric"])
def test_missing_references_are_an_error_with_their_place(verifier: str, tmp_path: Path):
    with pytest.raises(DataError, match="needs a reference") as caught:
        _say(_file_benchmark(tmp_path, [{"prompt": "1+1="}], verifier), ["2", "2"])
    assert "rows.jsonl" in caught.value.where
    assert "`reference`" in caught.value.hint


@pytest.mark.parametrize(
    ("keys", "where", "message"),
    [
        ({"k": [1, 5]}, "evaluation.k.1", "pass@5 cannot be estimated from 4"),
        ({"k": [0]}, "evaluation.k.0", "pass@0"),
        ({"maj": [5]}, "evaluation.maj.0", "maj@5 cannot be estimated from 4"),
        ({"maj": [4]}, "evaluation.maj", "says which answer"),
        ({"benchmarks": ["gsm8K"]}, "evaluation.benchmarks.0", "did you mean 'gsm8k'"),
        ({"benchmarks": ["chain-sum-3", "chain-sum-3"]}, "evaluation.benchmarks.1", "two benchmarks"),
    ],
)
def test_mistakes_in_the_recipe_are_found_before_anything_runs(keys: dict, where: str, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        evaluate(None, None, IN_PROCESS, _config(**keys), model_label="")
    assert caught.value.where == where


def test_a_mistake_in_the_last_benchmark_costs_no_completion(tmp_path: Path):
    bad = _file_benchmark(tmp_path, [{"prompt": "1+1="}], "exact").benchmarks[0]
    renderer = Renderer(build_tokenizer(TokenizerInit(), None))
    engine = KnownEngine(renderer.tokenizer, renderer, [], 0.5)
    with pytest.raises(DataError, match="needs a reference"):
        evaluate(engine, renderer, IN_PROCESS, _config(benchmarks=["chain-sum-4", bad]), model_label="")
    assert engine.outcomes == {}


def test_the_hash_sees_content_and_order_but_not_ids():
    one, two = Problem("a/0", "1+1=", "2"), Problem("a/1", "1+2=", "3")
    assert problem_hash([one, two]) == problem_hash([Problem("b/7", "1+1=", "2"), two])
    assert (
        len(
            {
                problem_hash(p)
                for p in (
                    [one, two],
                    [two, one],
                    [one],
                    [one, Problem("a/1", "1+2=", "4")],
                    [one, Problem("a/1", "1+2=", "3", chat=False)],
                )
            }
        )
        == 5
    )


# ------------------------------------------------------------------------------------------------------- real models


def test_evaluate_model_from_recipe_sections(tmp_path: Path):
    model = ModelConfig.model_validate({"init": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64}})
    config = EvaluationConfig.model_validate(
        {"benchmarks": ["chain-sum-3"], "samples": 2, "max_new_tokens": 6, "limit": 8, "k": [2]}
    )
    first = evaluate_model(model, config, tmp_path / "one.json")
    second = evaluate_model(model, config, None)
    (found,) = first.benchmarks
    assert Report.load(tmp_path / "one.json") == first
    assert found.records == second.benchmarks[0].records
    assert found.metrics["avg@2"].value == 0.0
    assert 0.1 < found.metrics["avg@2"].high < 0.5  # eight problems, none right, is no proof of 0
    assert (found.greedy.completions, found.sampled.completions) == (8, 16)
    assert found.sampled.truncated > 0


def test_an_adapter_section_is_refused():
    model = ModelConfig.model_validate({"path": "any", "peft": {"r": 4}})
    with pytest.raises(RecipeError, match="no effect"):
        evaluate_model(model, _config(), None)


def test_prompts_and_completions_are_kept_to_be_read():
    report, engine = _evaluate(_config(samples=9, limit=20))
    (found,) = report.benchmarks
    record, right = found.records[0], engine.outcomes["greedy"][0] == ["right"]
    assert record.prompt.endswith("=") and record.prompt.count("+") == 3 and record.reference
    assert [each.made for each in record.completions] == ["greedy"] + ["sampled"] * 8  # of 9: not more than is read
    greedy = record.completions[0]
    assert (greedy.status is Status.CORRECT) is right is greedy.text.endswith(f"#{record.reference}")
    sampled = [each.status is Status.CORRECT for each in record.completions[1:]]
    assert sampled == [outcome == "right" for outcome in engine.outcomes["sampled"][0][:8]]
    assert Report.from_json(report.to_json()) == report
