"""Code that attacks the sandbox. Each gets its verdict; the worker lives on; nothing is left running or written."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.code import CodeVerifier
from posttrain.verifiers.pool import VerifierPool

pytestmark = pytest.mark.usefixtures("bubblewrap")

TEST = "def check(f):\n    assert f(2) == 3\n    assert f(5) == 6\n"
HONEST = "def f(x):\n    return x + 1\n"
MARK = f"987654.{os.getpid()}"
"""Seconds that processes left behind sleep: how they are found."""

FORGED = r"""
import json, os
report = json.dumps({"status": "correct", "detail": ""}).encode()
frame = len(report).to_bytes(4, "big") + report
"""

# what it does: code, part of the detail
WRONG = {
    "exits at once": ("import os\nos._exit(0)", "no answer"),
    "exits in the call": ("import os\ndef f(x): os._exit(0)", "no answer"),
    "raises SystemExit": ("import sys\nsys.exit(0)", "SystemExit"),
    "raises SystemExit in the call": ("def f(x): raise SystemExit(0)", "SystemExit"),
    "prints a forged result": ('def f(x): print(\'{"status": "correct", "detail": ""}\')', "AssertionError"),
    "writes a forged result to every descriptor": (
        FORGED + "def f(x):\n    for d in range(64):\n        try: os.write(d, frame)\n        except OSError: pass",
        "",
    ),
    "writes a forged result and exits": (
        FORGED + "for d in range(64):\n    try: os.write(d, frame)\n    except OSError: pass\nos._exit(0)",
        "",
    ),
    "answers with something else": (
        "import os\ndef f(x):\n    for d in range(3, 64):\n        try: os.write(d, b'x' * 99)\n"
        "        except OSError: pass",
        "no answer",
    ),
    "is equal to everything": ("class E:\n    def __eq__(self, o): return True\ndef f(x): return E()", "plain data"),
    "is a number equal to everything": (
        "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E(0)",
        "AssertionError",
    ),
    "patches sys, unittest and assert": (
        "import builtins, sys, types\nbuiltins.AssertionError = type('Q', (Exception,), {})\n"
        "sys.exit = lambda *a: None\nsys.modules['unittest'] = types.ModuleType('unittest')\n"
        "sys.settrace(lambda *a: None)\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x): return 0",
        "AssertionError",
    ),
    "patches the runner": (
        "import json, os, sys\nm = sys.modules['__main__']\nm.encode = lambda v: 3\njson.dumps = lambda *a, **k: '{}'\n"
        "def f(x): return 0",
        "",
    ),
    "looks for the tests in its frames": (
        "import gc, sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'check' in frame.f_globals or 'solution' in frame.f_locals: return x + 1\n"
        "        frame = frame.f_back\n"
        "    return x + 1 if any('assert f(' in s for s in gc.get_objects() if isinstance(s, str)) else 0",
        "AssertionError",
    ),
    "kills its parent": ("import os, signal\ndef f(x):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 0", ""),
    "kills everybody": ("import os, signal\ndef f(x):\n    os.kill(-1, signal.SIGKILL)\n    return 0", ""),
    "sleeps": ("import time\ntime.sleep(1000)", "time limit: 2.5 s"),
    "sleeps in the call": ("import time\ndef f(x): time.sleep(1000)", "time limit"),
    "loops in native code": ("def f(x):\n    return 10 ** 10 ** 10", "time limit"),
    "floods standard output": ("while True: print('x' * 10000)", "time limit"),
    "fills memory": ("x = []\nwhile True: x.append('x' * 10 ** 7 + str(len(x)))", "emory"),
    "fills memory in many processes": (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = bytearray(90 << 20)\n"
        "        time.sleep(99)\ntime.sleep(99)",
        "memory limit",
    ),
    "fills memory by files": (
        "import os\nwhile True:\n    d = os.memfd_create('m')\n    os.write(d, b'x' * (1 << 20))\n", "PermissionError"
    ),
    "fills the disk": (
        "import itertools\nfor n in itertools.count():\n    open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 20))", "No space"
    ),
    "writes a large file": ("open('/tmp/x', 'wb').write(b'x' * (64 << 20))", ""),
    "forks without end": ("import os\nwhile True: os.fork()", ""),
    "starts threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", "RuntimeError"
    ),
    "opens files without end": ("x = []\nwhile True: x.append(open('/dev/null'))", "Too many open files"),
    "closes all descriptors": ("import os\nos.closerange(0, 100)", "no answer"),
    "crashes the interpreter": ("import ctypes\nctypes.string_at(0)", "no answer"),
    "recurses": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(x): return g(x)\ndef f(x): return g(x)", ""),
    "answers without end": ("import itertools\ndef f(x): return itertools.count()", ""),
    "answers with a vast text": ("def f(x): return 'x' * (40 << 20)", ""),
    "answers with a deep list": (
        "def f(x):\n    y = []\n    for _ in range(10 ** 5): y = [y]\n    return y", "RecursionError"
    ),
    "answers with a vast number": ("def f(x): return 1 << (1 << 22)", "AssertionError"),
    "makes namespaces": (
        "import ctypes\ndef f(x): return x + 1 if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0", "AssertionError"
    ),
    "changes its user": ("import os\ndef f(x):\n    os.setuid(0)\n    return x + 1", "PermissionError"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    config = CodeVerifier.Config(type="code", timeout=2.5, memory_mb=256, context=None)
    pool = VerifierPool([CodeVerifier(config)], VerifierPoolConfig(workers=1, timeout=60))
    yield pool
    pool.close()


def verify(pool: VerifierPool, source: str):
    problem = Problem("p", "", None, {"test": TEST, "entry_point": "f"})
    defined = source if "def f(" in source else f"{source}\n{HONEST}"
    attack, honest = pool.verify([problem] * 2, [f"```python\n{defined}\n```", HONEST])
    assert honest[0].status == "correct"
    return attack[0]


def sleepers() -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if MARK.encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@pytest.mark.parametrize("attack", WRONG)
def test_an_attack_is_wrong_and_the_worker_lives(pool: VerifierPool, attack: str) -> None:
    before = [worker.process.pid for worker in pool._workers]
    source, detail = WRONG[attack]
    verdict = verify(pool, source)
    assert verdict.status == "wrong" and detail in verdict.detail, verdict
    assert not before or [worker.process.pid for worker in pool._workers] == before


@pytest.mark.parametrize(
    "code", ["def f(x:\n    return 3", "def f(x): return \x00", "def f(x):\nreturn 1", "def f(): \ud800"]
)
def test_code_that_is_no_python(pool: VerifierPool, code: str) -> None:
    assert verify(pool, code).status == "unparseable"


@pytest.mark.parametrize(
    "test",
    [
        "cases = [(2, 3), (5, 6)]\ndef check(c):\n    assert all(map(lambda t: c(t[0]) == t[1], cases))",
        "def check(c):\n    assert not list(filter(lambda x: c(x) != x + 1, [2, 5]))",
        "def check(c):\n    for value in iter(lambda: c(2), 3):\n        raise AssertionError(value)",
    ],
)
@pytest.mark.parametrize("raised", ["StopIteration", "StopIteration(True)", "StopAsyncIteration"])
def test_loops_of_the_tests_do_not_end_early(pool: VerifierPool, test: str, raised: str) -> None:
    problem = Problem("p", "", None, {"test": test, "entry_point": "f"})
    attack, honest = pool.verify([problem] * 2, [f"```python\ndef f(x): raise {raised}\n```", HONEST])
    assert (attack[0].status, honest[0].status) == ("wrong", "correct")


def test_nothing_is_left_running(pool: VerifierPool) -> None:
    source = f"""
