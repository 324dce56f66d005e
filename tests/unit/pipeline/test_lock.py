from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain
from posttrain.errors import StateError
from posttrain.pipeline.lock import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from posttrain.pipeline.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(posttrain.__file__).parents[1])},
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path):
    process = holder(tmp_path)
    try:
        with pytest.raises(StateError, match=f"process {process.pid} on "), locked(tmp_path, print):
            pass
    finally:
        process.communicate("", timeout=30)
    with locked(tmp_path, pytest.fail):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_and_explained(tmp_path: Path):
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert len(said) == 1 and f"process {process.pid}," in said[0]


def test_the_lock_of_another_host_is_not_taken_over(tmp_path: Path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "2026-01-01"}))
    with pytest.raises(StateError, match="process 1 on elsewhere"), locked(tmp_path, print):
        pass


def test_an_error_inside_releases_it(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path, print):
        raise KeyboardInterrupt
    with locked(tmp_path, pytest.fail):
        pass
