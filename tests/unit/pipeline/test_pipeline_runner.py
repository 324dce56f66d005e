from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

import posttrain
from posttrain.errors import DataError, PosttrainError, RecipeError, RecipeErrors, StackError, StateError

CHAIN = """
- name: a
  write: {text: hello}
- name: b
  write: {text: "${a.text} world"}
- name: c
  write: {text: unrelated}
- name: d
  write: {text: "${b.text} !"}
"""
SCRIPT = Path(__file__).with_name("written_stage.py")


def attempts(stage: str) -> list[str]:
    return (Path("out") / stage / "attempts.log").read_text().split()


def folders() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir() if path.is_dir())


def states(printed: str) -> dict[str, str]:
    """Stage -> last state printed for it, without times."""
    headers = [line.split() for line in printed.splitlines() if line.startswith("[")]
    return {words[1]: words[3] for words in headers}


def test_stages_run_in_order_and_are_cached(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    assert states(run(path)) == dict.fromkeys("abcd", "done")
    assert Path("out/d/text.txt").read_text() == "hello world !"
    assert states(run(path)) == dict.fromkeys("abcd", "cached")
    assert attempts("a") == ["fresh"]


def test_a_change_reruns_what_reads_it_and_keeps_the_old_files(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    run(path)
    printed = run(path, "a.text=bye")
    assert states(printed) == {"a": "done", "b": "done", "c": "cached", "d": "done"}
    assert Path("out/d/text.txt").read_text() == "bye world !"
    assert "text: hello -> bye" in printed
    [old] = [name for name in folders() if name.startswith("a.")]
    assert (Path("out") / old / "text.txt").read_text() == "hello"
    assert f"earlier files are kept in {Path('out') / old}" in printed
    assert [name.split(".")[0] for name in folders()] == ["a", "a", "b", "b", "c", "d", "d"]


def test_values_without_effect_and_the_output_folder_leave_the_key_alone(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    run(path)
    assert states(run(path, "a.pause=nowhere")) == dict.fromkeys("abcd", "cached")
    Path("out").rename("moved")
    assert states(run(path, "output=moved")) == dict.fromkeys("abcd", "cached")


def test_a_changed_data_file_changes_the_key(pipeline_file, run, write_kind):
    path = pipeline_file("- name: a\n  write: {text: x, data: {path: rows.jsonl}}")
    Path("rows.jsonl").write_text('{"prompt": "1"}')
    run(path)
    assert states(run(path)) == {"a": "cached"}
    Path("rows.jsonl").write_text('{"prompt": "2"}')
    printed = run(path)
    assert states(printed) == {"a": "done"}
    assert "file rows.jsonl has other content" in printed


def test_a_new_version_of_the_code_changes_the_key(pipeline_file, run, write_kind, monkeypatch):
    path = pipeline_file("- {name: a, write: {text: x}}")
    run(path)
    monkeypatch.setattr(write_kind, "code_version", 2)
    assert "code: 1 -> 2" in run(path)
    before = posttrain.__version__
    monkeypatch.setattr(posttrain, "__version__", "99.0")
    assert f"version of posttrain: {before} -> 99.0" in run(path)


def test_forced_stages_run_again_with_those_that_read_them(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    run(path)
    printed = run(path, force=["b"])
    assert states(printed) == {"a": "cached", "b": "done", "c": "cached", "d": "done"}
    assert "stage b, which it reads, was run again" in printed


def test_a_forced_stage_is_not_forgotten_when_the_run_ends_before_its_readers(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    run(path)
    run(path, force=["b"], until="c")
    assert states(run(path)) == {"a": "cached", "b": "cached", "c": "cached", "d": "done"}


def test_until_stops_after_a_stage(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    assert states(run(path, until="b")) == {"a": "done", "b": "done"}
    assert folders() == ["a", "b"]


@pytest.mark.parametrize("option", [{"until": "bb"}, {"force": ["bb"]}])
def test_unknown_stages_in_options(pipeline_file, run, write_kind, option):
    path = pipeline_file("- {name: base, write: {text: x}}\n- {name: bbb, write: {text: x}}")
    with pytest.raises(RecipeError, match="no stage 'bb' in this pipeline\n  did you mean 'bbb'?"):
        run(path, **option)
    assert not Path("out").exists()


def test_nothing_runs_if_a_later_stage_is_wrong(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN + "- name: e\n  write: {text: x, bad: true}\n- name: f\n  write: {text: x, bad: true}\n")
    with pytest.raises(RecipeErrors) as caught:
        run(path)
    assert [str(error) for error in caught.value.errors] == [
        "pipeline.yaml:12: stage e: text: bad from the start",
        "pipeline.yaml:14: stage f: text: bad from the start",
    ]
    assert not Path("out").exists()


def test_a_plain_path_to_an_artefact_is_refused(pipeline_file, run, write_kind):
    path = pipeline_file(
        "- {name: a, write: {text: x}}\n- {name: b, write: {text: x, data: {path: ./out/a/text.jsonl}}}"
    )
    with pytest.raises(RecipeError, match=r"made by stage 'a'.*\n  write \$\{a.text\}"):
        run(path)


def test_a_failed_stage_is_gone_on_with(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    with pytest.raises(DataError, match="cannot write"):
        run(path, "b.fail=true")
    assert folders() == ["a", "b"]
    printed = run(path)
    assert states(printed) == {"a": "cached", "b": "done", "c": "done", "d": "done"}
    assert attempts("b") == ["fresh", "continued"]


def test_an_attempt_with_other_inputs_is_not_gone_on_with(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    with pytest.raises(DataError):
        run(path, "b.fail=true")
    printed = run(path, "b.text=other")
    assert "text: ${a.text}@" in printed
    assert attempts("b") == ["fresh"]
    assert [name.split(".")[0] for name in folders()] == ["a", "b", "b", "c", "d"]


def test_an_attempt_that_left_nothing_useful_is_moved_aside(pipeline_file, run, write_kind):
    path = pipeline_file("- {name: a, write: {text: x}}")
    with pytest.raises(DataError):
        run(path, "a.fail=true")
    Path("out/a/part.txt").unlink()
    assert "before there was anything to go on from" in run(path)
    assert attempts("a") == ["fresh"]
    assert len(folders()) == 2


def test_a_stage_that_lost_an_artefact_runs_again(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    run(path)
    Path("out/b/text.txt").unlink()
    printed = run(path)
    assert states(printed) == {"a": "cached", "b": "done", "c": "cached", "d": "done"}
    assert f"text ({Path('out/b/text.txt')}) is missing" in printed


def test_a_killed_run_is_gone_on_with(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    Path("wait").touch()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path), "b.pause=wait"],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(posttrain.__file__).parents[1])},
    )
    try:
        deadline = time.monotonic() + 60
        while not Path("out/b/part.txt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(StateError, match=f"process {process.pid} on"):
            run(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert not Path("out/b/stage.json").exists()
    printed = run(path)
    assert f"process {process.pid} on " in printed
    assert states(printed) == {"a": "cached", "b": "done", "c": "done", "d": "done"}
    assert attempts("b") == ["fresh", "continued"]
    assert Path("out/d/text.txt").read_text() == "hello world !"


def test_interruption_says_how_to_go_on(pipeline_file, run, write_kind, monkeypatch, capsys):
    path = pipeline_file("- {name: a, write: {text: x}}")

    def interrupted(self, resolve, *, interrupted):
        raise KeyboardInterrupt

    monkeypatch.setattr(write_kind, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        from posttrain.pipeline.runner import run_pipeline

        run_pipeline(path, ["a.text=two words"])
    printed = capsys.readouterr().out
    assert "[1/1] a (write) interrupted" in printed
    assert "to go on from here: posttrain run pipeline.yaml 'a.text=two words'" in printed


def test_nothing_of_a_stage_stays_alive_for_the_next(pipeline_file, run, write_kind, monkeypatch):
    path = pipeline_file("- {name: a, write: {text: x}}\n- {name: b, write: {text: x}}")
    alive: list[weakref.ref] = []
    whole = write_kind.run

    class Model:
        pass

    def run_with_a_cycle(self, resolve, *, interrupted):
        assert all(reference() is None for reference in alive)
        model = Model()
        model.itself = model
        alive.append(weakref.ref(model))
        whole(self, resolve, interrupted=interrupted)

    monkeypatch.setattr(write_kind, "run", run_with_a_cycle)
    gc.disable()
    try:
        run(path)
    finally:
        gc.enable()
    assert len(alive) == 2


def test_several_ranks_are_refused(pipeline_file, run, write_kind, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StackError, match="one of 2"):
        run(pipeline_file(CHAIN))


def test_foreign_folders_are_refused(pipeline_file, run, write_kind):
    path = pipeline_file(CHAIN)
    Path("out/b").mkdir(parents=True)
    Path("out/b/mine.txt").touch()
    with pytest.raises(PosttrainError, match="no stage of a pipeline has written"):
        run(path)
    assert folders() == ["b"]
    assert Path("out/b/mine.txt").exists()