import os, subprocess
def f(x):
    for detach in (False, True):
        subprocess.Popen(["/usr/bin/sleep", "{MARK}"], start_new_session=detach)
    if os.fork() == 0:
        os.setsid()
        os.execv("/usr/bin/sleep", ["sleep", "{MARK}"])
    return x + 1
"""
    assert verify(pool, source).status == "correct"
    end = time.monotonic() + 20
    while sleepers() and time.monotonic() < end:
        time.sleep(0.05)
    assert sleepers() == []


def test_a_worker_that_is_killed_takes_its_sandboxes_along(pool: VerifierPool) -> None:
    problem = Problem("p", "", None, {"test": TEST, "entry_point": "f"})
    source = f"```python\nimport subprocess\nsubprocess.run(['/usr/bin/sleep', '{MARK}'])\n{HONEST}```"
    config = CodeVerifier.Config(type="code", timeout=600, context=None)
    with_worker = VerifierPool([CodeVerifier(config)], VerifierPoolConfig(workers=1, timeout=3))
    assert with_worker.verify([problem], [source])[0][0].status == "timeout"
    end = time.monotonic() + 20
    while sleepers() and time.monotonic() < end:
        time.sleep(0.05)
    assert sleepers() == []
    with_worker.close()


def test_nothing_is_written_outside(pool: VerifierPool, tmp_path: Path) -> None:
    name = f"written-{MARK}"
    folders = ["/", "/tmp", "/usr", "/dev", "/dev/shm", "/var/tmp", "/root", "/home", str(tmp_path), os.getcwd()]
    source = f"""
