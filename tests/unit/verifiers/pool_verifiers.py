"""Verifiers that misbehave on command. Workers import this module, so it stands beside the tests."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from posttrain.data.sample import Problem
from posttrain.verifiers.verdict import Status, Verdict


class Obeys:
    """Does what the completion says; the detail of a normal verdict is the worker's process id."""

    name = "obeys"
    outcome = True

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        order, _, argument = completion.partition(" ")
        if order == "sleep":
            time.sleep(float(argument))
        elif order == "regex":  # holds the interpreter lock, in native code, for longer than anyone lives
            Path(argument).write_text(str(os.getpid()))
            re.fullmatch("(a+)+", "a" * 60 + "b")
        elif order == "exit":
            os._exit(int(argument))
        elif order == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif order == "raise":
            raise KeyError(argument)
        elif order == "quit":
            raise SystemExit(3)
        elif order == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        elif order == "float":
            return 1.0
        elif order == "long":
            return Verdict(Status.WRONG, 0.0, "x" * 10_000)
        elif order == "print":
            print("noise on standard output", flush=True)
        elif order == "hangup":
            os.closerange(3, 100)
            time.sleep(60)
        return Verdict(Status.CORRECT, 1.0, f"{os.getpid()} {completion}")


class CannotPrepare(Obeys):
    """Its package is missing, say."""

    def prepare(self) -> None:
        raise ImportError("no such package")


class Prepared(Obeys):
    """Correct only if prepared first."""

    ready = False

    def prepare(self) -> None:
        self.ready = True

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        return Verdict(Status.CORRECT, 1.0) if self.ready else Verdict(Status.WRONG, 0.0)
