"""Python code, judged by running it in the sandbox."""

from __future__ import annotations

import ast
import json
import re
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.phases import phase
from posttrain.verifiers.bubblewrap import SandboxError
from posttrain.verifiers.code_output import cannot_compile, run_checker, same_output
from posttrain.verifiers.sandbox import End, Finished, Limits, Sandbox
from posttrain.verifiers.verdict import Status, Verdict

MAX_CODE = 200_000
"""Characters of code; longer answers are not run."""

_FENCE = re.compile(r"[ \t]*```+[ \t]*([\w+-]*)[^`]*")
_LANGUAGES = ("", "python", "python3", "py", "py3")
_RUN_ON = re.compile(r"^(?!def |class |async def |import |from |@|[A-Za-z_]\w* *(?::[^\n]*)?=[^=])\S", re.MULTILINE)


class CodeVerifier:
    r"""Correct if the code passes all tests. Breaking a limit is wrong, not a timeout: it is the code's own fault.

    The code is the last fenced block (of those that define the function, where one does), or the whole completion if it
    has no fence. A completion that does not define the function continues the `context`: then what follows at the left
    margin, and is no definition, import or assignment, is cut off.

    `functions`: unit tests in HumanEval's form, which define `check(candidate)`, or plain `assert` statements in a text
    or a list of texts. They run apart from the code, so arguments and results must be plain data: numbers, text, bytes,
    lists, tuples, sets, dictionaries, ranges, iterators, None; objects of the code's own classes are wrong.

    `stdio`: the program is run once for each case. Its output must equal the expected one, apart from white space at
    the ends of lines and blank lines at the end, and numbers within the tolerance. Where a problem has a checker, that
    program judges instead, in a sandbox of its own: see `code_output`.

    Raises:
        StackError: the sandbox cannot run here.
    """

    name = "code"
    outcome = True

    class Config(VerifierConfig):
        """Python code, run in a sandbox against unit tests of a function or against input and output."""

        type: Literal["code"] = "code"
        tests: Literal["functions", "stdio"] = Field(
            "functions", description="unit tests of a function, or stdin/stdout"
        )
        test: str = Field("test", description="column with the unit tests; where absent, the reference (functions)")
        entry_point: str = Field(
            "entry_point", description="column with the function's name; default: found in the tests"
        )
        context: str | None = Field(
            "prompt", description="column with code before the completion; else the prompt; null: none (functions)"
        )
        cases: str = Field("tests", description="column with cases of `input` and `output` (stdio)")
        tolerance: float = Field(
            0.0,
            ge=0.0,
            description="by which numbers in the output may differ, absolute or relative, the larger (stdio)",
        )
        checker: str | None = Field(
            None, description="column with a Python program that judges outputs, where many are right (stdio)"
        )
        isolation: Literal["bubblewrap", "rlimit"] = Field(
            "bubblewrap",
            description="rlimit only bounds resources: files, network and processes of this machine are open",
        )
        timeout: float = Field(6.0, gt=0, description="seconds of wall clock for all tests of one completion")
        memory_mb: int = Field(512, ge=64, description="MiB for the tested code, over all its processes")
        processes: int = Field(16, ge=4, description="processes and threads at once; not bounded with isolation rlimit")
        file_mb: int = Field(16, ge=1, description="MiB of the private /tmp, and of one file")
        output_kb: int = Field(1024, ge=1, description="KiB of standard output (stdio)")

        @model_validator(mode="after")
        def _of_stdio(self) -> CodeVerifier.Config:
            given = [key for key in ("tolerance", "checker") if getattr(self, key)]
            if given and self.tests != "stdio":
                raise ValueError(f"{given[0]} compares the output of programs: it needs `tests: stdio`")
            if len(given) == 2:
                raise ValueError("the checker decides alone: leave out `tolerance`")
            return self

        def idle_keys(self) -> Iterator[tuple[str, str]]:
            for key in ("cases", "output_kb") if self.tests == "functions" else ("test", "entry_point", "context"):
                yield key, f"it is not read with tests: {self.tests}"
            if self.isolation == "rlimit":
                yield "processes", "isolation rlimit does not bound processes"

        @property
        def seconds(self) -> float:
            # The checkers of all cases together may take as long as the tested code.
            return self.timeout * (1 if self.checker is None else 2)

        @property
        def unboxed(self) -> bool:
            return self.isolation == "rlimit"

        def excludes(self, one: Problem, other: Problem) -> bool:
            return one.meta != other.meta and one.prompt != other.prompt

        def spoilt(self, problem: Problem, completion: str) -> list[tuple[str, str]]:
            return [("no code", "    pass\n" if self.tests == "functions" else "pass\n")]

    def __init__(self, config: CodeVerifier.Config) -> None:
        self.config = config
        limits = Limits(config.timeout, config.memory_mb, config.processes, config.file_mb, config.output_kb)
        self.sandbox = Sandbox(limits, config.isolation)
        phase(f"code sandbox: {self.sandbox.check()}")

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        if self.config.tests == "functions":
            return self._functions(problem, completion)
        return self._stdio(problem, completion)

    def _functions(self, problem: Problem, completion: str) -> Verdict:
        test = _test_source(problem.meta.get(self.config.test, problem.reference))
        entry_point = problem.meta.get(self.config.entry_point) or _called(test)
        if not test or not isinstance(entry_point, str) or not entry_point.isidentifier():
            missing = f"no tests in column {self.config.test!r}" if not test else "no entry point"
            return Verdict(Status.BAD_REFERENCE, None, missing)
        context = self._context(problem)
        source = extract_function(completion, entry_point, context)
        if source is None or len(source) > MAX_CODE:
            return _nothing(source)
        finished, report = self.sandbox.run_tests(source, entry_point=entry_point, context=context, test=test)
        if not report:
            return _broken(finished, self.config)
        status = Status(report["status"])
        return Verdict(status, float(status is Status.CORRECT) if status.known else None, report["detail"])

    def _context(self, problem: Problem) -> str:
        if self.config.context is None:
            return ""
        default = problem.prompt if isinstance(problem.prompt, str) else ""
        return str(problem.meta.get(self.config.context, default))

    def _stdio(self, problem: Problem, completion: str) -> Verdict:
        cases = _cases(problem.meta.get(self.config.cases))
        if not cases:
            detail = f"no cases of input and output in column {self.config.cases!r}"
            return Verdict(Status.BAD_REFERENCE, None, detail)
        checker = None if self.config.checker is None else problem.meta.get(self.config.checker)
        if checker is not None:
            why = cannot_compile(checker) if isinstance(checker, str) else f"a {type(checker).__name__}"
            if why is not None:
                detail = f"no program in column {self.config.checker!r}: {why}"
                return Verdict(Status.BAD_REFERENCE, None, detail)
        source = extract_program(completion)
        if source is None or len(source) > MAX_CODE:
            return _nothing(source)
        deadline = time.monotonic() + self.config.timeout
        checked_for = 0.0
        for number, (given, expected) in enumerate(cases, 1):
            left = max(0.0, deadline - time.monotonic())
            finished = self.sandbox.run_program(source, given.encode(), left)
            if finished.end is not End.EXITED:
                return _broken(finished, self.config)
            if finished.status != 0:
                last_line = finished.errors.rpartition("\n")[2]
                syntax = last_line.startswith(("SyntaxError", "IndentationError", "TabError"))
                status = Status.UNPARSEABLE if syntax and number == 1 else Status.WRONG
                return Verdict(status, 0.0, f"case {number}: exit status {finished.status}: {last_line}")
            output = finished.output.decode(errors="replace")
            if checker is None:
                if not same_output(expected, output, self.config.tolerance):
                    return Verdict(Status.WRONG, 0.0, f"case {number} of {len(cases)}: another output")
            else:
                started = time.monotonic()
                left = max(0.0, self.config.timeout - checked_for)
                verdict = run_checker(self.sandbox, checker, given, expected, output, left)
                checked_for += time.monotonic() - started
                if verdict.status is not Status.CORRECT:
                    return replace(verdict, detail=f"case {number} of {len(cases)}: {verdict.detail}")
        return Verdict(Status.CORRECT, 1.0)


