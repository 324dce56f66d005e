"""Runs verifiers in worker processes, each completion under a limit of wall-clock time.

Workers are fresh interpreters, neither forks of this process (whose torch threads would not survive) nor
`multiprocessing` children (which import the main script again, and torch with it). They start at the first use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import StackError
from posttrain.verifiers.verdict import Status, Verdict, Verifier
from posttrain.verifiers.worker import READY, Job, prepare, run_verifier

MAX_CHUNK = 32
"""Most jobs sent to a worker at once; the limit of time remains one for each."""

EXIT_LIMIT = 4.0
"""Seconds to wait for the exit status of a worker that has closed its connection."""

START_LIMIT = 300.0
"""Seconds a worker may take to import what its verifiers need, on however busy a machine."""


class VerifierPool:
    """Worker processes that judge completions.

    A verifier that takes longer than the limit is killed with its worker: TIMEOUT. One that ends its worker, or whose
    worker is killed from outside, gets CRASH, and so does one that raises. Other completions are not affected: their
    verdicts are kept or they go to another worker. The order of results is that of the inputs.

    May be used from any thread, by one at a time (others wait). Workers die with this process.

    Args:
        verifiers: picklable, and importable from a fresh interpreter with this one's `sys.path`.
        config: number of workers and limit; 0 workers runs in this process without a limit.
    """

    def __init__(self, verifiers: Sequence[Verifier], config: VerifierPoolConfig) -> None:
        self.verifiers = list(verifiers)
        self.config = config
        self._lock = threading.Lock()
        self._prepared = self._closed = False
        self._workers: list[_Worker] = []
        # The kernel ties a child to the thread that made it, so one thread that lives as long as the pool makes all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="verifier-starter")
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._starter)

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[list[Verdict]]:
        """Verdicts of all verifiers on each completion: outer list as `completions`, inner as `verifiers`.

        Raises:
            ValueError: different numbers of problems and completions, or the pool is closed.
            StackError: a worker cannot start.
        """
        if len(problems) != len(completions):
            raise ValueError(f"{len(problems)} problems but {len(completions)} completions")
        count = len(self.verifiers)
        jobs = [
            (row * count + index, index, problem, completion)
            for row, (problem, completion) in enumerate(zip(problems, completions, strict=True))
            for index in range(count)
        ]
        with self._lock:
            if self._closed:
                raise ValueError("the verifier pool is closed")
            verdicts = self._run(jobs) if self.config.workers else self._run_here(jobs)
        return [verdicts[start : start + count] for start in range(0, len(verdicts), count)]

    def close(self) -> None:
        """Stop the workers. Further calls do nothing."""
        with self._lock:
            self._closed = True
            self._finalizer()

    def _run_here(self, jobs: list[Job]) -> list[Verdict]:
        if not self._prepared:
            prepare(self.verifiers)
            self._prepared = True
        return [run_verifier(self.verifiers[index], problem, completion) for _, index, problem, completion in jobs]

    def _run(self, jobs: list[Job]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        size = max(1, min(MAX_CHUNK, -(-len(jobs) // (4 * self.config.workers))))
        waiting = deque(jobs[start : start + size] for start in range(0, len(jobs), size))
        try:
            while len(verdicts) < len(jobs):
                self._hand_out(waiting)
                active = [worker for worker in self._workers if worker.jobs or not worker.ready]
                now = time.monotonic()
                deadline = min(worker.since + worker.limit(self.config.timeout) for worker in active)
                readable = wait([worker.connection for worker in active], timeout=max(0.0, deadline - now))
                for worker in active:
                    if worker.connection in readable:
                        alive = worker.receive(verdicts)
                    else:
                        alive = time.monotonic() < worker.since + worker.limit(self.config.timeout)
                        # Time may have passed in this process rather than in the worker: look once more.
                        alive = alive or worker.connection.poll()
                        if not alive and worker.ready:
                            worker.give_up(verdicts, Status.TIMEOUT, f"longer than {self.config.timeout:g} s")
                    if not alive:
                        self._bury(worker, waiting)
        finally:
            # After an interrupt workers still hold jobs of this call, whose verdicts the next one must not see.
            for worker in [worker for worker in self._workers if worker.jobs]:
                self._remove(worker)
        return [verdicts[number] for number in range(len(jobs))]

    def _hand_out(self, waiting: deque[list[Job]]) -> None:
        idle = [worker for worker in self._workers if worker.ready and not worker.jobs]
        for worker in [worker for worker in idle if worker.process.poll() is not None]:
            self._remove(worker)
        for worker in self._workers:
            if waiting and worker.ready and not worker.jobs:
                worker.send(waiting.popleft())
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self.config.workers - len(self._workers), len(waiting) - starting)):
            self._workers.append(self._starter.submit(_Worker, self.verifiers).result())

    def _bury(self, worker: _Worker, waiting: deque[list[Job]]) -> None:
        """Remove a worker that is dead or must die, and put the jobs it has not begun in front of the others."""
        if worker.jobs:
            waiting.appendleft(list(worker.jobs))
        self._remove(worker)
        if not worker.ready:
            raise StackError(
                f"a verifier worker did not start (exit status {worker.process.returncode})",
                hint="what it wrote to standard error says why",
            )

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()


class _Worker:
    """One process, seen from the parent.

    Attributes:
        jobs: what it has been sent and has not answered; it is busy with the first.
        since: monotonic time of its start, or from which it is busy with that job.
        ready: whether it has loaded its verifiers.
    """

    def __init__(self, verifiers: list[Verifier]) -> None:
        self.connection, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from posttrain.verifiers.worker import main; main({theirs.fileno()}, {os.getpid()})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, close_fds=True
        )
        theirs.close()
        self.jobs: deque[Job] = deque()
        self.since = time.monotonic()
        self.ready = False
        _send(self.connection, verifiers)

    def limit(self, timeout: float) -> float:
        """Seconds from `since` after which it is killed."""
        return timeout if self.ready else START_LIMIT

    def send(self, jobs: list[Job]) -> None:
        self.jobs.extend(jobs)
        _send(self.connection, jobs)
        self.since = time.monotonic()

    def receive(self, verdicts: dict[int, Verdict]) -> bool:
        """Take the verdicts it has sent. False if it died; the job it was busy with has then crashed."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                self.since = time.monotonic()
                if message == READY:
                    self.ready = True
                    continue
                number, verdict = message
                verdicts[number] = verdict
                self.jobs.popleft()
        except (EOFError, OSError):
            if self.jobs:
                self.give_up(verdicts, Status.CRASH, f"the worker died ({self._exit_status()})")
            return False
        return True

    def give_up(self, verdicts: dict[int, Verdict], status: Status, detail: str) -> None:
        """Settle the job it is busy with."""
        number, *_ = self.jobs.popleft()
        verdicts[number] = Verdict(status, None, detail)

    def _exit_status(self) -> str:
        try:
            return f"exit status {self.process.wait(timeout=EXIT_LIMIT)}"
        except subprocess.TimeoutExpired:
            return "it closed its connection"

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _send(connection: Connection, message: object) -> None:
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        # It has died; the connection then reads as ended, where this is noticed.
        return


def _stop(workers: list[_Worker], starter: ThreadPoolExecutor) -> None:
    while workers:
        workers.pop().stop()
    starter.shutdown()
