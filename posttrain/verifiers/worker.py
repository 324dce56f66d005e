"""The process that runs verifiers. Imports neither torch nor anything else that is slow to start."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Protocol, runtime_checkable

from posttrain.data.sample import Problem
from posttrain.verifiers.verdict import Status, Verdict, Verifier

Job = tuple[int, int, Problem, str]
"""Number of the job, index of its verifier, problem, completion."""

READY = "ready"
MAX_DETAIL = 300
_PR_SET_PDEATHSIG = 1


@runtime_checkable
class Prepares(Protocol):
    """A verifier whose first call is slow unless `prepare` was called; it runs before the clock does."""

    def prepare(self) -> None: ...


def run_verifier(verifier: Verifier, problem: Problem, completion: str) -> Verdict:
    """The verdict, or a crash verdict with the exception that the verifier raised."""
    try:
        verdict = verifier(problem, completion)
    # Whatever user-given text makes a verifier raise is a verdict by contract: it must not stop the run, and not count.
    except Exception as error:
        return Verdict(Status.CRASH, None, f"{type(error).__name__}: {error}"[:MAX_DETAIL])
    if not isinstance(verdict, Verdict):
        return Verdict(Status.CRASH, None, f"{verifier.name} returned {type(verdict).__name__}, not a Verdict")
    # What a completion makes long must not fill the connection to the parent, or the journal of an evaluation.
    answer = None if verdict.answer is None else verdict.answer[:MAX_DETAIL]
    return replace(verdict, detail=verdict.detail[:MAX_DETAIL], answer=answer)


def prepare(verifiers: Sequence[Verifier]) -> None:
    """Load what the first calls need."""
    for verifier in verifiers:
        if isinstance(verifier, Prepares):
            verifier.prepare()


def main(descriptor: int, parent: int) -> None:
    """Take verifiers, then lists of jobs, from the socket; send each verdict as it is found; end when the socket does.

    Args:
        descriptor: file descriptor of the socket to the parent.
        parent: process id of the parent.
    """
    _die_with(parent)
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What verifiers print must not mix with the parent's output.
    os.dup2(2, 1)
    connection = Connection(descriptor)
    try:
        verifiers: list[Verifier] = connection.recv()
        prepare(verifiers)
        connection.send(READY)
        while True:
            jobs: list[Job] = connection.recv()
            for number, index, problem, completion in jobs:
                connection.send((number, run_verifier(verifiers[index], problem, completion)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent dies, even while it is stuck in native code (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        raise SystemExit("the parent has gone")