def extract_function(completion: str, entry_point: str, context: str) -> str | None:
    """Source that defines the function: the code of the completion, after or continuing the context."""
    code = _fenced(completion, entry_point)
    if code is None:
        return None
    if _defines(entry_point).search(code):
        return f"{context}\n{code}"
    if not code[0].isspace():
        # A body: indented as a whole in a block of its own, without its first indentation after a prompt.
        code = textwrap.indent(code, "    ") if _fence_blocks(completion) else f"    {code}"
    cut = _RUN_ON.search(code)
    return context + (code[: cut.start()] if cut and cut.start() else code)


def extract_program(completion: str) -> str | None:
    """The last fenced block, or all of a completion without one; None if that is blank."""
    blocks = _fence_blocks(completion)
    code = blocks[-1] if blocks else completion
    return code if code.strip() else None


def _fenced(completion: str, entry_point: str) -> str | None:
    blocks = _fence_blocks(completion)
    defining = [block for block in blocks if _defines(entry_point).search(block)]
    code = (defining or blocks or [completion])[-1]
    return code if code.strip() else None


def _fence_blocks(completion: str) -> list[str]:
    """Contents of fenced blocks of Python or of no language; the last one may be left open."""
    blocks: list[str] = []
    inside: list[str] | None = None
    language = ""
    for line in completion.splitlines(keepends=True):
        fence = _FENCE.fullmatch(line.rstrip())
        if inside is None:
            if fence is not None:
                inside, language = [], fence[1].lower()
            continue
        closed = fence is not None or line.rstrip().endswith("```")
        if closed and fence is None:
            inside.append(line.rstrip()[:-3])
        if not closed:
            inside.append(line)
        elif language in _LANGUAGES:
            blocks.append("".join(inside))
        inside = None if closed else inside
    if inside is not None and language in _LANGUAGES:
        blocks.append("".join(inside))
    return [textwrap.dedent(block) if block.lstrip().startswith(("def ", "import ")) else block for block in blocks]


