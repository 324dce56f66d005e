"""Beam search and revisions as measures of an evaluation: a model of known skill, a tiny real one, interruptions."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.schema import EvaluationConfig, ModelConfig, TokenizerInit, VerifierPoolConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sources import problems
from posttrain.data.tasks import TASKS
from posttrain.errors import PosttrainError
from posttrain.evaluation.compare import compare_reports
from posttrain.evaluation.journal import Journal
from posttrain.evaluation.report import Report
from posttrain.evaluation.runner import evaluate, evaluate_model
from posttrain.models.tokenizer import build_tokenizer
from posttrain.rollouts.engine import Completion
from posttrain.tracking.metrics import require
from posttrain.verifiers.verdict import Status

TEMPLATE = "{prompt}{answer}|better:"
COUNT = 40


class Reviser:
    """Answers wrongly at first; problem i is right from revision i % 4 on, and its beam search where i is even."""

    policy_version, positions = 0, None

    def __init__(self, tokenizer, renderer, asked) -> None:
        self.tokenizer, self.renderer, self.asked = tokenizer, renderer, asked
        self.by_prompt = {tokenizer.decode(renderer.prompt_ids(p)): i for i, p in enumerate(asked)}

    def generate(self, prompts, sampling):
        return [[self._answer(self.tokenizer.decode(ids), sampling)] * sampling.n for ids in prompts]

    def _answer(self, text, sampling):
        start = next(start for start in self.by_prompt if text.startswith(start))
        number = self.by_prompt[start]
        trace = TASKS["chain_sum"].expert_trace(self.asked[number])
        # A wrong answer ends with one 7 per revision so far; the prompt of a revision holds it.
        done = text.removeprefix(start).removeprefix(trace).removesuffix("|better:")
        before = 0 if text == start else done.count("7") if done else 9
        right = number % 2 == 0 if sampling.beams > 1 else before >= number % 4
        ids = self.tokenizer.encode(trace + ("" if right else "7" * (before + 1))) + [self.tokenizer.eos_token_id]
        return Completion(ids, [0.0] * len(ids), "stop", 0)

    def close(self) -> None:
        """Nothing to release."""


def config(**keys):
    data = {"task": "chain_sum", "levels": [4], "size": COUNT, "split": "test"}
    benchmark = {"name": "sums", "data": data, "verifier": [{"type": "procedural"}]}
    return EvaluationConfig.model_validate({"benchmarks": [benchmark], "max_new_tokens": 64} | keys)


def known(settings, engine_class=Reviser, journal=None):
    tokenizer = build_tokenizer(TokenizerInit(), None)
    renderer = Renderer(tokenizer)
    asked = problems(settings.benchmarks[0].data, "sums")
    engine = engine_class(tokenizer, renderer, list(dict.fromkeys(p.prompt for p in asked)) and asked)
    return evaluate(engine, renderer, VerifierPoolConfig(workers=0), settings, model_label="known", journal=journal)


def test_accuracy_after_each_revision_is_what_the_model_can_do():
    (found,) = known(config(revisions=4, revision_template=TEMPLATE)).benchmarks
    count = len(found.records)
    # Right from revision i % 4 on: a quarter more after each, until all are right.
    for number in range(5):
        expected = sum(index % 4 <= number for index in range(count)) / count
        assert found.headline()[f"revision@{number}"].value == pytest.approx(expected)
    assert found.headline()["revision@0"].value == found.headline()["greedy"].value
    assert found.revised.completions == 5 * count and found.revised.unrevised == 0
    assert found.records[3].revised == (Status.WRONG,) * 3 + (Status.CORRECT,) * 2
    assert found.revised.statuses[Status.CORRECT] == sum(r.revised.count(Status.CORRECT) for r in found.records)


def test_beam_search_is_a_measure_of_its_own():
    report = known(config(beams=3, revisions=1, revision_template=TEMPLATE))
    (found,) = report.benchmarks
    count = len(found.records)
    assert found.headline()["beam@3"].value == pytest.approx((count + 1) // 2 / count)
    assert found.beam.completions == count and found.records[0].beam is Status.CORRECT
    assert Report.from_json(report.to_json()) == report
    # What an answer takes: all beams of a search by likelihood, all samples of pass@k.
    assert found.tokens_of("beam@3") == pytest.approx(3 * found.beam.new_tokens / count)
    assert found.tokens_of("greedy") == pytest.approx(found.greedy.new_tokens / count)
    assert found.tokens_of("pass@1") == found.tokens_of("avg@1") == pytest.approx(found.sampled.new_tokens / count)
    for name in found.metrics:
        assert require(f"eval/sums/{name}").unit == "share"


def test_reports_with_and_without_are_compared_by_what_both_have():
    plain, more = known(config()), known(config(beams=3, revisions=1, revision_template=TEMPLATE))
    names = {change.metric for change in compare_reports(plain, more).changes}
    assert "greedy" in names and not any("revision" in name or "beam" in name for name in names)
    twice = known(config(revisions=2, revision_template=TEMPLATE))
    assert "revision@1" in {change.metric for change in compare_reports(more, twice).changes}
    other = known(config(revisions=1, revision_template="{prompt}{answer}|"))
    with pytest.raises(PosttrainError, match="revision_template"):
        compare_reports(more, other)


def test_what_is_done_is_not_done_again(tmp_path):
    class Counted(Reviser):
        asked_for = 0

        def generate(self, prompts, sampling):
            Counted.asked_for += len(prompts)
            return super().generate(prompts, sampling)

    settings = config(greedy=False, beams=2, revisions=2, revision_template=TEMPLATE, max_batch=2)
    whole = known(settings, Counted)
    alone = Counted.asked_for
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"model": "known"})
    known(settings, Counted, journal)
    journal.close()
    lines = path.read_text().splitlines(keepends=True)
    # Broken off within the revisions: all but the last two chunks are there.
    path.write_text("".join(lines[:-2]) + lines[-2][:20])
    left = sum(len(json.loads(line)["statuses"]) for line in lines[-2:])
    Counted.asked_for = 0
    journal = Journal(path, {"model": "known"})
    again = known(settings, Counted, journal)
    journal.close()
    assert Counted.asked_for == 3 * left < alone
    assert again.benchmarks[0].records == whole.benchmarks[0].records


def test_a_real_model_end_to_end_and_the_command(tiny_model: Path, tmp_path: Path):
    settings = {"benchmarks": ["chain-sum-3"], "limit": 6, "max_new_tokens": 8}
    wanted = EvaluationConfig(**settings, beams=3, revisions=2, revision_template="{prompt}{answer};")
    direct = evaluate_model(ModelConfig(path=str(tiny_model)), wanted, None)
    output = tmp_path / "report.json"
    words = ["eval", str(tiny_model), "--benchmarks", "chain-sum-3", "--limit", "6", "--max-new-tokens", "8"]
    words += ["--beams", "3", "--revisions", "2", "--revision-template", "{prompt}{answer};", "--output", str(output)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    for name in ("beam@3", "revision@0", "revision@1", "revision@2"):
        assert name in result.output
    saved = Report.load(output).benchmarks[0]
    assert saved.records == direct.benchmarks[0].records and saved.metrics == direct.benchmarks[0].metrics
    assert saved.beam == direct.benchmarks[0].beam and saved.revised == direct.benchmarks[0].revised


def test_answers_without_room_for_a_revision_stay_and_are_counted(tiny_model: Path):
    template = "{prompt}{answer}" + 80 * ";"  # of 96 positions
    settings = {"benchmarks": ["chain-sum-3"], "limit": 6, "max_new_tokens": 8}
    wanted = EvaluationConfig(**settings, revisions=2, revision_template=template)
    (found,) = evaluate_model(ModelConfig(path=str(tiny_model)), wanted, None).benchmarks
    assert found.revised.unrevised == 12 and found.revised.completions == 18


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"revisions": 1}, "needs `revision_template`"),
        ({"revision_template": TEMPLATE}, "no effect without `revisions`"),
        ({"revisions": 1, "revision_template": "{answer}"}, "no {prompt}"),
        ({"beams": 1}, "greater than or equal to 2"),
    ],
)
def test_sections_without_sense_are_refused(keys, word):
    with pytest.raises(ValueError, match=word):
        config(**keys)
