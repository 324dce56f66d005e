"""Refilled rollouts: which groups are taken, the share that is estimated, and runs that die and go on."""

import json
from math import comb

import pytest
import torch
import yaml

from posttrain.config.schema import RefillConfig
from posttrain.contract.shell import DESCENT, same_model, same_run
from posttrain.data.sample import Origin, Sample
from posttrain.errors import NeedsError, RecipeError
from posttrain.methods import METHODS
from posttrain.methods.base import Scored
from posttrain.trainers.refill import Refill, factor
from posttrain.trainers.rows import refuse
from posttrain.trainers.run import train


def group(number, rewards):
    return [
        Sample([1, 2, 3], [0, 1, 1], Origin.POLICY, f"p/{number}", number, reward=reward, outcome=reward)
        for reward in rewards
    ]


def filled(informative, wanted, waves, **config):
    """A rollout whose draws have a signal where `informative` says 1."""
    refill = Refill(RefillConfig(waves=waves, **config), wanted)

    def sample(first):
        draws = range(first, first + wanted)
        return [one for n in draws for one in group(n, [1.0, 0.0] if informative[n] else [1.0, 1.0])]

    return refill, refill.fill(sample)


def problems(groups):
    return [one[0].problem_id for one in groups]


def test_groups_with_a_signal_are_taken_in_the_order_of_their_draws():
    refill, found = filled([0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1], wanted=4, waves=3)
    assert problems(found.groups) == ["p/1", "p/3", "p/4", "p/6"]
    assert [one.group for one in found.groups[2]] == [2, 2]  # numbered anew
    assert (found.draws, found.surplus, found.informative, found.factor) == (7, 1, 4, 0.5)
    assert (refill.drawn, len(found.seen), found.tokens) == (7, 14, 16)
    assert filled([1, 1, 1, 1], wanted=4, waves=3)[1].factor == 1.0


def test_at_the_cap_the_rest_is_filled_up_and_not_trained_on():
    refill, found = filled([0, 0, 0, 1, 0, 0], wanted=3, waves=2, unbiased=True)
    assert problems(found.groups) == ["p/3", "p/0", "p/1"]
    assert (found.draws, found.informative, refill.drawn) == (6, 1, 6)
    assert found.factor == pytest.approx(1 / 6)
    zeros, known = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    scored = Scored(zeros, zeros, known, torch.tensor([0, 0, 1, 1, 2, 2]), zeros, known, 8)
    advantages, keep = refill.taken(scored, torch.ones(6), known)
    assert keep.tolist() == [True, True, False, False, False, False]
    assert advantages.tolist() == pytest.approx([1 / 6] * 6)
    said, metrics = [], {}
    for _ in range(2):
        refill.report(lambda name, total, n: metrics.update({name: total / n}), said.append)
    assert len(said) == 1 and "of 6 prompts 1 gave completions that differ" in said[0] and "harder prompts" in said[0]
    assert metrics["refill/filled_share"] == pytest.approx(1 / 3) and metrics["refill/accuracy"] == 11 / 12


@pytest.mark.parametrize(("wanted", "most"), [(4, 12), (8, 16), (8, 80)])
def test_the_estimated_share_is_unbiased_and_the_plain_one_is_not(wanted, most):
    """Over all numbers of draws by their probability; a draw has a signal with the share of a mixture of prompts."""
    share = 0.39234125
    full = {n: comb(n - 1, wanted - 1) * share**wanted * (1 - share) ** (n - wanted) for n in range(wanted, most + 1)}
    short = {k: comb(most, k) * share**k * (1 - share) ** (most - k) for k in range(wanted)}
    assert sum(full.values()) + sum(short.values()) == pytest.approx(1, abs=1e-12)
    cut = sum(p * factor(k, wanted, most) for k, p in short.items())
    assert sum(p * factor(wanted, wanted, n) for n, p in full.items()) + cut == pytest.approx(share, abs=1e-12)
    assert sum(p * wanted / n for n, p in full.items()) + cut > 1.02 * share


