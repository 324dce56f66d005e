"""The pipelines from offline to online, shortened: play, learn from all episodes so far, play with what came out."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from posttrain.evaluation.report import Report
from posttrain.pipeline.runner import run_pipeline

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "agents"
PLAYED = {"own": 16, "played_1": 8, "played_2": 8}
TRAINED, MEASURED = ("offline", "online_1", "online_2"), ("base_eval", "offline_eval", "online_1_eval", "online_2_eval")


def small():
    """Changes to either pipeline. A base that is hardly trained ends no action: the first episodes are an agent's."""
    yield "own.agent=weak"
    yield from ("base.training.max_steps=2", "base.data.completions.size=64", "base.tracking.plots=false")
    for name in (*PLAYED, *MEASURED):
        yield from (f"{name}.episodes={PLAYED.get(name, 4)}", f"{name}.environment.max_turns=3")
    for name in TRAINED:
        few = ("training.max_steps=2", "method.actor_freeze_steps=1", "batch.rows_per_step=8", "batch.micro_batch=8")
        yield from (f"{name}.{change}" for change in (*few, "tracking.plots=false"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    first, second = weights(one), weights(other)
    return all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("name", ["digirl_rounds", "archer_rounds"])
def test_each_round_goes_on_with_policy_critic_and_episodes_of_those_before(name, tmp_path):
    run_pipeline(RECIPES / f"{name}.yaml", [f"output={tmp_path}", *small()])
    for before, after in zip(TRAINED, TRAINED[1:], strict=False):
        assert not same(tmp_path / before / "critic", tmp_path / after / "critic")
        recipe = yaml.safe_load((tmp_path / after / "resolved.yaml").read_text())
        assert recipe["critic"]["path"] == str(tmp_path / before / "critic")
    # Played with the policy of the round before, on worlds of its own.
    worlds = [{row["problem"]["prompt"] for row in rows(tmp_path / stage)} for stage in PLAYED]
    assert [len(rows(tmp_path / stage)) for stage in PLAYED] == list(PLAYED.values()) and worlds[1] != worlds[2]
    assert Report.load(tmp_path / "online_2_eval" / "report.json").benchmarks[0].headline()
    assert (tmp_path / "online_gain" / "table.json").is_file()


def rows(stage):
    return [json.loads(line) for line in (stage / "episodes.jsonl").read_text().splitlines()]
