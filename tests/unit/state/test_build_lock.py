"""Locks of PyTorch's extension builds: those of dead builds go, with a word, and those of live ones stay."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from torch.utils.file_baton import FileBaton

from posttrain.state import build_lock
from posttrain.state.build_lock import extensions_folder, free_build_locks

HOLD = "import sys; from torch.utils.file_baton import FileBaton; "
HOLD += "assert FileBaton(sys.argv[1]).try_acquire(); print(flush=True); sys.stdin.read()"

BUILD = "import sys; from torch.utils.cpp_extension import load; "
BUILD += "load('waits', [sys.argv[1]], is_python_module=False); print('built')"


def holder(path):
    """A process that holds the lock as a build does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def free(root, **how):
    said = []
    return free_build_locks(root, said.append, **{"patience": 0.01, **how}), said


def test_the_lock_of_a_killed_build_goes_and_that_of_a_live_one_stays(tmp_path):
    dead, live = tmp_path / "py311_cpu" / "fused_adam" / "lock", tmp_path / "cpu_adam" / "lock"
    (killed := holder(dead)).kill()
    killed.wait()
    alive = holder(live)
    try:
        removed, said = free(tmp_path)
        assert removed == [dead] and not dead.exists() and live.exists()
        assert len(said) == 1 and str(dead) in said[0] and "fused_adam is compiled again" in said[0]
        assert FileBaton(str(dead)).try_acquire()  # the next build need not wait
    finally:
        alive.communicate(b"")
    assert free(tmp_path / "nothing") == ([], [])


def test_a_lock_that_is_renewed_meanwhile_stays(tmp_path, monkeypatch):
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()

    def somebody_else_starts(_):
        path.unlink()
        (path.parent / "other").touch()
        path.touch()
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(build_lock.time, "sleep", somebody_else_starts)
    assert free(tmp_path) == ([], []) and path.exists()


def test_where_another_host_may_hold_it_a_young_lock_stays_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(build_lock, "_is_shared", lambda _: True)
    removed, said = free(tmp_path)
    assert removed == [] and path.exists() and str(path) in said[0] and "delete it" in said[0]
    os.utime(path, (0, 0))
    assert free(tmp_path)[0] == [path] and not path.exists()


def test_file_systems_of_one_host_are_told_from_shared_ones(tmp_path, monkeypatch):
    assert not build_lock._is_shared(tmp_path)
    for kind, shared in {"nfs": True, "lustre": True, "fuseblk": True, "ext2/ext3": False, "xfs": False}.items():
        monkeypatch.setattr(
            build_lock.subprocess, "run", lambda *_, kind=kind, **__: subprocess.CompletedProcess([], 0, f"{kind}\n")
        )
        assert build_lock._is_shared(tmp_path) == shared


def test_the_folder_is_where_pytorch_builds(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path and _get_build_directory("one", False) == str(tmp_path / "one")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(_get_build_directory("one", False)).startswith(str(extensions_folder()))


@pytest.mark.serve
@pytest.mark.skipif(not (shutil.which("ninja") and shutil.which("c++")), reason="PyTorch builds with ninja and c++")
def test_a_build_that_was_killed_can_be_started_again(tmp_path):
    """SIGKILL while the compiler reads a file that never ends; its lock is gone, and the next build is made."""
    gate, source, root = tmp_path / "gate.h", tmp_path / "waits.cpp", tmp_path / "extensions"
    source.write_text(f'#include "{gate}"\nextern "C" int one() {{ return GATE; }}\n')
    os.mkfifo(gate)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(root)}
    command = [sys.executable, "-c", BUILD, str(source)]
    build = subprocess.Popen(command, env=environment, start_new_session=True)
    writer = os.open(gate, os.O_WRONLY)  # returns when the compiler has opened its end
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    os.close(writer)
    lock = root / "waits" / "lock"
    assert lock.exists() and not FileBaton(str(lock)).try_acquire()
    assert free(root)[0] == [lock]
    gate.unlink()
    gate.write_text("#define GATE 1\n")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("built\n"), done.stderr
