"""Checkpoints that others wrote: nothing in them is run, and none of their names leads out of them.

Before they were signed a resume took any whose checksums were right, as those of everybody's are, and DeepSpeed and
FSDP unpickled them; tests/e2e/test_launch.py has that in a real launch.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from posttrain.errors import StateError
from posttrain.state.checkpoint import STATE_FILE, _seal, commit, damage
from posttrain.state.identity import settings
from posttrain.trainers.resume import begin


class Boom:
    """Touches a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


def written(folder: Path, mark: Path, name: str = "global_step1/mp_rank_00_model_states.pt", made_by=None) -> Path:
    """A checkpoint as a run of DeepSpeed writes it, signed by whoever has the secret now."""
    staged, target = folder / ".saving", folder / "checkpoint-1"
    (staged / name).parent.mkdir(parents=True)
    (staged / name).write_bytes(pickle.dumps(Boom(mark)))
    (staged / "trainer_state.json").write_text("{}")
    commit(staged, target, {"step": 1, "made_by": made_by or {}})
    return target


@pytest.mark.parametrize(
    "name",
    ["global_step1/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp"]
    + ["pytorch_model.bin", "training_args.pkl", "model.pt", "OPTIMIZER.PT", "sub/optimizer.pt", "rng_state_0.pth.bin"],
)
def test_somebody_elses_checkpoint_is_refused(name: str, mark: Path, tmp_path: Path, monkeypatch) -> None:
    from posttrain.state.checkpoint import refuse_foreign
    from posttrain.state.signature import sign

    checkpoint = written(tmp_path / "checkpoints", mark, name)
    assert damage(checkpoint) is None
    refuse_foreign(checkpoint)  # one's own
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    with pytest.raises(StateError, match="not written by a run of this user") as raised:
        refuse_foreign(checkpoint)
    assert "--trust-checkpoint" in raised.value.hint
    sign("x")  # the other user has a secret too
    with pytest.raises(StateError, match="not written by a run of this user"):
        refuse_foreign(checkpoint)


def test_a_resume_refuses_it_unless_it_is_told_to(mark: Path, tmp_path: Path, load, monkeypatch) -> None:
    recipe = load({"name": "sft"})
    run_dir = tmp_path / "run"
    written(run_dir / "checkpoints", mark, made_by=settings(recipe, 1))
    assert begin(recipe, run_dir, "auto", (), 1).checkpoint is not None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    for resume in ("auto", str(run_dir / "checkpoints" / "checkpoint-1")):
        with pytest.raises(StateError, match="runs whatever code it names"):
            begin(recipe, run_dir, resume, (), 1)
        assert begin(recipe, run_dir, resume, (), 1, trust=True).checkpoint is not None


def test_what_is_added_to_ones_own_is_refused(mark: Path, tmp_path: Path) -> None:
    from posttrain.state.checkpoint import refuse_foreign

    checkpoint = written(tmp_path / "checkpoints", mark)
    added = checkpoint / "global_step2" / "mp_rank_00_model_states.pt"
    added.parent.mkdir()
    added.write_bytes(pickle.dumps(Boom(mark)))
    with pytest.raises(StateError, match="was added to it"):
        refuse_foreign(checkpoint)
    added.unlink()
    added.parent.rmdir()
    (checkpoint / "optimizer.pt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="optimizer.pt was added to it"):
        refuse_foreign(checkpoint)


def test_an_edited_manifest_loses_its_signature(mark: Path, tmp_path: Path) -> None:
    from posttrain.state.checkpoint import refuse_foreign

    checkpoint = written(tmp_path / "checkpoints", mark)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    signature = state.pop("signature")
    state.pop("seal")
    state["files"]["global_step1/mp_rank_00_model_states.pt"]["sha256"] = "0" * 64
    for given in (signature, None, "", "\u00e9", 7, state.get("seal")):
        edited = state | {"signature": given}
        (checkpoint / STATE_FILE).write_text(json.dumps(edited | {"seal": _seal(edited)}))
        with pytest.raises(StateError, match="not written by a run"):
            refuse_foreign(checkpoint)


def test_a_secret_that_others_can_read_or_have_put_there_signs_nothing(mark: Path, tmp_path: Path) -> None:
    from posttrain.state.checkpoint import refuse_foreign
    from posttrain.state.signature import secret_file, sign

    checkpoint = written(tmp_path / "checkpoints", mark)
    assert secret_file().stat().st_mode & 0o777 == 0o600
    secret_file().chmod(0o644)
    with pytest.raises(StateError):
        refuse_foreign(checkpoint)
    secret_file().chmod(0o600)
    refuse_foreign(checkpoint)
    moved = secret_file().rename(tmp_path / "moved")
    secret_file().symlink_to(moved)
    with pytest.raises(StateError):
        refuse_foreign(checkpoint)
    secret_file().unlink()
    secret_file().write_bytes(b"")
    secret_file().chmod(0o600)
    assert sign("x") is None


def test_the_files_of_a_plain_run_need_no_signature(mark: Path, tmp_path: Path) -> None:
    from posttrain.state.checkpoint import refuse_foreign

    staged = tmp_path / "checkpoints" / ".saving"
    staged.mkdir(parents=True)
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_1.pth",
        "config.json",
    ):
        (staged / name).write_bytes(b"x")
    commit(staged, tmp_path / "checkpoints" / "checkpoint-2", {"step": 2, "made_by": {}})
    os.environ["XDG_STATE_HOME"] = str(tmp_path / "other")  # the fixture puts it back
    refuse_foreign(tmp_path / "checkpoints" / "checkpoint-2")


@pytest.mark.parametrize(
    "name",
    ["../outside.bin", "/etc/passwd", "a/../../outside.bin", "..", "a/..", "\x00", "a\x00b", "a" * 5000, "", "."],
)
def test_a_name_that_leads_out_of_a_checkpoint_is_damage(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    state = {"format": 3, "step": 1, "made_by": {}, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {"seal": _seal(state)}))
    assert damage(checkpoint) is not None
