from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from posttrain.config.collection import SampleConfig, TakeInConfig
from posttrain.config.loading import parse_config
from posttrain.data.traces import Trace, manifest_path, read_manifest, read_traces, write_parquet
from posttrain.errors import DataError, RecipeError, StateError
from posttrain.rollouts.collect import Collected, collect
from posttrain.rollouts.take_in import take_in
from posttrain.rollouts.trace_file import TraceFile


def quiet(line: str) -> None:
    """Progress is not looked at here."""


ROWS = [{"prompt": f"{i}+1=", "answer": "0123456789+=;#"[2 * i]} for i in range(6)]
"""The first character that is sampled is right if it is the reference."""


def write_problems(path: Path, *more: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (*ROWS, *more)))
    return path


def of(data: Path) -> dict:
    """The section of the data."""
    return {"prompts": {"path": str(data), "reference": "answer"}}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    return write_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")


@pytest.fixture(scope="module")
def plain(tiny_model, problems) -> dict:
    """Settings without an output."""
    return {
        "model": {"path": str(tiny_model)},
        "data": of(problems),
        "verifier": [{"type": "exact", "pattern": "^(.)"}],
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": 20, "max_new_tokens": 6, "temperature": 1.5},
        "stop_at_correct": 2,
        "samples_per_round": 4,
        "prompts_per_chunk": 2,
        "threads": 1,
    }


@pytest.fixture
def settings(plain, tmp_path):
    """`settings(**keys)`: those with an output in the folder of the test."""
    return lambda **keys: {**plain, "rollouts": {**plain["rollouts"]}, "output": str(tmp_path / "traces.jsonl"), **keys}


@pytest.fixture(scope="module")
def sampled(plain, tmp_path_factory) -> tuple[Collected, list[Trace]]:
    """A run of these settings."""
    return run(plain | {"output": str(tmp_path_factory.mktemp("sampled") / "traces.jsonl")})


@pytest.fixture
def first(sampled, tmp_path) -> Path:
    """The file of that run, in the folder of the test."""
    for path in (sampled[0].path, manifest_path(sampled[0].path)):
        shutil.copy(path, tmp_path)
    return tmp_path / sampled[0].path.name


def run(whole: dict) -> tuple[Collected, list[Trace]]:
    config = parse_config(json.loads(json.dumps(whole)), SampleConfig)
    done = collect(config, Path(config.output), say=quiet)
    return done, read_traces([config.output]).traces


def drawn(traces: list[Trace]) -> dict[tuple[str, int], tuple]:
    return {(t.problem_id, t.sample): (t.ids, t.text, t.verdict, t.reward, t.finished) for t in traces}


def test_rounds_stop_at_enough_correct_ones(sampled):
    done, traces = sampled
    assert (done.prompts, done.traces, done.found) == (6, len(traces), 0)
    assert done.correct == sum(t.correct for t in traces) > 0
    by_problem: dict[str, list[Trace]] = {}
    for trace in traces:
        by_problem.setdefault(trace.problem_id, []).append(trace)
    assert list(by_problem) == [f"prompts/{i}" for i in range(6)]
    counts = set()
    for group in by_problem.values():
        assert [t.sample for t in group] == list(range(len(group)))
        before_the_last_round = sum(t.correct for t in group[: len(group) - 4])
        assert len(group) % 4 == 0 and before_the_last_round < 2
        assert len(group) == 20 or sum(t.correct for t in group) >= 2
        counts.add(len(group))
    assert len(counts) > 1  # some stopped before others


def test_a_trace_says_all_about_itself(sampled, settings):
    done, traces = sampled
    manifest = read_manifest(done.path)
    first = traces[0]
    assert first.prompt == "0+1=" and first.reference == "0" and first.seed == 0 and first.policy_version == 0
    assert first.policy == settings()["model"]["path"] == manifest.policy["label"]
    assert first.manifest == manifest.id and manifest.kind == "sampled" and len(manifest.policy["weights"]) == 64
    assert manifest.sampling["temperature"] == 1.5 and manifest.sampling["stop_at_correct"] == 2
    assert len(first.ids) == len(first.logps) <= 6 and all(value <= 0 for value in first.logps)
    assert first.scores == {"exact": first.outcome} and first.reward == first.outcome
    assert first.problem.reference == "0" and first.problem.meta == {}


def test_the_ledger_charges_every_reading_once(sampled):
    done, traces = sampled
    assert done.new_tokens == sum(len(t.ids) for t in traces)
    # One reading of a prompt of 4 tokens per round of 4 completions.
    assert done.read_tokens == sum(t.read_tokens for t in traces) == len(traces) // 4 * 4
    parameters = read_manifest(done.path).parameters
    assert done.flops == sum(t.flops for t in traces) == 2 * parameters * (done.read_tokens + done.new_tokens)


