"""Environments in processes that can be killed, each call under a clock.

An environment that does not answer in time is killed with its process, and so is what it has started. A new process
then plays the actions of all episodes that lived in the old one again, compares what it sees with what was seen, and
goes on. The episode that was being served gets one such second chance; a second death is its end (`Failure`). Where
replaying shows something else than before, the episode has `diverged`, and ends too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from posttrain.config.environment import EnvironmentConfig
from posttrain.data.sample import Problem
from posttrain.environments import confined, maker
from posttrain.environments.base import Failure, Fault, Step
from posttrain.environments.host import Act, Answer, Call, EnvironmentHost, EpisodeEnd, Reset
from posttrain.environments.pictures import taken_in
from posttrain.errors import StackError, WorldError
from posttrain.safe_files import temporary_log
from posttrain.verifiers.worker import Failed

START_LIMIT = 300.0
"""Seconds a process may take to import what the environment needs, on however busy a machine."""


@dataclass(slots=True)
class _Life:
    """An episode as the pool remembers it.

    Attributes:
        begun: the call that began it.
        seen: what every call so far was answered with, the first of them the reset's.
        actions: those that were answered.
        died: a process has died of it.
    """

    begun: Reset
    seen: list[Answer] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    died: bool = False

    def calls(self) -> list[Reset | Act]:
        """Those that were answered."""
        every: list[Reset | Act] = [self.begun, *(Act(self.begun.episode, action) for action in self.actions)]
        return every[: len(self.seen)]


class EnvironmentPool:
    """Plays any number of episodes at once; each has a number that the caller chooses and never uses again.

    Args:
        config: the environment, the number of processes and their clocks; with 0 environments live in this process,
            and nothing ends one that hangs.
        log: file for what environments print; None for one among the temporary files. It never reaches the terminal,
            which would obey what a policy has them print.

    Attributes:
        restarts: processes that died or were killed.
        tools: JSON descriptions of what the policy may call; known once it is started.
    """

    def __init__(self, config: EnvironmentConfig, log: Path | None = None) -> None:
        self.config, self.restarts = config, 0
        self.log = temporary_log("environment") if log is None and config.workers else log
        self.tools: tuple[dict[str, Any], ...] = ()
        self._lives: dict[int, _Life] = {}
        self._host: EnvironmentHost | None = None
        self._workers: dict[int, _Worker] = {}
        # The kernel ties a child to the thread that made it, so one thread that lives as long as the pool makes all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="environment-starter")
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._starter)

    def start(self) -> None:
        """Load the environment, if it is not.

        Raises:
            WorldError: the user's code cannot be loaded.
            StackError: a process cannot start.
        """
        if self.config.workers and not self._workers:
            if self.config.sandbox:
                confined.check()
            self._serve({0: deque()})
        elif not self.config.workers and self._host is None:
            made = maker(self.config)
            self._host, self.tools = EnvironmentHost(made.make), made.tools

    def equipped(self, problems: Sequence[Any]) -> list[Any]:
        """Problems with the tools of the environment, if it has any, for the chat template to show.

        Raises:
            WorldError, StackError: as `start`.
        """
        self.start()
        return [replace(problem, tools=self.tools) if self.tools else problem for problem in problems]

    def reset(self, starts: Mapping[int, tuple[Problem, int]]) -> dict[int, str | Failure]:
        """Begin episodes: their first observations.

        Args:
            starts: number of the episode -> problem and seed.

        Raises:
            WorldError, StackError: as `start`.
        """
        for episode, (problem, seed) in starts.items():
            self._lives[episode] = _Life(Reset(episode, problem, seed))
        return self._taken_in(self._call([self._lives[episode].begun for episode in starts]))

    def step(self, actions: Mapping[int, str]) -> dict[int, Step | Failure]:
        """One action of each of these episodes. An episode that fails is forgotten.

        Raises:
            WorldError, StackError: as `start`.
        """
        return self._taken_in(self._call([Act(episode, action) for episode, action in actions.items()]))

    def end(self, episodes: Iterable[int]) -> None:
        """Forget episodes."""
        for episode in episodes:
            if self._lives.pop(episode, None) is None:
                continue
            if self._host is not None:
                self._host.end(episode)
            elif (worker := self._workers.get(self._slot(episode))) is not None:
                worker.send([EpisodeEnd(episode)])

    def close(self) -> None:
        """Stop the processes. Further calls do nothing."""
        self._finalizer()

    def _taken_in(self, answers: dict[int, Any]) -> dict[int, Any]:
        """With their pictures in this process. One that cannot be read ends its episode."""
        found = {episode: taken_in(answer) for episode, answer in answers.items()}
        self.end(episode for episode, answer in found.items() if isinstance(answer, Failure))
        return found

    # ----------------------------------------------------------------------------------------------------- serving

    def _slot(self, episode: int) -> int:
        return episode % self.config.workers

    def _call(self, calls: list[Reset | Act]) -> dict[int, Any]:
        self.start()
        if self._host is not None:
            found = {call.episode: self._host.call(call) for call in calls}
            for call in calls:
                self._note(call, found[call.episode])
            return found
        waiting: dict[int, deque[Reset | Act]] = {}
        for call in calls:
            waiting.setdefault(self._slot(call.episode), deque()).append(call)
        return self._serve(waiting)

    def _note(self, call: Reset | Act, answer: Answer) -> None:
        """Remember an answer, or forget the episode."""
        if isinstance(answer, Failure):
            del self._lives[call.episode]
            return
        life = self._lives[call.episode]
        life.seen.append(answer)
        if isinstance(call, Act):
            life.actions.append(call.action)

    def _serve(self, waiting: dict[int, deque[Reset | Act]]) -> dict[int, Answer]:
        """Have the calls of each process answered."""
        found: dict[int, Answer] = {}
        try:
            for slot, calls in waiting.items():
                if slot not in self._workers:
                    self._workers[slot] = self._starter.submit(_Worker, self).result()
                self._workers[slot].send(calls)
            while busy := {slot: worker for slot, worker in self._workers.items() if worker.calls or not worker.ready}:
                self._watch(busy, found)
        except BaseException:
            # After an interrupt they still hold calls, whose answers the next one must not see.
            _stop_all(self._workers)
            raise
        return found

    def _watch(self, busy: dict[int, _Worker], found: dict[int, Answer]) -> None:
        """Wait until a process says something, dies or is too late, and settle that."""
        deadline = min(worker.deadline() for worker in busy.values())
        connections = [worker.connection for worker in busy.values()]
        readable = wait(connections, timeout=max(0.0, deadline - time.monotonic()))
        for slot, worker in busy.items():
            if worker.connection in readable or worker.connection.poll():
                if self._receive(worker, found):
                    continue
                failure = Failure(Fault.CRASH, f"the process of the environment died ({worker.exit_status()})")
            elif time.monotonic() >= worker.deadline():
                failure = Failure(Fault.TIMEOUT, f"longer than {worker.limit():g} s")
            else:
                continue
            self._bury(slot, worker, failure, found)

    def _receive(self, worker: _Worker, found: dict[int, Answer]) -> bool:
        """Take the answers that a process has sent. False if it died."""
        try:
            while worker.connection.poll():
                answer = worker.connection.recv()
                worker.since = time.monotonic()
                if isinstance(answer, Failed):
                    raise WorldError(answer.what, where=answer.where, hint=answer.hint)
                if not worker.ready:
                    worker.ready, self.tools = True, answer
                else:
                    self._settle(worker, answer, found)
        except (EOFError, OSError):
            return False
        return True

    def _settle(self, worker: _Worker, answer: Answer, found: dict[int, Answer]) -> None:
        call, known = worker.calls.popleft()
        if call.episode not in self._lives:  # it has diverged in a replay whose calls were on their way
            return
        if known is None:
            found[call.episode] = answer
            self._note(call, answer)
        elif answer != known:
            found[call.episode] = Failure(Fault.DIVERGED, _difference(call, known, answer))
            self.end([call.episode])

    def _bury(self, slot: int, worker: _Worker, failure: Failure, found: dict[int, Answer]) -> None:
        """Replace a process that is dead or must die, and have its episodes played again there."""
        del self._workers[slot]
        worker.stop()
        if not worker.ready:
            raise StackError(
                f"a process for environments did not start (exit status {worker.process.returncode})",
                hint=f"what it wrote to {self.log} says why",
            )
        self.restarts += 1
        if worker.calls:
            guilty = worker.calls[0][0].episode
            life = self._lives.get(guilty)
            if life is not None and life.died:
                found[guilty] = failure
                del self._lives[guilty]
            elif life is not None:
                life.died = True
        pending = [call for call, known in worker.calls if known is None and call.episode in self._lives]
        lives = [life for episode, life in self._lives.items() if self._slot(episode) == slot]
        replayed = [call for life in lives for call in life.calls()]
        fresh = self._workers[slot] = self._starter.submit(_Worker, self).result()
        # In one message: the process answers while the next one would be on its way, and both would wait.
        fresh.send([*replayed, *pending], [answer for life in lives for answer in life.seen])


class _Worker:
    """One process, seen from the parent.

    Attributes:
        calls: what it has been sent and has not answered, each with the answer that is known of a replay; it is busy
            with the first.
        since: monotonic time of its start, or from which it is busy with that call.
        ready: it has loaded the environment.
    """

    def __init__(self, pool: EnvironmentPool) -> None:
        self.config = pool.config
        self.connection, theirs = Pipe()
        assert pool.log is not None  # as there are processes
        within = [] if not pool.config.sandbox else confined.command(pool.log)
        parent = os.getpid() if not within else 1  # the first process of the sandbox, which ends with this one
        log = str(pool.log.resolve())
        arguments = f"{theirs.fileno()}, {parent}, {pool.config.memory_mb}, {log!r}, {pool.config.sandbox}"
        path = [os.path.abspath(folder) for folder in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from posttrain.environments.worker import main; main({arguments})"
        self.process = subprocess.Popen(
            [*within, sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            close_fds=True,
            process_group=0,
        )
        theirs.close()
        self.calls: deque[tuple[Reset | Act, Answer | None]] = deque()
        self.since = time.monotonic()
        self.ready = False
        self._tell(pool.config)

    def limit(self) -> float:
        """Seconds from `since` after which it is killed."""
        if not self.ready:
            return START_LIMIT
        return self.config.reset_seconds if isinstance(self.calls[0][0], Reset) else self.config.step_seconds

    def deadline(self) -> float:
        return self.since + self.limit()

    def send(self, calls: Iterable[Call], known: Iterable[Answer] = ()) -> None:
        """Give it calls, and of a replay what they were answered with."""
        sent = list(calls)
        if not sent:
            return
        if not self.calls:
            self.since = max(self.since, time.monotonic()) if self.ready else self.since
        answers: list[Any] = [*known]
        answers += [None] * (len(sent) - len(answers))
        self.calls += [
            (call, answer) for call, answer in zip(sent, answers, strict=True) if not isinstance(call, EpisodeEnd)
        ]
        self._tell(sent)

    def _tell(self, what: object) -> None:
        # If it has died, the connection reads as ended, where this is noticed.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(what)

    def exit_status(self) -> str:
        """For people."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"exit status {self.process.wait(timeout=4.0)}"
        return "it closed its connection"

    def stop(self) -> None:
        """Kill it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


def _difference(call: Reset | Act, before: Answer, now: Answer) -> str:
    what = "reset" if isinstance(call, Reset) else f"the action {call.action!r}"
    return f"played again, {what} gave {now!r}, and before {before!r}"[:300]


def _stop_all(workers: dict[int, _Worker]) -> None:
    while workers:
        workers.popitem()[1].stop()


def _stop(workers: dict[int, _Worker], starter: ThreadPoolExecutor) -> None:
    _stop_all(workers)
    starter.shutdown()
