import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import StateError
from posttrain.state.checkpoint import (
    SET_ASIDE,
    STAGING,
    STATE_FILE,
    _seal,
    checkpoint_step,
    checkpoints,
    commit,
    complete_checkpoints,
    damage,
    find_checkpoint,
    read_state,
    remove,
    retain,
    set_aside,
    sweep,
)

FILES = {"model.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 100, "deep/shard.bin": b"x", "empty": b""}


def make(folder, step, files=FILES, **state):
    staged = folder / STAGING / f"checkpoint-{step}"
    for name, content in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(content)
    commit(staged, folder / f"checkpoint-{step}", {"step": step, **state})
    return folder / f"checkpoint-{step}"


def names(paths):
    return [path.name for path in paths]


def test_commit_moves_seals_and_leaves_out_pickles(tmp_path):
    checkpoint = make(tmp_path, 3, FILES | {"training_args.bin": b"pickle"}, method={"temperature": 0.1})
    state = read_state(checkpoint)
    assert (state["step"], state["method"]) == (3, {"temperature": 0.1})
    assert sorted(state["files"]) == sorted(FILES)
    assert state["files"]["model.safetensors"]["bytes"] == 700
    assert not (checkpoint / "training_args.bin").exists()
    assert list((tmp_path / STAGING).iterdir()) == []
    assert damage(checkpoint) is None


def test_a_state_with_nan_is_sealed_too(tmp_path):
    assert damage(make(tmp_path, 1, loss=float("nan"), text="\u2028é")) is None


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint-7", 7), ("checkpoint-", None), ("checkpoint-7.tmp", None), ("checkpoint-²", None), ("other", None)],
)
def test_names(tmp_path, name, step):
    assert checkpoint_step(tmp_path / name) == step


def test_only_whole_ones_are_found_newest_last(tmp_path):
    for step in (2, 10, 9):
        make(tmp_path, step)
    (tmp_path / "checkpoint-10" / STATE_FILE).unlink()
    (tmp_path / "notes").mkdir()
    assert names(checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert names(complete_checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-9"]
    found = find_checkpoint(tmp_path, "auto")
    assert found.checkpoint.name == "checkpoint-9"
    assert names(found.damaged) == ["checkpoint-10"]
    assert find_checkpoint(tmp_path / "none", "auto").checkpoint is None


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


DAMAGE = [
    (lambda c: flip(c / "optimizer.pt", 5), "the content of optimizer.pt does not match its checksum"),
    (lambda c: (c / "optimizer.pt").write_bytes(b"moments"), "optimizer.pt has 7 bytes instead of 700"),
    (lambda c: (c / "deep" / "shard.bin").unlink(), "deep/shard.bin is missing"),
    (lambda c: (c / STATE_FILE).write_text("{"), "not readable as JSON"),
    (lambda c: (c / STATE_FILE).write_bytes(b"\xff\xfe"), "not readable as JSON"),
    (lambda c: (c / STATE_FILE).write_text("[" * 100_000), "not readable as JSON"),
    (lambda c: (c / STATE_FILE).write_text("[]"), "format None"),
    (lambda c: (c / STATE_FILE).write_text('{"format": 1}'), "format 1; this version reads format 3"),
    (lambda c: edit_state(c, step=4), "does not match its checksum"),
]


def edit_state(checkpoint, **values):
    path = checkpoint / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("harm", "reason"), DAMAGE)
def test_damage_is_named_and_passed_over(tmp_path, harm, reason):
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    harm(newest)
    assert reason in damage(newest)
    found = find_checkpoint(tmp_path, "auto")
    assert found.checkpoint.name == "checkpoint-1" and reason in found.damaged[newest]
    with pytest.raises(StateError, match="cannot resume from this checkpoint") as caught:
        find_checkpoint(tmp_path, str(newest))
    assert reason in str(caught.value) and "checkpoint-1" in caught.value.hint


def test_nothing_undamaged_is_an_error_and_no_fresh_start(tmp_path):
    flip(make(tmp_path, 1) / "model.safetensors", 0)
    with pytest.raises(StateError, match="every checkpoint is damaged: checkpoint-1: the content of model"):
        find_checkpoint(tmp_path, "auto")


def test_a_missing_one_is_named(tmp_path):
    with pytest.raises(StateError, match="there is no such folder"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-5"))


def test_a_manifest_may_not_point_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    checkpoint = make(tmp_path, 1)
    state = read_state(checkpoint)
    state["files"] = {"../secret": {"bytes": 1, "sha256": "0"}}
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {"seal": _seal(state)}))
    assert "outside" in damage(checkpoint)


def test_retention_counts_whole_ones_and_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    assert retain(tmp_path, None) == []
    assert names(retain(tmp_path, 2)) == ["checkpoint-1", "checkpoint-3"]
    assert names(checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    (tmp_path / "checkpoint-5" / STATE_FILE).unlink()
    retain(tmp_path, 1)
    assert names(complete_checkpoints(tmp_path)) == ["checkpoint-4"]


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    kept = make(tmp_path, 1)
    (tmp_path / STAGING / "checkpoint-2").mkdir(parents=True)
    (tmp_path / ".removing-checkpoint-0").mkdir()
    (tmp_path / "notes").mkdir()
    sweep(tmp_path)
    assert sorted(names(tmp_path.iterdir())) == ["checkpoint-1", "notes"]
    remove(kept)
    remove(kept)
    assert names(tmp_path.iterdir()) == ["notes"]
    sweep(tmp_path / "none")


def test_what_is_in_the_way_is_set_aside(tmp_path):
    make(tmp_path, 1, run="old")
    make(tmp_path, 1, run="new")
    assert read_state(tmp_path / "checkpoint-1")["run"] == "new"
    assert read_state(tmp_path / SET_ASIDE / "checkpoint-1")["run"] == "old"
    assert set_aside(tmp_path / "checkpoint-1").name == "checkpoint-1-2"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make(tmp_path_factory.mktemp("pristine"), 1)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_and_no_truncation_goes_unnoticed(pristine, tmp_path_factory, data):
    checkpoint = tmp_path_factory.getbasetemp() / "fuzz" / "checkpoint-1"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(pristine, checkpoint)
    file = checkpoint / data.draw(st.sampled_from([STATE_FILE, "model.safetensors", "optimizer.pt", "deep/shard.bin"]))
    position = data.draw(st.integers(0, file.stat().st_size - 1))
    if data.draw(st.booleans()):
        flip(file, position, data.draw(st.integers(0, 7)))
    else:
        file.write_bytes(file.read_bytes()[:position])
    if file.name == STATE_FILE and same_json(file, pristine / STATE_FILE):  # white space at the end
        return
    with pytest.raises(StateError, match="damaged"):
        find_checkpoint(checkpoint.parent, "auto")


def same_json(one, other):
    try:
        return json.loads(one.read_bytes()) == json.loads(other.read_bytes())
    except ValueError:
        return False
