"""What processes leave behind where they are killed, or where posttrain is the first process of a container."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SERVER = """
import os, signal, sys, time
from multiprocessing import resource_tracker, shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[-1] == "--deaf" else lambda *_: os._exit(0))
segment = shared_memory.SharedMemory(create=True, size=1 << 20)
resource_tracker.unregister(segment._name, "shared_memory")  # as where the tracker is killed too
segment.buf[0] = 1
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
print(segment.name, os.environ["POSTTRAIN_VLLM_API_KEY"], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_shared_memory_of_a_server(how: signal.Signals, tmp_path: Path) -> None:
    """A stand-in for vLLM under the real script: it ends with a worker and a segment left.

    Modules in the folder that it is started in are not imported.
    """
    (tmp_path / "planted").mkdir()
    for name in ("torch", "vllm", "socket", "posttrain"):
        (tmp_path / "planted" / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    module = tmp_path / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    (module / "api_server.py").write_text(SERVER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "POSTTRAIN_VLLM_API_KEY"}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": f"{tmp_path}:{ROOT}", "XDG_STATE_HOME": str(tmp_path)}
    script = subprocess.Popen(
        [ROOT / "launch" / "vllm_server.sh", "model", "--port", str(port)],
        stdout=subprocess.PIPE,
        cwd=tmp_path / "planted",
        env=environment,
        text=True,
    )
    name, key = script.stdout.readline().split()
    segment = Path("/dev/shm") / name
    assert segment.exists() and len(key) >= 43, "a key is made where none is given"
    assert key == (tmp_path / "posttrain" / f"vllm-{socket.gethostname()}-{port}.key").read_text()
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    if how is signal.SIGTERM:
        script.send_signal(how)
    else:
        os.kill(int(children[0]), how)
    script.wait(20)
    assert not segment.exists() and not (tmp_path / "mark").exists()


IN_A_SYNC = """
import os, signal, sys
from posttrain.rollouts.transfer_folder import transfer_folder
with transfer_folder(sys.argv[1]) as folder:
    (folder / "weights-00000.safetensors").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_weights_of_a_trainer_that_was_killed_in_a_sync(tmp_path: Path) -> None:
    """Its folder goes at the next start; of all others, and of a trainer that runs, none. It stayed for
    good before, as large as the model."""
    from posttrain.rollouts.transfer_folder import remove_left_behind, transfer_folder
    from posttrain.rollouts.vllm_guard import PREFIX

    command, pipes = [sys.executable, "-c", IN_A_SYNC, str(tmp_path)], {"stdin": subprocess.PIPE, "text": True}
    killed, running = (subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, **pipes) for _ in range(2))
    left, live = (Path(process.stdout.readline().strip()) for process in (killed, running))
    assert left.parent == live.parent == tmp_path and left.stat().st_mode & 0o777 == 0o700
    killed.communicate()
    assert (left / "weights-00000.safetensors").exists()
    foreign = tmp_path / f"{PREFIX}of_another_machine"
    aside = tmp_path / "aside"
    planted = [left.with_name(f"{left.name}{end}") for end in ("file", "link", "open")]
    foreign.mkdir(mode=0o700)
    aside.mkdir(mode=0o700)
    planted[0].write_text("x")
    planted[1].symlink_to(aside)
    planted[2].mkdir(mode=0o755)
    assert remove_left_behind(str(tmp_path)) == [], "it may be one that is just made"
    for path in (left, live, foreign, aside, planted[2]):
        os.utime(path, (0, 0))
    assert remove_left_behind(str(tmp_path)) == [left] and not left.exists()
    assert all(path.exists() for path in (live, foreign, aside, *planted))
    running.kill()
    running.wait()
    with transfer_folder(str(tmp_path)) as own:
        os.utime(own, (0, 0))
        assert remove_left_behind(str(tmp_path)) == [live] and own.exists()
    assert not own.exists()


WITH_ORPHANS = """
import os, subprocess, sys, time
from posttrain.cli.first_process import if_first
if_first()
for _ in range(5):
    subprocess.run(["/bin/sh", "-c", "sleep 0.1 &"])  # nobody waits for it
time.sleep(0.5)
stats = [open(f"/proc/{pid}/stat").read() for pid in os.listdir("/proc") if pid.isdigit()]
states = [stat.rpartition(")")[2].split()[0] for stat in stats]
print(os.getpid(), states.count("Z"), flush=True)
sys.exit(7)
"""

ENDS_BY_SIGNAL = """
import os, signal, sys, time
from posttrain.cli.first_process import if_first
if_first()
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
print("up", flush=True)
time.sleep(30)
"""


def first_process(source: str) -> list[str]:
    """A command that runs Python code as process 1."""
    wrapper = ["bwrap", "--dev-bind", "/", "/", "--unshare-pid", "--proc", "/proc", "--as-pid-1", "--die-with-parent"]
    return [*wrapper, sys.executable, "-c", source]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")
def test_process_1_leaves_no_zombies() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(first_process(WITH_ORPHANS), capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 7, done.stderr
    pid, zombies = done.stdout.split()
    assert int(pid) > 1 and int(zombies) == 0


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")
def test_process_1_hands_signals_on() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(first_process(ENDS_BY_SIGNAL), stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "up\n"
    (inner,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(0.2)
    os.kill(int(inner), signal.SIGUSR1)
    assert process.wait(20) == 138
