"""Runs untrusted Python code under bubblewrap: no network, no files but Python's own, bounded in every resource.

Isolation `bubblewrap` gives each run its own user, mount, pid, network, ipc, uts and (where there are any) cgroup
namespaces; a read-only root with `/usr`, the libraries and the Python installation; a private `/tmp` of bounded size;
an empty environment; resource limits; and an end by the clock that takes all processes of the run with it. Under root
the code runs as user 65534, since the kernel does not bound the number of root's processes.

Isolation `rlimit` has the clock and the resource limits of a single process only. The code can read and write what this
user can, reach the network, and leave processes behind. It is for code one trusts, where namespaces cannot be had.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, cast

from posttrain.errors import StackError
from posttrain.verifiers import bubblewrap, sandbox_runner
from posttrain.verifiers.bubblewrap import SandboxError
from posttrain.verifiers.verdict import Status

MAX_ERRORS = 4096
"""Bytes kept of standard error."""

_MB = 1 << 20
_INODE = 1 << 10
"""Bytes that the kernel keeps of a file in memory beside what it holds; measured for links, 970."""
_LOOK = "print('ready', *(line for line in open('/proc/self/status') if line.startswith('Seccomp:')))"
_OWN = re.compile(r"^(?:RssAnon|VmSwap|HugetlbPages):\s+(\d+) kB$", re.MULTILINE)
"""Memory of a process that is no file's, in KiB."""
_LOOK_EVERY = 0.05
"""Seconds between looks at the memory of a run."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one run.

    Attributes:
        seconds: wall clock.
        memory_mb: MiB of address space of one process, and of memory of all together with what the kernel keeps of
            their files (bubblewrap). What they read from files of this machine does not count.
        processes: processes and threads at once (bubblewrap).
        file_mb: MiB of one file, and of the private /tmp (bubblewrap).
        output_kb: KiB of standard output.
    """

    seconds: float = 6.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    output_kb: int = 1024


