"""For containers in which posttrain is process 1: the kernel gives that one every orphan, and nobody else buries them.

Workers and sandboxes that are killed leave children behind. As zombies they would fill the container's table of
processes in a long run.
"""

from __future__ import annotations

import os
import signal
import sys

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def if_first() -> None:
    """Go on in a child, if this is process 1, which then waits for all that ends and hands signals on.

    Call before there are threads. It does not return in process 1, which ends as its child does.
    """
    if os.getpid() != 1:
        return
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    waiting = [0]
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(waiting[0], number) if waiting[0] else None)
    waiting[0] = os.fork()
    if waiting[0] == 0:
        for number, handler in before.items():
            signal.signal(number, handler)
        return
    while True:
        ended, status = os.wait()
        if ended == waiting[0]:
            code = os.waitstatus_to_exitcode(status)
            sys.stdout.flush()
            os._exit(code if code >= 0 else 128 - code)
