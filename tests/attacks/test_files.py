"""What others plant in a folder that posttrain works in is not written through, and none of it is run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from posttrain.cli.check import check_recipe
from posttrain.cli.train import dry_run, run
from posttrain.config.locations import Locations
from posttrain.errors import StateError
from posttrain.evaluation.journal import Journal
from posttrain.pipeline.cache import DONE, read_records
from posttrain.safe_files import file_atomic, folder_atomic, refuse_linked_folders, write_text_atomic
from posttrain.state.checkpoint import remove, sweep
from posttrain.state.environment import environment
from posttrain.state.lock import locked, say_on_stderr
from posttrain.state.objects import written_down
from posttrain.study.cell import RESULT
from posttrain.study.plan import Cell, CellRequest, check_study
from posttrain.study.running import done, error_of
from posttrain.study.schema import build_study
from posttrain.study.study import run_study
from posttrain.tracking.events import EventFile
from posttrain.tracking.transcript import Transcript


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, to which planted links lead."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def test_a_lock_that_is_a_link(victim: Path, tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".run.lock"
    lock.parent.mkdir()
    for target in (victim, tmp_path / "new"):
        lock.symlink_to(target)
        with pytest.raises(StateError, match="a link or pipe stands where posttrain writes"):
            with locked(lock, say_on_stderr, what="a run"):
                pass
        lock.unlink()
    assert not (tmp_path / "new").exists()
    os.mkfifo(lock)
    with pytest.raises(StateError), locked(lock, say_on_stderr, what="a run"):
        pass


def test_files_beside_the_one_that_is_written(victim: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    planted = folder / f".resolved.yaml.{os.getpid()}.tmp"
    planted.symlink_to(victim)
    write_text_atomic(folder / "resolved.yaml", "text")
    assert (folder / "resolved.yaml").read_text() == "text" and not planted.is_symlink()
    for name in ("data.bin", "model"):
        (folder / f".{name}.{os.getpid()}.tmp").symlink_to(victim.parent / "elsewhere")
    with file_atomic(folder / "data.bin") as beside:
        assert stat.S_IMODE(beside.parent.stat().st_mode) == 0o700, "nobody else can plant a link before it is opened"
        beside.write_text("data")
    with folder_atomic(folder / "model") as beside:
        assert stat.S_IMODE(beside.parent.stat().st_mode) == 0o700
        (beside / "file").write_text("weights")
    assert not (victim.parent / "elsewhere").exists() and (folder / "model" / "file").read_text() == "weights"


def test_files_and_folders_that_are_replaced(victim: Path, tmp_path: Path) -> None:
    folder, others = tmp_path / "out", tmp_path / "others"
    folder.mkdir()
    others.mkdir()
    (others / "file").write_text("theirs")
    for name, target in (("report.json", victim), ("model", others)):
        (folder / name).symlink_to(target)
    write_text_atomic(folder / "report.json", "{}")
    with folder_atomic(folder / "model") as beside:
        (beside / "file").write_text("weights")
    assert not (folder / "report.json").is_symlink() and not (folder / "model").is_symlink()
    assert (others / "file").read_text() == "theirs"


def test_logs_that_are_links(victim: Path, tmp_path: Path) -> None:
    for name, write in {
        "metrics.jsonl": lambda path: EventFile(path).rewind(0),
        "samples.jsonl": lambda path: Transcript(path).write(0, {"text": "x"}),
        "report.journal.jsonl": lambda path: Journal(path, {}),
    }.items():
        path = tmp_path / name
        path.symlink_to(tmp_path / "new")
        if name == "metrics.jsonl":  # rewinding replaces the link
            write(path)
            assert not path.is_symlink()
        else:
            with pytest.raises(StateError):
                write(path)
    assert not (tmp_path / "new").exists()


def test_checkpoint_folders_that_are_links(victim: Path, tmp_path: Path) -> None:
    checkpoints, others = tmp_path / "checkpoints", tmp_path / "others"
    (checkpoints / "checkpoint-1").mkdir(parents=True)
    others.mkdir()
    (others / "file").write_text("theirs")
    for name in (".saving", ".removing-checkpoint-1"):
        (checkpoints / name).symlink_to(others)
    remove(checkpoints / "checkpoint-1")
    sweep(checkpoints)
    assert list(checkpoints.iterdir()) == [] and (others / "file").read_text() == "theirs"


@pytest.mark.parametrize("name", ["plots", "checkpoints", "model", "evaluation", "inputs", "checkpoints/set-aside"])
def test_folders_of_a_run_that_are_linked_elsewhere(name: str, tmp_path: Path, write_recipe) -> None:
    recipe, others = write_recipe({"name": "sft"}), tmp_path / "others"
    output = Path(yaml.safe_load(recipe.read_text())["output"])
    (output / name).parent.mkdir(parents=True)
    for target in (others, tmp_path / "nowhere"):
        others.mkdir(exist_ok=True)
        (others / "file").write_text("theirs")
        (output / name).symlink_to(target)
        for command in (
            lambda: run(recipe, [], None),
            lambda: run(recipe, [], "auto"),
            lambda: dry_run(recipe, [], world_size=1),
            lambda: check_recipe(recipe, [], online=False, world_size=1),
        ):
            with pytest.raises(StateError, match="a link stands where a run may write a folder") as caught:
                command()
            assert caught.value.where == str(output / name)
        (output / name).unlink()
    assert [path.name for path in others.iterdir()] == ["file"] and not (tmp_path / "nowhere").exists()
    assert [path for path in output.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["reported", "reported/two", "reported/two/seed-0", "reported/two/seed-0/log.txt"])
def test_folders_of_a_study_that_are_linked_elsewhere(name: str, victim: Path, tmp_path: Path, write_recipe) -> None:
    recipe, others, output = write_recipe({"name": "sft"}), tmp_path / "others", tmp_path / "study"
    others.mkdir()
    (output / name).parent.mkdir(parents=True)
    (output / name).symlink_to(victim if name.endswith(".txt") else others)
    benchmark = {
        "name": "b",
        "data": {"task": "chain_sum", "levels": [2], "size": 8},
        "verifier": [{"type": "procedural"}],
    }
    written = {
        "study": "s",
        "output": str(output),
        "arms": {"one": str(recipe), "two": str(recipe)},
        "seeds": 1,
        "evaluate": {"benchmarks": [benchmark]},
    }
    study = build_study(tmp_path / "study.yaml", written, Locations("study.yaml"))
    for command in (check_study, run_study):
        with pytest.raises(StateError, match="a link leads out of the folder") as caught:
            command(study)
        assert caught.value.where == str(output / name)
    assert list(others.iterdir()) == []


def test_a_log_of_a_cell_that_became_a_link_is_not_told(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to(victim)
    with pytest.raises(StateError, match="a link or pipe stands"):
        error_of(tmp_path / "log.txt", 1)


def test_objects_are_not_written_where_a_folder_is_linked_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "first").symlink_to(tmp_path / "others")
    with pytest.raises(StateError, match="a link stands"):
        refuse_linked_folders(tmp_path / "out")
    with pytest.raises(StateError, match="a link stands"):
        written_down({"data": {"prompts": [{"prompt": "x"}]}, "output": str(tmp_path / "out")})
    assert list((tmp_path / "others").iterdir()) == []


def test_a_run_folder_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with locked(tmp_path / "runs" / "a" / ".run.lock", say_on_stderr, what="a run"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "runs" / "a").stat().st_mode) == 0o700


def test_git_runs_nothing_that_a_repository_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    identity = {f"GIT_{who}_{what}": "x@example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], check=True, capture_output=True, env=os.environ | identity)

    evil = tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\necho $0 $* >> {tmp_path}/mark\ncat\n")
    evil.chmod(0o755)
    for folder in (tmp_path / "inner", tmp_path):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        git("init", "-q")
        (folder / "file.txt").write_text("text\n")
        git("add", "file.txt")
        git("commit", "-qm", "x")
    git("-c", "protocol.file.allow=always", "submodule", "add", "-q", "./inner", "module")
    git("commit", "-qm", "module")
    (tmp_path / ".gitattributes").write_text("*.txt filter=x=y\n")
    (tmp_path / ".git" / "info" / "attributes").write_text("*.txt filter=other\n")
    for folder in (tmp_path, tmp_path / "module"):
        monkeypatch.chdir(folder)
        hooks = tmp_path / ".git" / "hooks"
        for hook in ("post-index-change", "fsmonitor-watchman"):
            (hooks / hook).write_text(evil.read_text())
            (hooks / hook).chmod(0o755)
        git("config", "core.hooksPath", str(hooks))
        git("config", "core.fsmonitor", str(evil))
        for name in ("x=y", "other"):
            git("config", f"filter.{name}.clean", str(evil))
            git("config", f"filter.{name}.process", str(evil))
            git("config", f"filter.{name}.required", "true")
    monkeypatch.chdir(tmp_path)
    os.utime(tmp_path / "file.txt", (1, 1))  # so that git looks at its content again
    (tmp_path / "mark").unlink(missing_ok=True)
    found = environment()["git"]
    assert found is not None and len(found["commit"]) == 40 and found["uncommitted_changes"]
    assert not (tmp_path / "mark").exists(), (tmp_path / "mark").read_text()
    subprocess.run(["git", "status"], capture_output=True)
    assert (tmp_path / "mark").exists(), "the attack itself works"


@pytest.mark.parametrize("url", ["ext::sh -c touch% {0}/mark", "{0}"])
def test_git_fetches_nothing_that_a_repository_lacks(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an object that a partial clone lacks `git status` runs what the repository names to fetch it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.txt").write_text("text\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example"]
    for command in (["init", "-q"], ["add", "folder"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)
    tree = subprocess.run(["git", "rev-parse", "HEAD^{tree}"], capture_output=True, text=True).stdout.strip()
    (tmp_path / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    settings = {"core.repositoryformatversion": "1", "extensions.partialClone": "origin"}
    settings |= {
        "protocol.ext.allow": "always",
        "remote.origin.promisor": "true",
        "remote.origin.url": url.format(tmp_path),
    }
    settings |= {"remote.origin.uploadpack": f"touch {tmp_path}/mark;"}
    for name, value in settings.items():
        subprocess.run(["git", "config", name, value], check=True)
    environment()
    assert not (tmp_path / "mark").exists()
    subprocess.run(["git", "status"], capture_output=True)
    assert (tmp_path / "mark").exists(), "the attack itself works"


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that all users of the machine can enter."""
    with tempfile.TemporaryDirectory(prefix="posttrain-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("what", ["file", "folder", "owner"])
def test_what_others_may_have_written_is_not_believed_to_be_done(what: str, common: Path) -> None:
    """A cell's result in a folder that all may write to stood in the table of a study, and no run was made for it."""
    if what == "owner" and os.geteuid() != 0:
        pytest.skip("only root can make files of others")
    cell = Cell("shared", "shared", {}, 0, CellRequest("key", "s.yaml", str(common), []))
    for name, content in ((RESULT, {"key": "key"}), (DONE, {})):
        (common / name).write_text(json.dumps(content))
    assert done(cell) == {"key": "key"}
    for path in (common / RESULT, common / DONE):
        if what == "owner":
            os.chown(path, 4242, -1)
        else:
            (path if what == "file" else common).chmod(0o777)
    with pytest.raises(StateError, match="somebody else may have written"):
        done(cell)
    with pytest.raises(StateError, match="somebody else may have written"):
        read_records(common)
    if what == "file":
        common.chmod(0o700)  # where nobody else comes in
        assert done(cell) == {"key": "key"}
