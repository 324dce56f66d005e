"""Trains a recipe in a process of its own, which kills itself at a chosen moment; run by test_survival.

`RECIPE`, `RESUME` (or None), `OUTPUT` (a file for what it prints), `COUNTS` (a file for how often each event happened,
or None) and `MOMENT` (event and its number from 1, or None) are given as globals.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from posttrain.imports import importing

with importing():  # forked from a server that has it all: a collection would copy every page of that
    import torch

    from posttrain.config.loading import load_recipe
    from posttrain.errors import PosttrainError
    from posttrain.methods import METHODS
    from posttrain.rollouts import transformers_engine
    from posttrain.tracking.events import EventFile
    from posttrain.tracking.transcript import Transcript
    from posttrain.trainers.run import train

counts = Counter()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def counted(event, function, torn=None):
    """The function, counted; at the chosen moment the process dies before it, or in the middle of what it writes."""

    def wrapped(*arguments, **keywords):
        counts[event] += 1
        if (event, counts[event]) == MOMENT:  # noqa: F821
            if torn is not None:
                function(*arguments, **keywords)
                torn(*arguments)
            die()
        return function(*arguments, **keywords)

    return wrapped


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)


def cut_last_line(log, *_):
    os.truncate(log.path, os.path.getsize(log.path) - 5)


torch.save = counted("write", torch.save, torn=lambda value, path: cut_in_half(path))
os.rename = counted("rename", os.rename)
os.fsync = counted("sync", os.fsync)
EventFile.append = counted("metrics line", EventFile.append, torn=cut_last_line)
Transcript.write = counted("samples line", Transcript.write, torn=cut_last_line)
transformers_engine.choose = counted("token", transformers_engine.choose)
torch.optim.AdamW.step = counted("update", torch.optim.AdamW.step)

output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # noqa: F821
os.dup2(output, 1)
os.dup2(output, 2)
try:
    train(
        load_recipe(RECIPE, [], {name: cls.Config for name, cls in METHODS.items()}),  # noqa: F821
        resume=RESUME,  # noqa: F821
    )
except PosttrainError as error:
    print(error)
    sys.exit(2)
if COUNTS is not None:  # noqa: F821
    Path(COUNTS).write_text(json.dumps(counts))  # noqa: F821
