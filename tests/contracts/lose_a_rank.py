"""Trains a recipe on several ranks, of which the second kills itself; run by test_launch under a launcher.

MOMENT in the environment is an event and its number from 1, as `token:35`; the time of death is written to DIED.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from posttrain.cli.main import main
from posttrain.rollouts import transformers_engine
from posttrain.trainers.shell import Shell

event, _, number = os.environ["MOMENT"].partition(":")
left = int(number)


def counted(function):
    """The function; the call with that number is the last thing that the process begins."""

    def wrapped(*arguments, **keywords):
        global left
        left -= 1
        if left == 0:
            Path(os.environ["DIED"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    return wrapped


if os.environ["RANK"] == "1":
    if event == "token":
        transformers_engine.choose = counted(transformers_engine.choose)
    elif event == "write":
        torch.save = counted(torch.save)
    elif event == "update":
        Shell.compute_loss = counted(Shell.compute_loss)
    else:
        sys.exit(f"no event {event!r}")

sys.argv = ["posttrain", "train", *sys.argv[1:]]
main()
