"""The pipelines with critics, shortened: OREO in rounds, step-level DAPO, DR-PO by a learnt reward."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from posttrain.evaluation.report import Report
from posttrain.pipeline.runner import run_pipeline

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "critics"
# A base of two steps is never right, so a shaping term is what makes rewards differ.
JUDGED = json.dumps([{"type": "procedural"}, {"type": "format", "pattern": ".*[0-4].*", "weight": 0.5}])


def base(*evaluations):
    rest = [f"{name}.{change}" for name in evaluations for change in ("limit=3", "max_new_tokens=8")]
    return ["base.training.max_steps=2", "base.data.completions.size=64", "base.tracking.plots=false", *rest]


def sampled(name):
    changes = (
        "data.prompts.size=12",
        "rollouts.samples_per_prompt=4",
        "rollouts.max_new_tokens=8",
        f"verifier={JUDGED}",
        "verifier_pool.workers=0",
    )
    return [f"{name}.{change}" for change in changes]


def offline(name):
    changes = ("training.max_steps=2", "batch.rows_per_step=8", "batch.micro_batch=8", "tracking.plots=false")
    return [f"{name}.{change}" for change in changes]


SMALL = {
    "oreo_rounds": [
        *base("base_eval", "round_1_eval", "round_2_eval"),
        *sampled("traces"),
        *sampled("traces_2"),
        *offline("round_1"),
        *offline("round_2"),
    ],
    "dapo_step_both": [*base("base_eval", "policy_eval"), *sampled("traces"), *offline("critic"), *offline("policy")],
    "drpo_preferences": [
        *base("base_eval", "drpo_eval"),
        *sampled("traces"),
        "pairs.unfinished=true",
        *offline("reward"),
        "drpo.data.traces.keep=all",
        "drpo.data.prompts.size=12",
        "drpo.rollouts.max_new_tokens=8",
        "drpo.batch.prompts_per_step=4",
        "drpo.batch.micro_batch=8",
        "drpo.training.max_steps=2",
        "drpo.tracking.plots=false",
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`finished(name)` -> folder of the pipeline's run."""

    def run(name):
        folder = tmp_path_factory.mktemp(name)
        run_pipeline(RECIPES / f"{name}.yaml", [f"output={folder}", *SMALL[name]])
        return folder

    return run


def moved(one, other, folder):
    """Whether the weights of two stages differ."""
    first, second = (load_file(stage / folder / "model.safetensors") for stage in (one, other))
    return any(not first[name].equal(second[name]) for name in first)


def test_oreo_goes_on_with_policy_and_critic_of_the_round_before(finished):
    run = finished("oreo_rounds")
    assert moved(run / "round_1", run / "round_2", "model") and moved(run / "round_1", run / "round_2", "critic")
    first, second = ((run / name / "traces.jsonl").read_text().splitlines() for name in ("traces", "traces_2"))
    assert len(first) == len(second) and first != second  # the new policy's
    assert Report.load(run / "round_2_eval" / "report.json").benchmarks[0].headline()
    assert (run / "second_round" / "table.json").is_file()


def test_the_policy_of_dapo_is_trained_by_the_critic_before(finished):
    run = finished("dapo_step_both")
    assert not moved(run / "base", run / "critic", "model") and moved(run / "base", run / "policy", "model")
    assert not moved(run / "critic", run / "policy", "critic")
    assert (run / "result" / "table.json").is_file()


def test_drpo_is_rewarded_by_the_model_of_the_pairs(finished):
    run = finished("drpo_preferences")
    rows = [json.loads(line) for line in (run / "drpo" / "metrics.jsonl").read_text().splitlines()]
    (rollout,) = [row for row in rows if "reward" in row]  # of two updates
    assert rollout["reward"] != 0 and rollout["reward/reset"] != 0
    assert (run / "result" / "table.json").is_file()
