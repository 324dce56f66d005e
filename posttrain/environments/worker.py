"""The process that environments run in. Imports neither torch nor anything else that is slow to start."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from posttrain.environments import maker
from posttrain.environments.confined import FOLDER
from posttrain.environments.host import Call, EnvironmentHost, EpisodeEnd
from posttrain.errors import WorldError
from posttrain.verifiers.worker import MAX_LOG, Failed, die_with, print_into


def main(descriptor: int, parent: int, memory_mb: int, log: str, confined: bool) -> None:
    """Take the section of the recipe, then lists of calls, from the socket; answer each but `EpisodeEnd` as it is done.

    The first answer are the descriptions of tools once the environment is loaded, or what kept it from being. The
    process ends when the socket does.

    Args:
        descriptor: file descriptor of the socket to the parent.
        parent: process id of the parent.
        memory_mb: MiB of data that this process may hold.
        log: file for what environments print.
        confined: it may write nothing but below `FOLDER`.
    """
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole process group; the parent decides
    print_into(log)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))
    connection = Connection(descriptor)
    try:
        try:
            made = maker(connection.recv())
        except WorldError as error:
            traceback.print_exception(error)
            connection.send(Failed(error.what, error.where, error.hint))
            return
        host = EnvironmentHost(made.make, Path(FOLDER) if confined else None)
        connection.send(made.tools)
        while True:
            calls: list[Call] = connection.recv()
            for call in calls:
                if isinstance(call, EpisodeEnd):
                    host.end(call.episode)
                else:
                    connection.send(host.call(call))
            if os.fstat(1).st_size > MAX_LOG:
                os.ftruncate(1, 0)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit()
