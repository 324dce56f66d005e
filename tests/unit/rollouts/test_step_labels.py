"""Monte-Carlo labels of steps: from where completions go on, what their verdicts make of a step, what is left out."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.collection import StepLabelConfig
from posttrain.config.loading import load_recipe
from posttrain.config.schema import ModelConfig
from posttrain.contract.recipes import write_traces
from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.methods import CONFIGS
from posttrain.models.tokenizer import load_tokenizer
from posttrain.rollouts.engine import Completion
from posttrain.rollouts.step_labels import StepReport, labelled
from posttrain.trainers.run import train
from posttrain.verifiers.verdict import Judgement, Status, Verdict


@pytest.fixture(scope="module")
def renderer():
    return Renderer(load_tokenizer(ModelConfig(init={"tokenizer": {"type": "characters"}})))


def config(**more):
    given = {"model": {"path": "m"}, "traces": ["t.jsonl"], "verifier": [{"type": "exact"}], "output": "o.jsonl"}
    return StepLabelConfig.model_validate(given | {"separator": ";", "samples": 2} | more)


class Written:
    """An engine that goes on with given texts, and remembers what it was asked."""

    def __init__(self, renderer, texts):
        self.renderer, self.texts, self.asked = renderer, texts, []

    def generate(self, contexts, sampling):
        self.asked += [self.renderer.text(context) for context in contexts]
        self.numbers = sampling.prompt_numbers
        eos = self.renderer.tokenizer.eos_token_id
        return [
            [Completion([*self.renderer.encoder.encode(text), eos], [], "stop", 0) for text in self.texts]
            for _ in contexts
        ]


class EndsIn:
    """Right if the whole answer ends in 6; nobody can judge one that ends in ?."""

    def judge(self, problems, texts, tokens, ids):
        self.seen = texts
        return [self._judgement(text) for text in texts]

    def _judgement(self, text):
        if text.endswith("?"):
            return Judgement({"exact": Verdict(Status.TIMEOUT, None)}, None, None)
        outcome = float(text.endswith("6"))
        return Judgement({"exact": Verdict(Status.CORRECT if outcome else Status.WRONG, outcome)}, outcome, outcome)


def trace(renderer, text):
    prompt, eos = renderer.encoder.encode("1+2+3="), renderer.tokenizer.eos_token_id
    ids = [*renderer.encoder.encode(text), eos]
    return KnownTrace(Problem("p", "1+2+3="), prompt, ids, [1] * len(ids))


def run(renderer, text, texts, **more):
    engine, judge, report = Written(renderer, texts), EndsIn(), StepReport()
    rows = list(labelled([trace(renderer, text)], config(**more), engine, renderer, judge, first=3, report=report))
    return rows, engine, judge, report


def test_completions_go_on_behind_each_step_and_the_last_has_the_traces_own_verdict(renderer):
    rows, engine, judge, report = run(renderer, "1+2=3;3+3=6", ["3+3=6", "9"])
    assert engine.asked == ["1+2+3=1+2=3;"]
    assert judge.seen == ["1+2=3;3+3=6", "1+2=3;9", "1+2=3;3+3=6"]
    (found,) = rows
    assert (found.steps, found.shares, found.judged) == (["1+2=3", "3+3=6"], [0.5, 1.0], [2, 1])
    assert (report.sampled, report.unknown) == (2, 0)


def test_what_nobody_can_judge_counts_for_nothing(renderer):
    rows, _, _, report = run(renderer, "1+2=3;3+3=9", ["?", "6"])
    assert (rows[0].shares, rows[0].judged) == ([1.0, 0.0], [1, 1]) and report.unknown == 1
    rows, _, _, report = run(renderer, "1+2=3;3+3=9", ["?", "?"])
    assert not rows and report.unjudged == 1
    rows, _, _, report = run(renderer, "1+2=3;?", ["6", "6"])
    assert not rows and report.unjudged == 1


def test_draws_do_not_depend_on_what_stands_in_the_chunk(renderer):
    engine = run(renderer, "1+2=3;3+3=6;6", ["6", "6"])[1]
    assert engine.numbers == (30_000, 30_001)


def test_rows_from_the_command_line_train_a_process_reward_model(tiny_model, tmp_path, write_recipe):
    traces = write_traces(tmp_path / "traces.jsonl")
    settings = {
        "model": {"path": str(tiny_model)},
        "traces": [str(traces)],
        "verifier": [{"type": "procedural"}],
        "verifier_pool": {"workers": 0},
        "separator": ";",
        "samples": 2,
        "max_new_tokens": 8,
        "threads": 1,
        "output": str(tmp_path / "steps.jsonl"),
    }
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump(settings))
    done = CliRunner().invoke(app, ["prepare", "steps", str(tmp_path / "steps.yaml")])
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "steps.report.json").read_text())
    assert report["rows"] == len(rows) > 20 and report["steps"] == sum(len(row["labels"]) for row in rows)
    right = [row for row in rows if row["labels"][-1]]
    assert right and len(right) < len(rows)  # a trace's own verdict is its last label
    assert all(len(row["completions"]) == len(row["labels"]) == len(row["shares"]) for row in rows)
    recipe = write_recipe({"name": "prm", "separator": ";"})
    changes = [f"data.stepwise.path={tmp_path / 'steps.jsonl'}", "training.max_steps=1"]
    assert train(load_recipe(recipe, changes, CONFIGS)).steps == 1
