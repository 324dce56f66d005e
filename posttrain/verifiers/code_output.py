"""Whether the output of a program is right: equal, equal within a tolerance, or accepted by a checker program.

A checker is a Python program, started as `checker INPUT EXPECTED OUTPUT` with the names of three files, as those
of programming contests are. It accepts by ending with status 0; what it prints last may be a score instead, of which 1
and more accepts. Another status and an assertion that fails reject. It runs in a sandbox of its own, with the limits of
the tested code.

A checker that fails, by another exception or at a limit, says nothing of the answer, if it fails on the expected output
too. If it accepts that, the answer made it fail, and is wrong.
"""

from __future__ import annotations

import json
import math
import time

from posttrain.verifiers.sandbox import End, Finished, Sandbox
from posttrain.verifiers.verdict import Status, Verdict

RAISED = 213
"""Exit status of a checker that raised something; those of programming contests end with small ones."""

MAX_TRACEBACK = 250
"""Characters kept of what a checker that failed wrote last."""

_START = f"""
import json, os, sys, tempfile, traceback
given = json.load(sys.stdin)
folder = tempfile.mkdtemp()
names = []
for name in ("input", "expected", "output"):
    names.append(os.path.join(folder, name + ".txt"))
    with open(names[-1], "w", encoding="utf-8") as file:
        file.write(given[name])
sys.argv = ["checker.py", *names]
try:
    exec(compile(given["checker"], "checker.py", "exec"), {{"__name__": "__main__"}})
except (SystemExit, AssertionError):
    raise
except BaseException:
    traceback.print_exc()
    sys.exit({RAISED})
"""


def same_output(expected: str, output: str, tolerance: float = 0.0) -> bool:
    """Whether two outputs are the same, apart from white space at the ends of lines and blank lines at the end.

    Args:
        expected: what should be printed.
        output: what was printed.
        tolerance: by which numbers may differ, absolute or relative to the expected one, whichever allows more. All
            else must be equal then too, but white space between words does not matter.
    """
    ours, theirs = _lines(expected), _lines(output)
    if ours == theirs or not tolerance:
        return ours == theirs
    words = [[line.split() for line in lines] for lines in (ours, theirs)]
    if [len(line) for line in words[0]] != [len(line) for line in words[1]]:
        return False
    return all(
        _near(right, word, tolerance)
        for rights, found in zip(*words, strict=True)
        for right, word in zip(rights, found, strict=True)
    )


def cannot_compile(checker: str) -> str | None:
    """Why a checker is no Python program; None if it is one."""
    try:
        compile(checker, "checker.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def run_checker(sandbox: Sandbox, checker: str, given: str, expected: str, output: str, seconds: float) -> Verdict:
    """What a checker says of an output: correct, wrong, out of time, or a crash of its own.

    Args:
        sandbox: in which it runs.
        checker: its source.
        given: input of the case.
        expected: output of the case.
        output: what the tested code printed.
        seconds: of wall clock that it may take.

    Raises:
        SandboxError: the sandbox could not be set up.
    """
    deadline = time.monotonic() + seconds
    finished = _run(sandbox, checker, given, expected, output, seconds)
    if finished.end is End.TIME:
        return _out_of_time(seconds)
    if not _failed(finished):
        accepted = _accepts(finished)
        return Verdict(Status.CORRECT, 1.0) if accepted else Verdict(Status.WRONG, 0.0, "the checker rejects it")
    again = _run(sandbox, checker, given, expected, expected, max(0.0, deadline - time.monotonic()))
    if again.end is End.TIME:
        return _out_of_time(seconds)
    if _failed(again) or not _accepts(again):
        return Verdict(Status.CRASH, None, f"the checker fails, on the expected output too: {_why(again)}")
    return Verdict(Status.WRONG, 0.0, f"the output makes the checker fail: {_why(finished)}")


def _run(sandbox: Sandbox, checker: str, given: str, expected: str, output: str, seconds: float) -> Finished:
    told = json.dumps({"checker": checker, "input": given, "expected": expected, "output": output})
    return sandbox.run_program(_START, told.encode(), seconds)


def _failed(finished: Finished) -> bool:
    """Whether it said nothing: it broke a limit, raised something, or was killed by a signal."""
    status = finished.status
    return finished.end is not End.EXITED or status is None or status == RAISED or status < 0 or 128 < status < 160


def _accepts(finished: Finished) -> bool:
    score = _number(finished.output.decode(errors="replace").strip().rpartition("\n")[2])
    return finished.status == 0 and (score is None or score >= 1.0)


def _why(finished: Finished) -> str:
    return finished.errors[-MAX_TRACEBACK:] if finished.end is End.EXITED else finished.end.value


def _out_of_time(seconds: float) -> Verdict:
    return Verdict(Status.TIMEOUT, None, f"the checker was not done after {seconds:.3g} s")


def _near(right: str, word: str, tolerance: float) -> bool:
    if right == word:
        return True
    numbers = _number(right), _number(word)
    if None in numbers:
        return False
    return abs(numbers[0] - numbers[1]) <= tolerance * max(1.0, abs(numbers[0]))


def _number(word: str) -> float | None:
    """A finite number; Python's own extras (underscores, nan, inf) are words."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in word else None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
