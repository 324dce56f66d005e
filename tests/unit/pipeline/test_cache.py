from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from posttrain.errors import StateError
from posttrain.pipeline.cache import (
    StageRecord,
    content_hashes,
    differences,
    examine,
    key_of,
    mark_done,
    mark_started,
    move_aside,
)

ARTEFACTS = {"text": "text.txt"}


def wanted(value: int = 1, reads: dict[str, str] | None = None) -> StageRecord:
    inputs = {"kind": "write", "config": {"value": value}}
    return StageRecord("a", key_of(inputs), inputs, reads or {})


def finished(folder: Path, record: StageRecord) -> StageRecord:
    mark_started(folder, record)
    (folder / "text.txt").write_text("x")
    return mark_done(folder, record, ARTEFACTS)


def test_the_key_is_the_hash_of_canonical_json():
    assert key_of({"b": [1.5, None], "a": "é"}) == hashlib.sha256('{"a":"é","b":[1.5,null]}'.encode()).hexdigest()


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({}, {}, []),
        (
            {"config": {"training": {"max_steps": 1000}}},
            {"config": {"training": {"max_steps": 2000}}},
            ["training.max_steps: 1000 -> 2000"],
        ),
        ({"config": {"k": [1]}}, {"config": {"k": [1, 4]}}, ["k.1: (none) -> 4"]),
        ({"config": {"k": []}}, {"config": {"k": [1]}}, ["k: [] -> (none)", "k.0: (none) -> 1"]),
        ({"config": {"a": None}}, {"config": {"a": "x"}}, ["a: null -> x"]),
        ({"config": {"a": 1}}, {"config": {"a": True}}, ["a: 1 -> true"]),
        (
            {"config": {"model": "${a.model}@" + "1" * 64}},
            {"config": {"model": "${a.model}@" + "2" * 64}},
            ["model: ${a.model}@11111111 -> ${a.model}@22222222"],
        ),
        (
            {"files": {"d/a.jsonl": "1", "d/b.jsonl": "1"}},
            {"files": {"d/a.jsonl": "2", "d/c.jsonl": "1"}},
            ["file d/a.jsonl has other content", "file d/b.jsonl is no longer read", "file d/c.jsonl is now read"],
        ),
        ({"versions": {"torch": "2.12"}}, {"versions": {"torch": "2.13"}}, ["version of torch: 2.12 -> 2.13"]),
        ({"code": 1}, {"code": 2}, ["code: 1 -> 2"]),
    ],
)
def test_differences_say_what_changed(old, new, lines):
    assert differences(old, new) == lines


def test_content_hashes_take_folders_file_by_file(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"abc")
    (tmp_path / "b.txt").write_bytes(b"")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content_hashes([tmp_path]) == {
        (tmp_path / "b.txt").as_posix(): hashlib.sha256().hexdigest(),
        (tmp_path / "sub" / "a.txt").as_posix(): abc,
    }


def test_states_of_a_stage_folder(tmp_path: Path):
    folder = tmp_path / "a"
    assert examine(folder, wanted(), ARTEFACTS).state == "new"
    mark_started(folder, wanted())
    assert examine(folder, wanted(), ARTEFACTS).state == "interrupted"
    assert examine(folder, wanted(2), ARTEFACTS).reasons == ["value: 1 -> 2"]
    finished(folder, wanted())
    assert examine(folder, wanted(), ARTEFACTS).state == "done"
    stale = examine(folder, wanted(2), ARTEFACTS)
    assert (stale.state, stale.reasons) == ("stale", ["value: 1 -> 2"])


def test_a_finished_stage_that_begins_again_is_not_done(tmp_path: Path):
    finished(tmp_path, wanted())
    mark_started(tmp_path, wanted())
    assert examine(tmp_path, wanted(), ARTEFACTS).state == "interrupted"


def test_a_lost_artefact_is_named(tmp_path: Path):
    finished(tmp_path, wanted())
    (tmp_path / "text.txt").unlink()
    standing = examine(tmp_path, wanted(), ARTEFACTS)
    assert standing.state == "interrupted"
    assert standing.reasons == [f"text ({tmp_path / 'text.txt'}) is missing"]


def test_a_stage_that_read_an_earlier_execution_is_stale(tmp_path: Path):
    finished(tmp_path, wanted(reads={"base": "first"}))
    assert examine(tmp_path, wanted(reads={"base": "first"}), ARTEFACTS).state == "done"
    standing = examine(tmp_path, wanted(reads={"base": "second"}), ARTEFACTS)
    assert (standing.state, standing.reasons) == ("stale", ["stage base, which it reads, was run again"])


def test_done_is_refused_without_the_artefacts(tmp_path: Path):
    mark_started(tmp_path, wanted())
    with pytest.raises(FileNotFoundError, match="text.txt"):
        mark_done(tmp_path, wanted(), ARTEFACTS)
    assert examine(tmp_path, wanted(), ARTEFACTS).state == "interrupted"


def test_foreign_files_are_not_touched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StateError, match="no stage of a pipeline has written"):
        examine(tmp_path, wanted(), ARTEFACTS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "a"}', '{"unknown": 1}'])
def test_a_damaged_record_is_an_error(tmp_path: Path, text: str):
    (tmp_path / "stage.json").write_text(text)
    with pytest.raises(StateError, match="cannot be read"):
        examine(tmp_path, wanted(), ARTEFACTS)


def test_moving_aside_never_overwrites(tmp_path: Path):
    for expected in ("a.12345678", "a.12345678-2", "a.12345678-3"):
        (tmp_path / "a").mkdir()
        assert move_aside(tmp_path / "a", "1234567890").name == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.12345678", "a.12345678-2", "a.12345678-3"]
