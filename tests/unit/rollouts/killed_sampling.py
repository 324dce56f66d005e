"""Runs a sampling run that is killed at the given sizes of its file, each attempt in a process of its own.

Arguments: settings (YAML), then sizes in bytes. The packages are imported once, before the first fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from posttrain.config.collection import SampleConfig
from posttrain.config.loading import load_config
from posttrain.rollouts.collect import collect


def attempt(config: SampleConfig, output: Path, size: int | None) -> bool:
    """Whether the attempt was killed."""
    child = os.fork()
    if child == 0:
        collect(config, output, say=lambda line: None)
        os._exit(0)
    while size is not None:
        if output.exists() and output.stat().st_size >= size:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    settings = load_config(sys.argv[1], SampleConfig)
    file = Path(settings.output)
    kills = [attempt(settings, file, int(size)) for size in sys.argv[2:]]
    assert not attempt(settings, file, None)
    print(sum(kills))