@pytest.mark.parametrize("changes", [{"prompts_per_chunk": 1}, {"prompts_per_chunk": 100}, {"max_batch": 3}])
def test_draws_do_not_depend_on_chunks(settings, sampled, changes):
    keys, (_, expected) = settings(), sampled
    keys["rollouts"] |= {key: value for key, value in changes.items() if key == "max_batch"}
    _, traces = run(keys | {key: value for key, value in changes.items() if key != "max_batch"})
    assert drawn(traces) == drawn(expected)


def test_a_later_completion_is_the_same_alone(settings, tmp_path):
    _, expected = run(settings(stop_at_correct=None))
    _, traces = run(settings(stop_at_correct=None, samples_per_round=7, output=str(tmp_path / "other.jsonl")))
    assert len(traces) == 6 * 20 and drawn(traces) == drawn(expected)


def test_killed_at_any_moment_and_started_again(settings, sampled, apart, tmp_path):
    expected_run, expected = sampled
    size = expected_run.path.stat().st_size
    keys = settings(output=str(tmp_path / "killed.jsonl"))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(keys))
    script = Path(__file__).with_name("killed_sampling.py")
    moments = [0, 1, *(size * part // 10 for part in (1, 2, 4, 6, 8, 9))]
    process = apart([script, tmp_path / "settings.yaml", *moments], tmp_path / "said")
    process.join(300)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said
    assert int(said.split()[-1]) >= 3
    traces = read_traces([keys["output"]]).traces  # refuses a completion that stands there twice
    assert drawn(traces) == drawn(expected)
    again, _ = run(keys)
    assert again.found == again.traces == len(expected)
    assert again.new_tokens == expected_run.new_tokens
    assert again.flops == sum(t.flops for t in traces) >= expected_run.flops


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.55, 0.999, 1.0])
def test_a_file_cut_anywhere_is_gone_on_with(settings, sampled, first, keep):
    data = first.read_bytes()
    first.write_bytes(data[: int(len(data) * keep)])
    again, traces = run(settings())
    assert again.path == first and drawn(traces) == drawn(sampled[1])
    assert again.found == data[: int(len(data) * keep)].count(b"\n")


def test_a_file_of_other_settings_is_left_alone(settings, tmp_path):
    data = of(write_problems(tmp_path / "problems.jsonl"))
    path = run(settings(data=data))[0].path
    before = path.read_bytes()
    with pytest.raises(StateError, match="sampling: .*'temperature': 1.5.* there, .*'temperature': 1.0.* now"):
        run(settings(data=data, rollouts={"samples_per_prompt": 20, "max_new_tokens": 6}))
    with pytest.raises(StateError, match="seed: 0 there, 1 now"):
        run(settings(data=data, seed=1))
    (tmp_path / "problems.jsonl").write_text(json.dumps({"prompt": "1", "answer": "2"}) + "\n")
    with pytest.raises(StateError, match="problems_hash"):
        run(settings(data=data))
    assert path.read_bytes() == before
    manifest_path(path).unlink()
    with pytest.raises(StateError, match="has no manifest"):
        run(settings(data=data))


def test_one_process_at_a_time(first, apart, tmp_path):
    (tmp_path / "other.py").write_text(
        "import sys; from pathlib import Path; from posttrain.data.traces import read_manifest\n"
        "from posttrain.rollouts.trace_file import TraceFile\n"
        "path = Path(sys.argv[1]); TraceFile(path, read_manifest(path))"
    )
    file = TraceFile(first, read_manifest(first))
    try:
        apart([tmp_path / "other.py", first], tmp_path / "said").join(60)
    finally:
        file.close()
    assert "another process writes to this file" in (tmp_path / "said").read_text()


def test_prompts_that_are_too_long_keep_the_draws_of_others(settings, sampled, tmp_path):
    data = of(write_problems(tmp_path / "problems.jsonl", {"prompt": "1" * 95, "answer": "2"}))
    done, traces = run(settings(data=data | {"max_lost_share": 0.5}))
    assert done.prompts == 6 and drawn(traces) == drawn(sampled[1])