class End(StrEnum):
    """Why a run ended."""

    EXITED = "exited"
    TIME = "time limit"
    MEMORY = "memory limit"
    OUTPUT = "output limit"


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program in the sandbox ended.

    Attributes:
        end: why.
        status: exit status; None unless it ended by itself.
        output: standard output, cut at the limit.
        errors: standard error, cut.
    """

    end: End
    status: int | None
    output: bytes
    errors: str


class Sandbox:
    """Starts runs with the same limits.

    Args:
        limits: of each run.
        isolation: `bubblewrap`, or `rlimit` for code that is trusted.
    """

    def __init__(self, limits: Limits, isolation: Literal["bubblewrap", "rlimit"] = "bubblewrap") -> None:
        self.limits, self.isolation = limits, isolation

    def check(self) -> str:
        """Run a program that looks at its own bounds.

        Returns:
            What holds on this machine, in words.

        Raises:
            StackError: bubblewrap is missing, or nothing can be run with it on this machine.
        """
        problem = None
        if self.isolation == "bubblewrap" and shutil.which("bwrap") is None:
            problem = "`bwrap` is not installed"
        else:
            try:
                finished = self.run_program(_LOOK, b"", seconds=60.0)
                problem = None if finished.output.startswith(b"ready") else finished.errors or finished.end
            except SandboxError as error:
                problem = str(error)
        if problem is not None:
            raise StackError(
                f"the code sandbox does not work here: {problem}",
                hint="install the package `bubblewrap` and allow user namespaces; or, for code you trust and with "
                "neither files nor network protected, set `isolation: rlimit` on the code verifier",
            )
        limits, filtered = self.limits, b"Seccomp:\t2" in finished.output
        hidden = "refused" if filtered else "NOT BOUNDED: this kernel has no seccomp filter"
        where = "bubblewrap, no network, no files of this user" if self.isolation == "bubblewrap" else "NO ISOLATION"
        return (
            f"{where}; {limits.seconds:g} s, {limits.memory_mb} MiB, files of {limits.file_mb} MiB; System V segments "
            f"and memfds {hidden}"
        )

    def run_program(self, source: str, stdin: bytes, seconds: float | None = None) -> Finished:
        """Run a program on an input.

        Args:
            source: Python source.
            stdin: its standard input.
            seconds: wall clock, where less than the limit is left.

        Raises:
            SandboxError: the sandbox could not be set up.
        """
        deadline = time.monotonic() + (self.limits.seconds if seconds is None else seconds)
        with _Run("program", self) as run:
            return _watch([run], _frame({"source": source}) + stdin, self.limits, deadline)

    def run_tests(self, source: str, *, entry_point: str, context: str, test: str) -> tuple[Finished, dict[str, str]]:
        """Run unit tests against code; the two never share a process or a sandbox.

        Args:
            source: the tested code.
            entry_point: the function that the tests call.
            context: trusted code that the tests may use, run before them.
            test: trusted code; `check(candidate)` is called if it defines that.

        Returns:
            How the tests ended, and their report: `status` of a verdict and `detail`; empty unless they ended by
            themselves.

        Raises:
            SandboxError: a sandbox could not be set up.
        """
        deadline = time.monotonic() + self.limits.seconds
        request = {"source": source, "entry_point": entry_point, "context": context, "test": test}
        pipes = os.pipe(), os.pipe()
        (calls_read, calls_write), (answers_read, answers_write) = pipes
        with contextlib.ExitStack() as stack:
            try:
                solution = stack.enter_context(_Run("solution", self, stdin=calls_read, stdout=answers_write))
                tests = stack.enter_context(_Run("tests", self, descriptors=(answers_read, calls_write)))
            finally:
                for descriptor in (*pipes[0], *pipes[1]):
                    os.close(descriptor)
            finished = _watch([tests, solution], _frame(request), self.limits, deadline)
        return finished, _report(finished)


# --------------------------------------------------------------------------------------------------------------- runs


class _Run:
    """One interpreter in a sandbox. Leaving the context ends all its processes.

    Attributes:
        process: bubblewrap itself, or the interpreter (rlimit).
        root: process id, as seen from here, of the first process inside.
    """

    def __init__(
        self,
        part: str,
        sandbox: Sandbox,
        *,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
        descriptors: Sequence[int] = (),
    ) -> None:
        self.wrapped = sandbox.isolation == "bubblewrap"
        self.folder = None if self.wrapped else tempfile.mkdtemp(prefix="posttrain-code-")
        arguments = [*_python(), part, _limits(sandbox), *map(str, descriptors)]
        pipes: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": subprocess.PIPE}
        if self.wrapped:
            self.process, self.root = bubblewrap.start(arguments, sandbox.limits.file_mb, descriptors, pipes)
        else:
            environment = bubblewrap.environment(self.folder)
            self.process = subprocess.Popen(
                arguments, env=environment, cwd=self.folder, pass_fds=descriptors, start_new_session=True, **pipes
            )
            self.root = self.process.pid

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        if not self.wrapped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@cache
def _python() -> tuple[str, ...]:
    # The interpreter behind a virtual environment; without `site`, which takes longer than all the rest.
    executable = os.path.realpath(sys.executable)
    return (executable, "-I", "-S", "-c", Path(sandbox_runner.__file__).read_text(encoding="utf-8"))


def _limits(sandbox: Sandbox) -> str:
    limits, wrapped = sandbox.limits, sandbox.isolation == "bubblewrap"
    return json.dumps(
        {
            "user": bubblewrap.NOBODY if wrapped and os.geteuid() == 0 else 0,
            "parent": 0 if wrapped else os.getpid(),
            "memory": limits.memory_mb * _MB,
            "file": limits.file_mb * _MB,
            "seconds": math.ceil(limits.seconds) + 1,
            "processes": limits.processes if wrapped else 0,
            "packages": bubblewrap.packages(),
            "sockets": not wrapped,
        }
    )


# ----------------------------------------------------------------------------------------------------------- watching


def _watch(runs: list[_Run], stdin: bytes, limits: Limits, deadline: float) -> Finished:
    """Feed the first run and read it until it ends or all of them together break a limit."""
    first = runs[0].process
    output, errors, looks = bytearray(), bytearray(), 0.0
    with selectors.DefaultSelector() as selector:
        _register(selector, runs, output, errors, stdin)
        while True:
            now = time.monotonic()
            if now >= deadline:
                end = End.TIME
            elif len(output) > limits.output_kb * 1024:
                end = End.OUTPUT
            elif now >= looks and sum(_held(run, limits) for run in runs) > limits.memory_mb * _MB:
                end = End.MEMORY
            elif first.stdout not in selector.get_map() and _has_ended(first, min(_LOOK_EVERY, deadline - now)):
                end = End.EXITED
            else:
                looks = now + _LOOK_EVERY if now >= looks else looks
                for key, _ in selector.select(min(looks, deadline) - now):
                    _serve(selector, key)
                del errors[:-MAX_ERRORS]  # a program may write some GiB to it
                continue
            with contextlib.suppress(BlockingIOError):
                errors += os.read(first.stderr.fileno(), MAX_ERRORS)
            status = first.returncode if end is End.EXITED else None
            text = errors[-MAX_ERRORS:].decode(errors="replace").strip()
            return Finished(end, status, bytes(output[: limits.output_kb * 1024]), text)


def _register(
    selector: selectors.BaseSelector, runs: list[_Run], output: bytearray, errors: bytearray, stdin: bytes
) -> None:
    first = runs[0].process
    for pipe, sink in [(first.stdout, output)] + [(run.process.stderr, errors) for run in runs]:
        os.set_blocking(pipe.fileno(), False)
        selector.register(pipe, selectors.EVENT_READ, sink)
    os.set_blocking(first.stdin.fileno(), False)
    selector.register(first.stdin, selectors.EVENT_WRITE, bytearray(stdin))


def _serve(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Write what waits or read what has come; forget a pipe at its end."""
    if key.events == selectors.EVENT_WRITE:
        try:
            del key.data[: os.write(key.fd, key.data[: 1 << 16])]
        except BrokenPipeError:
            key.data.clear()
        if not key.data:
            selector.unregister(key.fileobj)
            with contextlib.suppress(BrokenPipeError):
                cast(IO[bytes], key.fileobj).close()
        return
    part = os.read(key.fd, 1 << 16)
    key.data.extend(part)
    if not part:
        selector.unregister(key.fileobj)


