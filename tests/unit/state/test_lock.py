from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import posttrain
from posttrain.errors import StateError
from posttrain.state.lock import locked

HOLD = """
import sys
from pathlib import Path
from posttrain.state.lock import locked
with locked(Path(sys.argv[1]), print, what="a run"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(posttrain.__file__).parents[1])},
    )
    assert process.stdout.readline() == "held\n"
    return process


def hold(path: Path, say=pytest.fail, **seconds: float):
    return locked(path, say, what="a run", **seconds)


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path):
    path = tmp_path / "new" / ".lock"
    process = holder(path)
    try:
        here = socket.gethostname()
        with pytest.raises(StateError, match=f"a run uses this folder already: process {process.pid} on {here} since"):
            hold(path).__enter__()
    finally:
        process.communicate("", timeout=30)
    with hold(path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_and_explained(tmp_path: Path):
    path = tmp_path / ".lock"
    process = holder(path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    said: list[str] = []
    with hold(path, said.append):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert len(said) == 1 and f"(process {process.pid} on " in said[0] and "taking over" in said[0]


def elsewhere(path: Path) -> None:
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "2026-01-01"}))


def test_a_clock_that_goes_back_is_a_sign_of_life_too(tmp_path: Path):
    path = tmp_path / ".lock"
    elsewhere(path)
    ended = threading.Event()

    def beat() -> None:
        for hours in range(1, 10_000):
            if ended.wait(0.05):
                return
            os.utime(path, (0, 2_000_000_000 - 3600 * hours))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(StateError, match="process 1 on elsewhere"):
            hold(path, lambda line: None, patience=20.0).__enter__()
    finally:
        ended.set()
        beating.join()


def test_a_stamp_from_the_future_is_no_sign_of_life(tmp_path: Path):
    path = tmp_path / ".lock"
    elsewhere(path)
    os.utime(path, (0, 4_000_000_000))
    said: list[str] = []
    with hold(path, said.append, patience=0.5):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "taking over" in said[-1]


def test_the_lock_of_another_host_is_respected_while_it_shows_signs_of_life(tmp_path: Path):
    path = tmp_path / ".lock"
    elsewhere(path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(StateError, match="process 1 on elsewhere"):
            hold(path, lambda line: None, patience=20.0).__enter__()
    finally:
        ended.set()
        beating.join()


def test_the_silent_lock_of_another_host_is_taken_over(tmp_path: Path):
    path, said = tmp_path / ".lock", []
    elsewhere(path)
    with hold(path, said.append, patience=0.2):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "waiting 0.2 s for a sign of life" in said[0] and "process 1 on elsewhere" in said[1]


def test_a_holder_shows_signs_of_life(tmp_path: Path):
    path = tmp_path / ".lock"
    with hold(path, heartbeat=0.01):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_cut_lock_file_names_nobody(tmp_path: Path, content: str):
    path = tmp_path / ".lock"
    path.write_text(content)
    with hold(path):
        pass


def test_an_error_inside_releases_it(tmp_path: Path):
    path = tmp_path / ".lock"
    with pytest.raises(KeyboardInterrupt), hold(path):
        raise KeyboardInterrupt
    with hold(path):
        pass
