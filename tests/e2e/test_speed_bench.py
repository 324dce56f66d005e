"""The speed benchmark itself: its two sides compute the same, and its picture is made from its figures."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "train_speed.py"
KINDS = ("policy", "ragged", "prefix", "short-prompt", "one-completion", "mix", "dpo", "simpo", "reference")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("workload", KINDS)
def test_both_sides_compute_the_same(workload: str, tmp_path: Path) -> None:
    done = run(workload, "--size", "1m", "--check", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found["loss_difference"] <= 1e-5 and "speed" not in found
    assert workload == "reference" or 0 < found["gradient_difference"] <= 1e-4


@pytest.mark.slow
def test_both_sides_compute_the_same_on_pictures() -> None:
    command = [sys.executable, str(SCRIPT.with_name("picture_speed.py")), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" x ") == 10 + 1  # five families, two shapes, and the head of the table


@pytest.mark.slow
def test_both_sides_generate_the_same(tmp_path: Path) -> None:
    workloads = ("rollout", "rollout-prefixes")
    done = run(*workloads, "--size", "1m", "--check", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [one["workload"] for one in found] == [*workloads]
    assert all(one["token_difference"] == 0.0 for one in found)


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    done = run("policy", "--size", "1m", "--scale", "ranks", "--check", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [one["varied"] for one in found] == [["ranks", 1], ["ranks", 2]]
    for one in found:
        assert one["loss_difference"] <= 1e-5 and 0 < one["gradient_difference"] <= 1e-4
    assert found[0]["rank_difference"] == 0.0 and found[1]["rank_difference"] <= 1e-4


def test_a_picture_of_saved_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(workload: str, speed: float, **more: object) -> dict[str, object]:
        return {"workload": workload, "size": "1m", "varied": None, "speed": speed, **more}

    results = [line("policy", 1.0), line("policy", 3.0, memory=4.0), line("dpo", 0.9)]
    scale = [line("policy", float(n), varied=["group", n]) for n in (8, 2, 4)]
    for name, rows in (("table", results), ("scale", scale)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": rows}))
    monkeypatch.syspath_prepend(SCRIPT.parent)
    main = runpy.run_path(str(SCRIPT))["main"]

    def called(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        main()

    called("--draw", tmp_path / "table.json", tmp_path / "scale.json", "--image", tmp_path / "new" / "speed.png")
    assert (tmp_path / "new" / "speed.png").read_bytes().startswith(b"\x89PNG")
    no_image = ("--draw", tmp_path / "table.json")
    for wrong in (no_image, ("dpo", "--scale", "group"), ("--scale", "group"), ("dpo", "--scale", "ranks")):
        with pytest.raises(SystemExit, match="2"):
            called(*wrong)