def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def _held(run: _Run, limits: Limits) -> int:
    """Bytes of memory that a run holds: resident, and what the kernel keeps of each file and link in its /tmp."""
    files = 0
    if run.wrapped:
        # It may end while we look.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            found = os.statvfs(f"/proc/{run.root}/root/tmp")
            # Until it has its own, this is the machine's /tmp, of another size.
            if found.f_blocks * found.f_frsize == limits.file_mb * _MB:
                files = found.f_files - found.f_ffree
    return _resident(run.root) + files * _INODE


def _resident(root: int) -> int:
    """Bytes of memory that a process and all below it hold: of each its own, and shared segments once, at full size."""
    total, segments, waiting = 0, dict[tuple[str, ...], int](), [root]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        # It may end while we look.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            held = 0
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
                # Threads hold the same; one that has ended, as the first may have before the others, holds nothing.
                held = max(held, sum(map(int, _OWN.findall((task / "status").read_text()))))
                maps = (task / "maps").read_text()
                for line in maps.splitlines() if " /dev/zero" in maps else ():
                    place, mode, _, *segment = line.split(maxsplit=5)
                    if mode.endswith("s") and segment[-1].startswith("/dev/zero"):
                        start, end = (int(part, 16) for part in place.split("-"))
                        # What is unmapped, or given back by madvise, stays in the segment.
                        segments[tuple(segment[:2])] = max(end - start, segments.get(tuple(segment[:2]), 0))
            total += held << 10
    return total + sum(segments.values())


def _frame(message: dict[str, str]) -> bytes:
    data = json.dumps(message).encode("ascii")
    return len(data).to_bytes(4, "big") + data


def _report(finished: Finished) -> dict[str, str]:
    """What the tests say: a frame of JSON; empty if it is none, for tests of somebody's data may write there, too."""
    if finished.end is not End.EXITED or finished.status != 0:
        return {}
    try:
        report = json.loads(finished.output[4:])
        return {"status": Status(report["status"]).value, "detail": str(report["detail"])}
    except (ValueError, RecursionError, TypeError, KeyError):
        return {}
