"""Runs verifiers in worker processes, each completion under a limit of wall-clock time.

Workers are fresh interpreters, neither forks of this process (whose torch threads would not survive) nor
`multiprocessing` children (which import the main script again, and torch with it). They start at the first use.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from posttrain.config.plugins import loaded
from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import StackError, VerifierError
from posttrain.verifiers.verdict import Answer, Form, OwnVerifier, Status, Verdict, Verifier
from posttrain.verifiers.worker import Failed, Ready, VerifyJob, prepare, run_job

MAX_CHUNK = 32
"""Most jobs sent to a worker at once; the limit of time remains one for each."""

EXIT_LIMIT = 4.0
"""Seconds to wait for the exit status of a worker that has closed its connection."""

START_LIMIT = 300.0
"""Seconds a worker may take to import what its verifiers need, on however busy a machine."""


class VerifierPool:
    """Worker processes that judge completions.

    A verifier that takes longer than the limit is killed with its worker: TIMEOUT, or WRONG with `on_timeout: wrong`,
    as an answer that nobody can check in time must not escape the penalty of a wrong one; so does one that says itself
    that time ran out. One that ends its worker, or
    whose worker is killed from outside, gets CRASH, and so does one that raises. Other completions are not affected:
    their verdicts are kept or they go to another worker. The order of results is that of the inputs. Code of the user's
    own may ask for all completions of a prompt at once (neighbours with the same problem); these share their fate.

    May be used from any thread, by one at a time (others wait). Workers die with this process.

    Args:
        verifiers: picklable, and importable from a fresh interpreter with this one's `sys.path`.
        config: number of workers and limits; 0 workers runs in this process without a limit.
        log: file for what the user's code prints; not with 0 workers.
    """

    def __init__(
        self, verifiers: Sequence[Verifier | OwnVerifier], config: VerifierPoolConfig, log: Path | None = None
    ) -> None:
        self.verifiers = list(verifiers)
        self.config = config
        self.log = log
        self._forms: dict[int, Form] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[_Worker] = []
        # The kernel ties a child to the thread that made it, so one thread that lives as long as the pool makes all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="verifier-starter")
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._starter)

    def start(self) -> dict[int, Form]:
        """Have one worker load the verifiers, if none has; how the user's code among them is called, by index.

        Raises:
            StackError: a worker cannot start.
            VerifierError: the user's code cannot be loaded.
        """
        with self._lock:
            self._refuse_closed()
            if self._forms is None:
                if self.config.workers:
                    self._workers.append(self._starter.submit(_Worker, self).result())
                    self._wait_for_first()
                else:
                    self._forms = prepare(self.verifiers)
            return self._forms

    def verify(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        tokens: Sequence[int | None] | None = None,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Verdict]]:
        """Verdicts of all verifiers on each completion: outer list as `completions`, inner as `verifiers`.

        Args:
            tokens, ids: lengths of the completions, and their tokens, for the user's code.

        Raises:
            ValueError: different numbers of problems and completions, or the pool is closed.
            StackError: a worker cannot start.
            VerifierError: the user's code cannot be loaded.
        """
        if len(problems) != len(completions):
            raise ValueError(f"{len(problems)} problems but {len(completions)} completions")
        count = len(self.verifiers)
        unknown = [None] * len(completions)
        known = zip(completions, tokens or unknown, unknown if ids is None else map(tuple, ids), strict=True)
        answers = [Answer(text, length, ids=own) for text, length, own in known]
        jobs = [job for index in range(count) for job in self._jobs(index, problems, answers)]
        jobs.sort(key=lambda job: job.numbers[0])
        with self._lock:
            self._refuse_closed()
            found = self._run(jobs, count * len(answers)) if self.config.workers else self._run_here(jobs)
        verdicts = [found[number] for number in range(count * len(answers))]
        return [verdicts[start : start + count] for start in range(0, len(verdicts), count)]

    def _jobs(self, index: int, problems: Sequence[Problem], answers: Sequence[Answer]) -> Iterator[VerifyJob]:
        count, rows = len(self.verifiers), range(len(answers))
        if isinstance(self.verifiers[index], OwnVerifier):
            groups = [list(own) for _, own in groupby(rows, key=lambda row: problems[row].id)]
        else:
            groups = [[row] for row in rows]
        for own in groups:
            numbers = tuple(row * count + index for row in own)
            yield VerifyJob(numbers, index, problems[own[0]], tuple(answers[row] for row in own))

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ValueError("the verifier pool is closed")

    def close(self) -> None:
        """Stop the workers. Further calls do nothing."""
        with self._lock:
            self._closed = True
            self._finalizer()

    def _run_here(self, jobs: list[VerifyJob]) -> dict[int, Verdict]:
        if self._forms is None:
            self._forms = prepare(self.verifiers)
        found = ((job.numbers, run_job(job, self.verifiers, None)) for job in jobs)
        return {
            n: _by_rule(verdict, self.config)
            for numbers, verdicts in found
            for n, verdict in zip(numbers, verdicts, strict=True)
        }

    def _run(self, jobs: list[VerifyJob], count: int) -> dict[int, Verdict]:
        verdicts: dict[int, Verdict] = {}
        size = max(1, min(MAX_CHUNK, -(-len(jobs) // (4 * self.config.workers))))
        waiting = deque(jobs[start : start + size] for start in range(0, len(jobs), size))
        try:
            while len(verdicts) < count:
                self._hand_out(waiting)
                self._watch(verdicts, waiting)
        finally:
            # After an interrupt workers still hold jobs of this call, whose verdicts the next one must not see.
            for worker in [worker for worker in self._workers if worker.jobs]:
                self._remove(worker)
        return verdicts

    def _wait_for_first(self) -> None:
        while self._forms is None:
            self._watch({}, deque())

    def _watch(self, verdicts: dict[int, Verdict], waiting: deque[list[VerifyJob]]) -> None:
        """Wait until a worker says something, dies or is too late, and settle that."""
        active = [worker for worker in self._workers if worker.jobs or not worker.ready]
        deadline = min(worker.since + worker.limit() for worker in active)
        readable = wait([worker.connection for worker in active], timeout=max(0.0, deadline - time.monotonic()))
        for worker in active:
            if worker.connection in readable:
                alive = worker.receive(verdicts)
            else:
                alive = time.monotonic() < worker.since + worker.limit()
                # Time may have passed in this process rather than in the worker: look once more.
                alive = alive or worker.connection.poll()
                if not alive and worker.ready:
                    worker.give_up(verdicts, Status.TIMEOUT, f"longer than {self.config.timeout:g} s")
            if not alive:
                self._bury(worker, waiting)
            elif worker.ready and self._forms is None:
                self._forms = worker.forms

    def _hand_out(self, waiting: deque[list[VerifyJob]]) -> None:
        idle = [worker for worker in self._workers if worker.ready and not worker.jobs]
        for worker in [worker for worker in idle if worker.process.poll() is not None]:
            self._remove(worker)
        for worker in self._workers:
            if waiting and worker.ready and not worker.jobs:
                worker.send(waiting.popleft())
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self.config.workers - len(self._workers), len(waiting) - starting)):
            self._workers.append(self._starter.submit(_Worker, self).result())

    def _bury(self, worker: _Worker, waiting: deque[list[VerifyJob]]) -> None:
        """Remove a worker that is dead or must die, and put the jobs it has not begun in front of the others."""
        if worker.jobs:
            waiting.appendleft(list(worker.jobs))
        self._remove(worker)
        if worker.failed is not None:
            raise VerifierError(worker.failed.what, where=worker.failed.where, hint=worker.failed.hint)
        if not worker.ready:
            raise StackError(
                f"a verifier worker did not start (exit status {worker.process.returncode})",
                hint=f"what it wrote to {self.log or 'standard error'} says why",
            )

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()


class _Worker:
    """One process, seen from the parent.

    Attributes:
        jobs: what it has been sent and has not answered; it is busy with the first.
        since: monotonic time of its start, or from which it is busy with that job.
        forms: what it says of the user's code; None until it has loaded its verifiers.
        failed: why it cannot load them.
    """

    def __init__(self, pool: VerifierPool) -> None:
        self.connection, theirs = Pipe()
        self.config = pool.config
        log = None if pool.log is None else str(pool.log)
        limits = f"{pool.config.timeout!r}, {pool.config.memory_mb}, {log!r}"
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from posttrain.verifiers.worker import main; main({theirs.fileno()}, {os.getpid()}, {limits}, {loaded!r})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            close_fds=True,
            process_group=0,
        )
        theirs.close()
        self.jobs: deque[VerifyJob] = deque()
        self.since = time.monotonic()
        self.forms: dict[int, Form] | None = None
        self.failed: Failed | None = None
        _send(self.connection, pool.verifiers)

    @property
    def ready(self) -> bool:
        """Whether it has loaded its verifiers."""
        return self.forms is not None

    def limit(self) -> float:
        """Seconds from `since` after which it is killed."""
        if not self.ready:
            return START_LIMIT
        return self.config.timeout * (len(self.jobs[0].numbers) if self.jobs and self._whole(self.jobs[0]) else 1)

    def _whole(self, job: VerifyJob) -> bool:
        """Whether the verdicts of a job come together."""
        form = self.forms.get(job.verifier)
        return form is not None and form.whole

    def send(self, jobs: list[VerifyJob]) -> None:
        self.jobs.extend(jobs)
        _send(self.connection, jobs)
        self.since = time.monotonic()

    def receive(self, verdicts: dict[int, Verdict]) -> bool:
        """Take the verdicts it has sent. False if it died; the job it was busy with has then crashed."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                self.since = time.monotonic()
                if isinstance(message, Ready):
                    self.forms = message.forms
                elif isinstance(message, Failed):
                    self.failed = message
                    return False
                else:
                    self._settle(verdicts, message)
        except (EOFError, OSError):
            if self.jobs:
                self.give_up(verdicts, Status.CRASH, f"the worker died ({self._exit_status()})")
            return False
        return True

    def _settle(self, verdicts: dict[int, Verdict], verdict: Verdict) -> None:
        """Take the verdict on the first completion that it is busy with."""
        job = self.jobs.popleft()
        verdicts[job.numbers[0]] = _by_rule(verdict, self.config)
        if len(job.numbers) > 1:
            self.jobs.appendleft(job._replace(numbers=job.numbers[1:], answers=job.answers[1:]))

    def give_up(self, verdicts: dict[int, Verdict], status: Status, detail: str) -> None:
        """Settle the completion it is busy with, or all of them where they come together."""
        for _ in self.jobs[0].numbers if self._whole(self.jobs[0]) else (0,):
            self._settle(verdicts, Verdict(status, None, detail))

    def _exit_status(self) -> str:
        try:
            return f"exit status {self.process.wait(timeout=EXIT_LIMIT)}"
        except subprocess.TimeoutExpired:
            return "it closed its connection"

    def stop(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):  # the group, for what the user's code has started
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _by_rule(verdict: Verdict, config: VerifierPoolConfig) -> Verdict:
    """A verdict with `on_timeout` applied, whether the pool or the verifier itself ran out of time."""
    if verdict.status is not Status.TIMEOUT or config.on_timeout == "unknown":
        return verdict
    return replace(verdict, status=Status.WRONG, score=0.0, detail=f"{verdict.detail}, which counts as wrong")


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
