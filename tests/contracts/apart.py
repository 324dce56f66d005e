"""A command of Python in a process of its own, which a test forks from a server that has imported everything.

`COMMAND` (`-m`, a module and its arguments; or a script and its own), `OUTPUT` (a file for what it prints) and
`ENVIRONMENT` (variables beside those of the session, a rank's for example) are given as globals.
"""

import os
import runpy
import sys

from posttrain.imports import importing

output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # noqa: F821
os.dup2(output, 1)
os.dup2(output, 2)
os.environ.update(ENVIRONMENT)  # noqa: F821
with importing():  # a collection would copy every page of what the server has
    pass
if COMMAND[0] == "-m":  # noqa: F821
    sys.argv = COMMAND[1:]  # noqa: F821
    runpy.run_module(COMMAND[1], run_name="__main__", alter_sys=True)  # noqa: F821
else:
    sys.argv = COMMAND  # noqa: F821
    runpy.run_path(COMMAND[0], run_name="__main__")  # noqa: F821
