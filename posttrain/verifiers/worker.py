"""The process that runs verifiers. Imports neither torch nor anything else that is slow to start."""

from __future__ import annotations

import ctypes
import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol, runtime_checkable

from posttrain.config.plugins import load_plugins
from posttrain.data.sample import Problem
from posttrain.errors import VerifierError
from posttrain.imports import importing
from posttrain.terminal import guard
from posttrain.verifiers.verdict import Answer, Form, OwnVerifier, Status, Verdict, Verifier


class VerifyJob(NamedTuple):
    """Completions of one problem for one verifier: one, or for the user's own code all of a prompt.

    Attributes:
        numbers: of the verdicts, in the pool's count.
        verifier: its index.
    """

    numbers: tuple[int, ...]
    verifier: int
    problem: Problem
    answers: tuple[Answer, ...]


class Ready(NamedTuple):
    """A worker's first message: it has loaded its verifiers.

    Attributes:
        forms: by the index of a verifier that runs the user's code.
    """

    forms: dict[int, Form]


class Failed(NamedTuple):
    """A worker's only message if the user's code cannot be loaded: what, where and hint of the error."""

    what: str
    where: str
    hint: str


MAX_DETAIL = 300
MAX_OWN_DETAIL = 1500
"""Characters where the user's code raised, with the traceback."""

MAX_LOG = 16 << 20
"""Bytes of what the user's code prints that are kept; then the log begins again."""

_PR_SET_PDEATHSIG = 1


@runtime_checkable
class Prepares(Protocol):
    """A verifier whose first call is slow unless `prepare` was called; it runs before the clock does."""

    def prepare(self) -> None: ...


def run_job(job: VerifyJob, verifiers: Sequence[Verifier | OwnVerifier], limit: float | None) -> Iterator[Verdict]:
    """The verdicts on the completions of a job, each as soon as it is found."""
    verifier = verifiers[job.verifier]
    if isinstance(verifier, OwnVerifier):
        mine = os.getpid()
        for verdict in verifier.judge(job.problem, job.answers, limit):
            if os.getpid() != mine:  # the user's code has forked, and this is the child
                os._exit(0)
            yield _bounded(verdict, MAX_OWN_DETAIL)
    else:
        yield _bounded(run_verifier(verifier, job.problem, job.answers[0].text), MAX_DETAIL)


def run_verifier(verifier: Verifier, problem: Problem, completion: str) -> Verdict:
    """The verdict, or a crash verdict with the exception that the verifier raised."""
    try:
        verdict = verifier(problem, completion)
    # Whatever user-given text makes a verifier raise is a verdict by contract: it must not stop the run, and not count.
    except Exception as error:
        return Verdict(Status.CRASH, None, f"{type(error).__name__}: {error}")
    if not isinstance(verdict, Verdict):
        return Verdict(Status.CRASH, None, f"{verifier.name} returned {type(verdict).__name__}, not a Verdict")
    return verdict


def _bounded(verdict: Verdict, longest: int) -> Verdict:
    """What a completion makes long must not fill the connection to the parent, or the journal of an evaluation."""
    answer = None if verdict.answer is None else verdict.answer[:MAX_DETAIL]
    return replace(verdict, detail=verdict.detail[:longest], answer=answer)


def prepare(verifiers: Sequence[Verifier | OwnVerifier]) -> dict[int, Form]:
    """Load what the first calls need; how the user's code among them is called.

    Raises:
        VerifierError: the user's code cannot be loaded.
    """
    for verifier in verifiers:
        if isinstance(verifier, Prepares):
            verifier.prepare()
    return {index: verifier.form() for index, verifier in enumerate(verifiers) if isinstance(verifier, OwnVerifier)}


def main(descriptor: int, parent: int, limit: float, memory_mb: int, log: str | None, plugins: Sequence[str]) -> None:
    """Take verifiers, then lists of jobs, from the socket; send each verdict as it is found; end when the socket does.

    Args:
        descriptor: file descriptor of the socket to the parent.
        parent: process id of the parent.
        limit: seconds for one completion, which the parent watches.
        memory_mb: MiB of data that this process may hold.
        log: file for what the user's code prints, if there is any.
        plugins: those of the parent, whose tasks a verifier may know.
    """
    die_with(parent)
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What verifiers print must not mix with the parent's output.
    os.dup2(2, 1)
    if log is None:
        guard()  # libraries log what they cannot read
    else:
        print_into(log)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))
    connection = Connection(descriptor)
    try:
        load_plugins(plugins, where="a verifier worker")
        verifiers: list[Verifier | OwnVerifier] = connection.recv()
        try:
            with importing():
                ready = Ready(prepare(verifiers))
            connection.send(ready)
        except VerifierError as error:
            traceback.print_exception(error)
            connection.send(Failed(error.what, error.where, error.hint))
            return
        while True:
            jobs: list[VerifyJob] = connection.recv()
            for job in jobs:
                for verdict in run_job(job, verifiers, limit):
                    connection.send(verdict)
                if log is not None and os.fstat(1).st_size > MAX_LOG:
                    os.ftruncate(1, 0)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def print_into(log: str) -> None:
    """Send standard output and error of this process and its children to the end of a file.

    What Python code prints, completions and exceptions among it, is written as a terminal would be shown it.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    guard()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent dies, even while it is stuck in native code (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        raise SystemExit("the parent has gone")
