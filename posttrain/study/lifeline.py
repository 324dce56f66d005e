"""A pipe by which the cells of a study notice that it has gone.

The parent of a cell is the server that it was forked from, and that lives for as long as one of its cells does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from threading import Thread


def lifeline() -> Connection:
    """What the processes of cells are given: the end of a pipe whose other end closes with this process."""
    return _pipe()[0]


@cache
def _pipe() -> tuple[Connection, Connection]:
    return multiprocessing.Pipe(duplex=False)


def stop_with(study: Connection) -> None:
    """Have this process get SIGTERM, which a training run answers with a checkpoint, when the study has gone.

    Args:
        study: its `lifeline`.
    """

    def wait() -> None:
        with suppress(EOFError):
            study.recv_bytes()  # nothing is ever sent
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=wait, daemon=True).start()