import os
def f(x):
    for folder in {folders!r}:
        try:
            os.makedirs(folder, exist_ok=True)
            open(folder + "/{name}", "w").write("x")
        except OSError:
            pass
    return [d for d in {folders!r} if os.path.exists(d + "/{name}") and not d.startswith("/tmp")]
"""
    problem = Problem("p", "", None, {"test": "assert f(1) == []", "entry_point": "f"})
    assert pool.verify([problem], [f"```python\n{source}```"])[0][0].status == "correct"  # but for its own /tmp
    assert not any((Path(folder) / name).exists() for folder in folders)


def test_the_files_and_the_environment_of_the_host_are_not_there(pool, tmp_path, monkeypatch) -> None:
    (tmp_path / "secret").write_text("s3cret")
    monkeypatch.setenv("POSTTRAIN_SECRET", "s3cret")
    here = Path(__file__).resolve()
    source = f"""
import glob, os
def f(x):
    paths = [{str(tmp_path / "secret")!r}, {str(here)!r}, "/etc/passwd", "/etc/shadow", "/root/.ssh", "/home"]
    seen = [path for path in paths if os.path.exists(path)]
    for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
        try:
            text = open(path, "rb").read()
        except OSError:
            continue
        seen += [path] if b"s3cret" in text or b"pytest" in text else []
    return seen + [name for name in os.environ if "SECRET" in name]
"""
    problem = Problem("p", "", None, {"test": "assert f(1) == [], f(1)", "entry_point": "f"})
    verdict = pool.verify([problem], [f"```python\n{source}```"])[0][0]
    assert verdict.status == "correct", verdict


def test_the_network_is_not_there(pool: VerifierPool) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    reached = []

    def accept() -> None:
        try:
            reached.append(server.accept())
        except TimeoutError:
            return

    source = f"""
import socket
def f(x):
    for address in [("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 53), ("localhost", 22)]:
        try:
            socket.create_connection(address, timeout=0.2)
            return "connected"
        except OSError:
            pass
    return [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
"""
    problem = Problem("p", "", None, {"test": "assert f(1) == ['lo'], f(1)", "entry_point": "f"})
    thread = threading.Thread(target=accept)
    thread.start()
    verdict = pool.verify([problem], [f"```python\n{source}```"])[0][0]
    thread.join()
    server.close()
    assert verdict.status == "correct" and not reached, verdict


def test_other_processes_are_not_there(pool: VerifierPool) -> None:
    source = "import os\ndef f(x): return len([p for p in os.listdir('/proc') if p.isdigit()])"
    problem = Problem("p", "", None, {"test": "assert f(1) <= 3, f(1)", "entry_point": "f"})
    assert pool.verify([problem], [f"```python\n{source}```"])[0][0].status == "correct"
