"""A study whose one cell does nothing, for test_study_runs.py. The cell writes its pid into the file that is named."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

from posttrain.study.lifeline import lifeline, stop_with


def cell(study, found):
    stop_with(study)
    (found.parent / "written").write_text(str(os.getpid()))
    (found.parent / "written").rename(found)
    time.sleep(600)


if __name__ == "__main__":
    server = multiprocessing.get_context("forkserver")
    server.Process(target=cell, args=(lifeline(), Path(sys.argv[1]))).start()
    time.sleep(600)
