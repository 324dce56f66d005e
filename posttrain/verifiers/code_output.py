"""Whether the output of a program is right: equal, equal within a tolerance, or accepted by a checker program.

A checker is a Python program, started as `checker INPUT EXPECTED OUTPUT` with the names of three files, as those
of programming contests are. It accepts by ending with status 0; what it prints last may be a score instead, of which 1
and more accepts. It runs in a sandbox of its own, with the limits of the tested code.
"""

from __future__ import annotations

import json
import math

from posttrain.verifiers.bubblewrap import SandboxError
from posttrain.verifiers.sandbox import End, Sandbox

_START = """
import json, os, sys, tempfile
given = json.load(sys.stdin)
folder = tempfile.mkdtemp()
names = []
for name in ("input", "expected", "output"):
    names.append(os.path.join(folder, name + ".txt"))
    with open(names[-1], "w", encoding="utf-8") as file:
        file.write(given[name])
sys.argv = ["checker.py", *names]
exec(compile(given["checker"], "checker.py", "exec"), {"__name__": "__main__"})
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


def run_checker(sandbox: Sandbox, checker: str, given: str, expected: str, output: str, seconds: float) -> bool:
    """Whether a checker accepts an output.

    Args:
        sandbox: in which it runs.
        checker: its source.
        given: input of the case.
        expected: output of the case.
        output: what the tested code printed.
        seconds: of wall clock that it may take.

    Raises:
        SandboxError: it broke a limit, so that nothing is known.
    """
    told = json.dumps({"checker": checker, "input": given, "expected": expected, "output": output})
    finished = sandbox.run_program(_START, told.encode(), seconds)
    if finished.end is not End.EXITED:
        raise SandboxError(f"the checker ended by {finished.end}: {finished.errors[-200:]}")
    if finished.status != 0:
        return False
    score = _number(finished.output.decode(errors="replace").strip().rpartition("\n")[2])
    return score is None or score >= 1.0


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
