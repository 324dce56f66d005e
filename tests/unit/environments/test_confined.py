"""Environments in a sandbox: what they do to files and to the network stays in their episode."""

from __future__ import annotations

import contextlib
import socket
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

from posttrain.data.sample import Problem
from posttrain.environments import confined
from posttrain.environments.base import Failure
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.python import PythonEnvironment
from posttrain.environments.rooms import Rooms
from posttrain.errors import WorldError

SOURCE = """
    import os, shutil, signal, socket, subprocess

    from posttrain.environments.base import Step


    class Shell:
        def reset(self, problem, seed):
            return " ".join(sorted(os.listdir(".")))

        def step(self, action):
            name, _, rest = action.partition(" ")
            return Step(str(getattr(self, name)(rest)))

        def write(self, place):
            with open(place, "w") as file:
                file.write("written")

        def read(self, place):
            with open(place) as file:
                return file.read()

        def delete(self, place):
            shutil.rmtree(place)

        def connect(self, port):
            socket.create_connection(("127.0.0.1", int(port)), timeout=1)

        def die(self, place):
            self.write(place)
            os.kill(os.getpid(), signal.SIGKILL)

        def leave(self, seconds):
            return subprocess.Popen(["sleep", seconds], start_new_session=True).pid
"""


@pytest.fixture
def shell(tmp_path):
    (tmp_path / "world.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    try:
        confined.check()
    except WorldError as error:
        pytest.skip(str(error))
    section = {"type": "python", "factory": f"{tmp_path}/world.py:Shell", "sandbox": True, "step_seconds": 5.0}
    with closing(EnvironmentPool(PythonEnvironment.Config.model_validate(section), tmp_path / "log")) as pool:
        yield pool


def begun(pool, episode):
    return pool.reset({episode: (Problem(str(episode), ""), 0)})[episode]


def test_an_episode_writes_in_a_folder_of_its_own(shell, tmp_path):
    assert begun(shell, 0) == begun(shell, 1) == ""
    shell.step({0: "write note", 1: "write other"})
    assert shell.step({0: "read note"})[0].observation == "written"
    assert isinstance(shell.step({1: "read note"})[1], Failure)
    shell.end([0])
    assert begun(shell, 2) == ""  # nothing of those before
    assert not list(tmp_path.rglob("note"))


@pytest.mark.parametrize("deed", ["write {}/kept/file", "delete {}/kept", "write {}/new", "write /tmp/new"])
def test_files_of_this_machine_stay_as_they_are(deed, shell, tmp_path):
    begun(shell, 0)
    failure = shell.step({0: deed.format(tmp_path)})[0]
    assert isinstance(failure, Failure) and "Read-only file system" in failure.detail
    assert (tmp_path / "kept" / "file").read_text() == "mine"
    begun(shell, 1)
    assert shell.step({1: f"read {tmp_path}/kept/file"})[1].observation == "mine"


def test_an_episode_may_delete_its_own_folder(shell):
    begun(shell, 0)
    shell.step({0: "write note"})
    shell.step({0: "delete /episodes/0"})
    assert shell.step({0: "write note"})[0].observation == "None"


def test_there_is_no_network(shell):
    with socket.create_server(("127.0.0.1", 0)) as server:
        begun(shell, 0)
        failure = shell.step({0: f"connect {server.getsockname()[1]}"})[0]
    assert isinstance(failure, Failure)


def test_one_that_dies_is_played_again_with_its_files(shell):
    begun(shell, 0), begun(shell, 1)
    shell.step({1: "write note"})
    assert isinstance(shell.step({0: "die x"})[0], Failure)
    assert shell.step({1: "read note"})[1].observation == "written"  # in the process that took its place
    assert shell.restarts == 2


def test_what_it_started_ends_with_it(shell):
    begun(shell, 0)
    shell.step({0: "leave 1234.5"})
    wait_until(lambda: sleeping("1234.5"))
    shell.close()
    wait_until(lambda: not sleeping("1234.5"))


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sleeping(seconds):
    commands = (process / "cmdline" for process in Path("/proc").glob("[0-9]*"))
    for command in commands:
        with contextlib.suppress(OSError):  # it has ended
            if command.read_bytes() == f"sleep\0{seconds}\0".encode():
                return True
    return False


def test_a_sandbox_needs_a_process_and_bubblewrap(monkeypatch):
    with pytest.raises(ValueError, match="set `workers` to 1 or more"):
        Rooms.Config(sandbox=True, workers=0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(WorldError, match="`bwrap` is not installed"):
        confined.check()