# ------------------------------------------------------------------------------------------------------------ runs

REFILL = {"rollouts.refill.waves": 3, "rollouts.samples_per_prompt": 2, "batch.micro_batch": 8}


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_run_is_charged_for_what_it_throws_away_and_goes_on_bit_for_bit(load, tmp_path):
    steps = {**REFILL, "training.save_steps": 2, "rollouts.refill.unbiased": True}
    grpo = {"name": "grpo", "updates_per_rollout": 2}
    whole = train(load(grpo, {**steps, "training.max_steps": 7, "output": str(tmp_path / "whole")}))
    train(load(grpo, {**steps, "training.max_steps": 3, "output": str(tmp_path / "parts")}))  # within a rollout
    resumed = train(load(grpo, {**steps, "training.max_steps": 7, "output": str(tmp_path / "parts")}), resume="auto")
    same_run(whole.run_dir, resumed.run_dir)
    rows = metrics(whole.run_dir)
    drawn = [row for row in rows if "refill/draws" in row]
    assert len(drawn) == 4 and all(4 <= row["refill/draws"] <= 12 for row in drawn)
    assert any(row["refill/draws"] > 4 for row in drawn)
    assert all(row["informative_groups"] == 1 for row in drawn if row["refill/filled_share"] == 1)
    for row in drawn:
        groups = row["refill/draws"] + row["refill/surplus"]
        assert row["tokens_sampled"] >= 2 * groups  # every completion has a token at least
        assert row["refill/thrown_tokens"] < row["tokens_sampled"]


def test_two_ranks_fill_up_the_same_groups(load, make_recipe_data, tiny_model, on_two_ranks, tmp_path):
    changes = {**DESCENT, **REFILL, "batch.micro_batch": 4, "training.max_steps": 3}
    alone = train(load({"name": "grpo"}, changes)).run_dir
    data = make_recipe_data(tiny_model, tmp_path, {"name": "grpo"}, {**changes, "output": str(tmp_path / "two")})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(data))
    on_two_ranks(tmp_path / "two.yaml")
    same_model(alone, tmp_path / "two", tiny_model, 1e-3)
    for one, other in zip(metrics(alone), metrics(tmp_path / "two"), strict=True):
        assert one["refill/draws"] == other["refill/draws"]
        assert one["tokens_sampled"] == other["tokens_sampled"]


def test_without_any_signal_nothing_is_trained_on_and_somebody_says_so(load, capfd, tmp_path):
    """A random model is never right."""
    recipe = load({"name": "grpo"}, {**REFILL, "verifier": [{"type": "procedural"}], "training.max_steps": 2})
    run = train(recipe).run_dir
    rows = metrics(run)
    assert [row["refill/filled_share"] for row in rows] == [0, 0]
    assert all(row["grad_norm"] == 0 for row in rows)
    said = " ".join(capfd.readouterr().out.split())
    assert "of 12 prompts 0 gave completions that differ in reward" in said  # the cap: three waves of four
    assert "take easier prompts, prefixes or a supervised start" in said and "rollouts.refill.waves" in said


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ({"name": "opd", "teacher": "GUIDE"}, {"rollouts.refill.waves": 2}, "takes no reward"),
        ({"name": "grpo"}, {**REFILL, "rollouts.delay": 1}, "stale rollouts ask before"),
        ({"name": "ppo"}, {**REFILL, "rollouts.samples_per_prompt": 1}, "a group of one completion"),
        (
            {"name": "opd", "teacher": "GUIDE", "outcome_coef": 1.0},
            {**REFILL, "rollouts.refill.unbiased": True},
            "not linear in the advantages",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(method, changes, says, load):
    recipe = load(method, changes)
    with pytest.raises((NeedsError, RecipeError), match=says):
        refuse(recipe, METHODS[method["name"]](recipe.method))