def test_repeated_problems_are_sampled_once(settings, sampled, tmp_path):
    done, traces = run(settings(data=of(write_problems(tmp_path / "problems.jsonl", ROWS[0]))))
    assert done.prompts == 6 and drawn(traces) == drawn(sampled[1])
    assert [trace.problem_id for trace in traces] == [trace.problem_id for trace in sampled[1]]


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"output": "traces.json"}, RecipeError, "collected in a .jsonl file"),
        ({"verifier": []}, RecipeError, "verifier"),
        ({"model": {"path": "x", "peft": {}}}, RecipeError, "no effect on sampling"),
        ({"stop_at_korrect": 1}, RecipeError, "did you mean 'stop_at_correct'"),
    ],
)
def test_mistakes(settings, keys, error, message):
    with pytest.raises(error, match=message):
        run(settings(**keys))


def test_parquet_holds_the_same(sampled, tmp_path):
    done, traces = sampled
    write_parquet(tmp_path / "copy.parquet", traces)
    manifest_path(tmp_path / "copy.parquet").write_text(manifest_path(done.path).read_text())
    assert read_traces([tmp_path / "copy.parquet"]).traces == traces


def test_texts_of_others_are_taken_in(tmp_path, settings):
    rows = [("1+1?", "2", "so 2"), ("1+2?", "3", "so 4"), ("1+1?", "2", "so 3")]
    path = tmp_path / "written.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "answer": a, "solution": s, "level": 1}) + "\n" for p, a, s in rows)
    )
    source = {"path": str(path), "completion": "solution", "reference": "answer"}
    data = {"data": {"completions": source}, "policy": "teacher-7b", "provenance": "drawn at temperature 0.7"}
    config = TakeInConfig(
        **data, output=str(tmp_path / "in.jsonl"), verifier=[{"type": "numeric"}], verifier_pool={"workers": 0}
    )
    done = take_in(config)
    assert (done.traces, done.prompts, done.correct, done.flops) == (3, 2, 1, 0)
    both = read_traces([config.output])
    assert [(t.problem_id, t.sample, t.verdict) for t in both.traces] == [
        ("completions/0", 0, "correct"),
        ("completions/1", 0, "wrong"),
        ("completions/0", 1, "wrong"),
    ]
    trace = both.traces[0]
    assert (trace.policy, trace.ids, trace.logps, trace.meta) == ("teacher-7b", None, None, {"level": 1})
    assert both.manifests[trace.manifest].provenance == "drawn at temperature 0.7"
    with pytest.raises(StateError, match="there already"):
        take_in(config)
    unverified = TakeInConfig(**data, output=str(tmp_path / "plain.jsonl"))
    assert take_in(unverified).unknown == 3
    assert read_traces([unverified.output]).traces[0].outcome is None


def test_problems_of_several_files_are_matched_by_content(tmp_path):
    for name, prompts in (("a", ["1?", "2?"]), ("b", ["3?", "2?"])):
        path = tmp_path / f"{name}.src.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "completion": name}) + "\n" for p in prompts))
        source = {"path": str(path), "completion": "completion"}
        take_in(TakeInConfig(data={"completions": source}, policy=name, output=str(tmp_path / f"{name}.jsonl")))
    both = read_traces([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    ids = {(t.prompt, t.policy): t.problem_id for t in both.traces}
    assert ids[("2?", "a")] == ids[("2?", "b")] == "completions/1"
    assert (ids[("1?", "a")], ids[("3?", "b")]) == ("completions/0", "1:completions/0")
    assert len(both.manifests) == 2 and len(both.by_problem()["completions/1"]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem_id": "p"}', "not a trace: Field required"),
        ("{", "not JSON"),
        (
            '{"problem_id":"p","sample":0,"prompt":"q","text":"t","policy":"m","manifest":"i","ids":[1],"logps":[]}',
            "1 ids",
        ),
    ],
)
def test_bad_rows_name_their_place(first, line, message):
    number = first.read_bytes().count(b"\n") + 1
    with first.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_traces([first])
    assert f"traces.jsonl:{number}" in str(caught.value)


def test_a_trace_file_needs_its_manifest(tmp_path):
    (tmp_path / "traces.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="no manifest lies beside"):
        read_traces([tmp_path / "traces.jsonl"])


def test_a_missing_trace_file_names_the_nearest(tmp_path):
    for name in ("traces.jsonl", "traces.manifest.json"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(DataError, match="no such trace file") as caught:
        read_traces([tmp_path / "trace.jsonl"])
    assert caught.value.hint == "did you mean 'traces.jsonl'?"


def test_rows_are_put_into_order_by_a_rename(first):
    lines = first.read_bytes().splitlines(keepends=True)
    file = TraceFile(first, read_manifest(first))
    try:
        inode = first.stat().st_ino
        file.sort(list(range(len(lines))))
        assert first.stat().st_ino == inode  # in order already
        file.sort([-place for place in range(len(lines))])
        assert first.stat().st_ino != inode
    finally:
        file.close()
    assert first.read_bytes() == b"".join(reversed(lines))
