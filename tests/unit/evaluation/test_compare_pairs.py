"""Two evaluations of held-out pairs, against a count by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError
from posttrain.evaluation.compare_pairs import compare_pairs

ROWS = {"pairs": ["p0", "p1", "p2", "p3"], "prompts": [0, 0, 1, 2], "tie": 0.0, "kl": [0.5, 1.0]}
BASE = ROWS | {"margins": [1.0, -1.0, 2.0, -3.0], "margins_per_token": [0.5, -0.5, 0.0, 1.0]}
OTHER = ROWS | {"margins": [1.0, 1.0, 2.0, -3.0], "margins_per_token": [0.5, -0.5, 1.0, -1.0], "kl": [1.5, 1.0]}


def written(folder: Path, name: str, rows: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_prompts_count_once_and_rows_are_paired(tmp_path: Path) -> None:
    files = written(tmp_path, "base", BASE), written(tmp_path, "other", OTHER)
    changes = {each.measure: each for each in compare_pairs(*files)}
    accuracy = changes["accuracy"]  # of the three prompts 1/2, 1, 0 are right before, and 1, 1, 0 after
    assert (accuracy.base, accuracy.other) == (pytest.approx(1 / 2), pytest.approx(2 / 3))
    assert accuracy.difference == pytest.approx(1 / 6) and accuracy.prompts == 3
    assert accuracy.test.p == 1.0 and accuracy.test.changed == 1
    assert accuracy.low < 0 < accuracy.difference < accuracy.high
    per_token = changes["accuracy per token"]  # 1/2, a tie, 1 before; 1/2, 1, 0 after
    assert (per_token.base, per_token.other) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    assert per_token.difference == pytest.approx(0.0) and per_token.test.changed == 2
    margin = changes["margin"]  # 0, 2, -3 before; 1, 2, -3 after
    assert (margin.base, margin.other) == (pytest.approx(-1 / 3), pytest.approx(0.0))
    assert changes["KL"].difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    "rows",
    [[], "rows", {}, {key: value for key, value in BASE.items() if key != "tie"}, BASE | {"margins": [1.0]}]
    + [BASE | {"prompts": None}],
)
def test_rows_that_are_not_whole(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are not whole"):
        compare_pairs(written(tmp_path, "base", BASE), written(tmp_path, "other", rows))