def _defines(entry_point: str) -> re.Pattern[str]:
    return re.compile(
        rf"^(?:async )?(?:def|class) {re.escape(entry_point)}\b|^{re.escape(entry_point)} *=", re.MULTILINE
    )


def _test_source(tests: Any) -> str:
    if isinstance(tests, list):
        return "\n".join(map(str, tests))
    return tests if isinstance(tests, str) else ""


def _called(test: str) -> str | None:
    """The function that the first assertion calls."""
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError):
        return None
    builtin = set(__builtins__ if isinstance(__builtins__, dict) else vars(__builtins__))
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assert):
            for node in ast.walk(statement.test):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in builtin:
                    return node.func.id
    return None


def _cases(column: Any) -> list[tuple[str, str]]:
    """Pairs of input and output: a list of objects, or an object with two lists; either may be written as JSON."""
    if isinstance(column, str):
        try:
            column = json.loads(column)
        except (ValueError, RecursionError):
            return []
    if isinstance(column, dict):
        inputs, outputs = column.get("inputs") or column.get("input"), column.get("outputs") or column.get("output")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            return []
        column = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]
    if not isinstance(column, list) or not all(isinstance(case, dict) and "output" in case for case in column):
        return []
    return [(str(case.get("input") or ""), str(case["output"])) for case in column]


def _nothing(source: str | None) -> Verdict:
    if source is None:
        return Verdict(Status.NO_ANSWER, 0.0)
    return Verdict(Status.UNPARSEABLE, 0.0, f"code of {len(source)} characters")


def _broken(finished: Finished, config: CodeVerifier.Config) -> Verdict:
    """The verdict on a run without a result of its own."""
    sizes = {
        End.TIME: f"{config.timeout:g} s",
        End.MEMORY: f"{config.memory_mb} MiB",
        End.OUTPUT: f"{config.output_kb} KiB",
    }
    if finished.end in sizes:
        return Verdict(Status.WRONG, 0.0, f"{finished.end}: {sizes[finished.end]}")
    raise SandboxError(f"the tests ended with status {finished.status}: {finished.errors[-200:]}")
