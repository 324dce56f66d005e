"""Prompts with the completions of other rows, and what check and train make of unpaired rows."""

import json

import pytest
from typer.testing import CliRunner

from posttrain.cli.check import check_recipe
from posttrain.cli.main import app
from posttrain.config.loading import load_recipe
from posttrain.data.sample import Origin, Sample
from posttrain.errors import DataError
from posttrain.methods import CONFIGS
from posttrain.trainers.run import train
from posttrain.trainers.step_ratios import mismatched


def sample(prompt, completion):
    return Sample([*prompt, *completion], [0] * len(prompt) + [1] * len(completion), Origin.EXPERT)


def test_every_prompt_gets_the_next_completion():
    rows = [sample([1], [5, 6]), sample([2, 2], [7]), sample([3], [8, 9])]
    found = mismatched(rows, None)
    assert [(one.ids, one.loss_mask) for one in found] == [
        ([1, 7], [0, 1]),
        ([2, 2, 8, 9], [0, 0, 1, 1]),
        ([3, 5, 6], [0, 1, 1]),
    ]
    assert rows[0].ids == [1, 5, 6]


def test_a_partner_has_another_prompt_and_another_completion():
    # Two completions of one prompt, and a completion that two prompts have in common.
    rows = [sample([1], [5]), sample([1], [6]), sample([2], [5]), sample([3], [7])]
    assert [one.ids for one in mismatched(rows, None)] == [[1, 7], [1, 5], [2, 7], [3, 5]]


@pytest.mark.parametrize(
    "rows",
    [[sample([1], [5])], [sample([1], [5]), sample([1], [6])], [sample([1], [5]), sample([2], [5])]],
    ids=["alone", "one prompt", "one completion"],
)
def test_rows_without_a_partner_are_left_out(rows):
    assert mismatched(rows, None) == [None] * len(rows)


def test_a_completion_that_does_not_fit_is_cut():
    rows = [sample([1] * 6, [5, 6]), sample([2], [7] * 7)]
    found = mismatched(rows, 8)
    assert found[0].ids == [1] * 6 + [7] * 2 and found[0].loss_mask == [0] * 6 + [1] * 2
    assert found[1].ids == [2, 5, 6]


def test_the_reference_point_is_one_number_of_the_step_for_every_micro_batch(load, tmp_path):
    """The metric itself; that weights agree is shown by the contract."""
    found = []
    for micro_batch in (16, 4):
        changes = {"batch.micro_batch": micro_batch, "output": str(tmp_path / str(micro_batch))}
        run = train(load({"name": "kto", "beta": 0.5}, changes)).run_dir
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([row["unpaired/reference_point"] for row in rows if "loss" in row])
    assert found[0][0] == 0.0 and max(found[0]) > 0.0  # the policy begins as its reference
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-6)


def test_check_shows_a_row_with_its_label(write_recipe):
    checked = CliRunner().invoke(app, ["check", str(write_recipe({"name": "kto"}))])
    assert checked.exit_code == 0, checked.output + str(checked.exception)
    assert "completion unpaired/0" in checked.output and "numbers of the row: label 0.0" in checked.output


def test_check_and_train_refuse_rows_of_one_label(write_recipe, tmp_path):
    recipe = write_recipe({"name": "bco"})
    file = tmp_path / "unpaired.jsonl"
    rows = [json.loads(line) | {"label": True} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    for ask in (
        lambda: check_recipe(recipe, [], online=False, world_size=1),
        lambda: train(load_recipe(recipe, [], CONFIGS)),
    ):
        with pytest.raises(DataError, match="all 40 rows are labelled true"):
            ask()
