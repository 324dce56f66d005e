from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from posttrain.errors import DataError, StateError
from posttrain.tracking.events import metrics_of, read_events, series
from posttrain.tracking.metrics import MetricError
from posttrain.tracking.tracker import Tracker


def tracker(run_dir: Path, *, main_process: bool = True, stream: io.StringIO | None = None) -> Tracker:
    return Tracker(run_dir, console="plain", total_steps=10, main_process=main_process, stream=stream or io.StringIO())


def lines(run_dir: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_step_is_one_line_at_once(tmp_path: Path) -> None:
    run = tracker(tmp_path / "run")
    run.log(1, {"reward": 1 / 3, "tokens_trained": 12345678901, "learning_rate": 1e-6})
    (event,) = lines(tmp_path / "run")
    assert event.pop("time") > 1.7e9
    assert event == {"step": 1, "reward": 0.3333333, "tokens_trained": 12345678901, "learning_rate": 1e-06}
    run.log(2, {"reward": 0.5})
    run.log(2, {"eval/gsm8k/greedy": 0.25})
    assert [event["step"] for event in lines(tmp_path / "run")] == [1, 2, 2]
    run.close(plots=False)


def test_nonfinite_values_are_null_and_named(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.log(1, {"reward": 0.5, "loss": math.nan, "reward_std": math.inf})
    run.close(plots=False)
    entry, *raised = lines(tmp_path)
    assert (entry["loss"], entry["reward_std"], entry["nonfinite"]) == (None, None, ["loss", "reward_std"])
    assert [event["alarm"] for event in raised] == ["loss nonfinite", "reward_std nonfinite"]
    assert math.isnan(metrics_of(read_events(tmp_path / "metrics.jsonl")[0])["loss"])


def test_alarms_are_written_and_shown(tmp_path: Path) -> None:
    stream = io.StringIO()
    run = tracker(tmp_path, stream=stream)
    for step in (1, 2, 3, 4):
        run.log(step, {"reward": 0.0, "unknown_share": 0.5})
    run.close(plots=False)
    (event,) = [event for event in lines(tmp_path) if "alarm" in event]
    assert (event["step"], event["alarm"], event["metric"], event["value"]) == (
        2,
        "unknown_share high",
        "unknown_share",
        0.5,
    )
    assert event["text"].startswith("unknown_share 0.5 is above 0.05")
    assert stream.getvalue().count("ALARM at step 2: unknown_share 0.5") == 1
    assert stream.getvalue().count("ALARM") == 1


def test_an_undeclared_name_is_logged_with_a_word(tmp_path: Path, undeclared, caplog) -> None:
    run = tracker(tmp_path)
    for step in (1, 2):
        run.log(step, {"reward": 1.0, "rewrad": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text().count('"rewrad": 1.0') == 2
    (said,) = [record.getMessage() for record in caplog.records]  # once
    assert "'rewrad'" in said


def test_the_headline_must_be_declared(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="fun"):
        Tracker(tmp_path, console="off", total_steps=1, headline="fun")


def test_rewind_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in range(1, 6):
        first.log(step, {"reward": step / 10})
    first.log(4, {"eval/gsm8k/greedy": 0.5})
    first.close(plots=False)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 6, "rew')

    resumed = tracker(tmp_path)
    resumed.rewind(3)
    assert [event["step"] for event in lines(tmp_path)] == [1, 2, 3]
    resumed.log(4, {"reward": 0.9})
    resumed.close(plots=False)
    events = read_events(tmp_path / "metrics.jsonl")
    assert series(events, "reward") == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.9])
    assert series(events, "eval/gsm8k/greedy") == ([], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_an_alarm_does_not_come_again_after_a_resume(tmp_path: Path) -> None:
    def alarm_steps() -> list[int]:
        return [event["step"] for event in lines(tmp_path) if "alarm" in event]

    first = tracker(tmp_path)
    for step in range(1, 7):
        first.log(step, {"loss": math.nan, "truncated_share": 0.9 if step >= 4 else 0.0})
    first.close(plots=False)
    assert alarm_steps() == [1, 6]
    resumed = tracker(tmp_path)
    resumed.rewind(5)
    assert alarm_steps() == [1]
    for step in (6, 7):
        resumed.log(step, {"loss": math.nan, "truncated_share": 0.9})
    resumed.close(plots=False)
    assert alarm_steps() == [1, 6]


def test_rewind_of_a_run_without_metrics_starts_one(tmp_path: Path) -> None:
    run = tracker(tmp_path / "run")
    run.rewind(0)
    run.log(1, {"reward": 0.0})
    assert [event["step"] for event in lines(tmp_path / "run")] == [1]
    run.close(plots=False)


def test_two_runs_are_not_mixed(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    first.log(1, {"reward": 0.1})
    first.close(plots=False)
    second = tracker(tmp_path)
    with pytest.raises(StateError, match="earlier run"):
        second.log(1, {"reward": 0.2})
    assert [event["reward"] for event in lines(tmp_path)] == [0.1]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    stream = io.StringIO()
    rank1 = tracker(tmp_path / "run", main_process=False, stream=stream)
    rank1.log(1, {"reward": 0.1})
    rank1.message("hello")
    rank1.rewind(0)
    rank1.close(plots=True)
    assert stream.getvalue() == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"step": 1, "time": 1.0}\nnonsense\n{"step": 2, "time": 2.0}\n', "metrics.jsonl:2"),
        ('{"step": 1, "time": 1.0}\n{"reward": 1}\n', "metrics.jsonl:2"),
        ('{"step": 1, "time": 1.0}\n{"step": 2}\n', "metrics.jsonl:2"),
        ('[1]\n{"step": 1}\n', "metrics.jsonl:1"),
    ],
)
def test_damaged_files_are_named_by_line(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_events(tmp_path / "metrics.jsonl")
    assert error.value.where.endswith(where)


def test_close_draws_the_plots(tmp_path: Path) -> None:
    stream = io.StringIO()
    run = tracker(tmp_path, stream=stream)
    for step in range(1, 4):
        run.log(step, {"reward": 0.1 * step})
    run.close(plots=True)
    assert (tmp_path / "plots" / "curves.png").is_file()
    assert "curves.png" in stream.getvalue()
