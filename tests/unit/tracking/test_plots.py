from __future__ import annotations

import math
from pathlib import Path
from statistics import median

import pytest
from PIL import Image

from posttrain.errors import DataError
from posttrain.tracking.metrics import MetricError
from posttrain.tracking.plots import moving_average, plot_comparison, plot_run
from posttrain.tracking.tracker import Tracker


def write_run(run_dir: Path, steps: int = 80, *, evaluate: bool = True, **extra: float) -> Path:
    tracker = Tracker(run_dir, console="off", total_steps=steps)
    for step in range(1, steps + 1):
        tracker.log(step, {"reward": step / steps, "accuracy": 0.9 * step / steps, "loss": math.sin(step)} | extra)
        if evaluate and step % 20 == 0:
            names = ("", "_low", "_high")
            tracker.log(
                step, {f"eval/a/greedy{n}": step / steps + d for n, d in zip(names, (0, -0.1, 0.1), strict=True)}
            )
    tracker.close(plots=False)
    return run_dir


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture that is not blank."""
    assert path.stat().st_size > 5_000
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
        assert len(colours) > 20
        return image.size


def test_panels_grow_with_what_a_run_logged(tmp_path: Path) -> None:
    (small,) = plot_run(write_run(tmp_path / "small"))
    assert small == tmp_path / "small" / "plots" / "curves.png"
    extra = {"kl": 0.1, "entropy": 0.5, "completion_length": 90.0, "truncated_share": 0.9, "grad_norm": 1.0}
    (large,) = plot_run(write_run(tmp_path / "large", **extra))
    (width, height), (wide, high) = size_of(small), size_of(large)
    assert wide > width and high > height


def test_runs_that_are_awkward_to_draw(tmp_path: Path) -> None:
    (single,) = plot_run(write_run(tmp_path / "single", steps=1, evaluate=False))
    size_of(single)
    (constant,) = plot_run(write_run(tmp_path / "nan", kl=math.nan, grad_norm=0.0, learning_rate=1e-6))
    size_of(constant)

    supervised = Tracker(tmp_path / "sft", console="off", total_steps=2, headline="loss")
    supervised.log(0, {"eval/a/avg@4": 0.5})
    supervised.log(1, {"loss": 1.0, "grad_norm": 1.0})
    supervised.log(2, {"loss": 0.5, "grad_norm": 5_000.0})
    supervised.close(plots=True)
    size_of(tmp_path / "sft" / "plots" / "curves.png")


def test_reward_that_equals_accuracy_is_drawn_once(tmp_path: Path) -> None:
    run = Tracker(tmp_path / "run", console="off", total_steps=2)
    for step in (1, 2):
        run.log(step, {"reward": step / 2, "accuracy": step / 2})
    run.close(plots=True)
    size_of(tmp_path / "run" / "plots" / "curves.png")


def test_comparison(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / method / "seed-0") for method in ("grpo", "rloo")]
    for metric in ("accuracy", "eval/a/greedy"):
        out = plot_comparison(runs, metric, tmp_path / "new" / f"{metric.replace('/', '-')}.png")
        size_of(out)


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no metrics"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="nothing to draw"):
        plot_run(tmp_path)
    run = write_run(tmp_path / "run", steps=2)
    with pytest.raises(DataError, match="no metric 'reward_std'") as error:
        plot_comparison([run], "reward_std", tmp_path / "out.png")
    assert "'reward'" in error.value.hint
    with pytest.raises(MetricError):
        plot_comparison([run], "rewrad", tmp_path / "out.png")
    with pytest.raises(DataError, match="no run"):
        plot_comparison([], "reward", tmp_path / "out.png")


def test_moving_average() -> None:
    assert moving_average([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    assert moving_average([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert moving_average([0.0, 1.0, 2.0, 3.0, 4.0], 3)[1:-1] == [1.0, 2.0, 3.0], "a line stays where it is"
    assert moving_average([1.0, 100.0, 1.0], 3, median)[1] == 1.0
    assert math.isnan(moving_average([math.nan], 3)[0])
