"""Which code is tested, with which tests, and the real problems of HumanEval."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import DataError, StackError
from posttrain.verifiers import sandbox_runner
from posttrain.verifiers.audit import check_references
from posttrain.verifiers.code import CodeVerifier, extract_function, extract_program
from posttrain.verifiers.code_output import same_output
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.pool import VerifierPool
from posttrain.verifiers.sandbox import End, Limits, Sandbox

PROMPT = 'import math\n\ndef f(x):\n    """One more."""\n'
BODY = "    return x + 1\n"
WHOLE = "def f(x):\n    return x + 1\n"

# completion, code that is run (after the prompt)
EXTRACTED = [
    (BODY, PROMPT + BODY),
    ("return x + 1\n", PROMPT + BODY),  # first indentation lost with the prompt's last token
    (WHOLE, PROMPT + "\n" + WHOLE),
    (f"Sure:\n```python\n{WHOLE}```\nDone.", PROMPT + "\n" + WHOLE),
    (f"```py\n{WHOLE}```", PROMPT + "\n" + WHOLE),
    (f"```\n{WHOLE}", PROMPT + "\n" + WHOLE),  # cut off after the code
    (f"```python\n{WHOLE[:-1]}```", PROMPT + "\n" + WHOLE[:-1]),
    (f"```python\n{BODY}```", PROMPT + BODY),
    ("```python\nreturn x + 1\n```", PROMPT + BODY),
    (f"```bash\nls\n```\nthen\n```python\n{WHOLE}```", PROMPT + "\n" + WHOLE),
    (
        f"```python\n{WHOLE}```\nUse it:\n```python\nprint(f(1))\n```",
        PROMPT + "\n" + WHOLE,
    ),  # the block that defines it
    (f"```python\ndef f(x):\n    return x\n```\nBetter:\n```python\n{WHOLE}```", PROMPT + "\n" + WHOLE),  # the last
    (f"    ```python\n    def f(x):\n        return x + 1\n    ```", PROMPT + "\n" + WHOLE),  # noqa: F541
    (BODY + "\nprint(f(1))\n", PROMPT + BODY + "\n"),  # runs on
    (BODY + "\ndef g():\n    pass\n\n# Tests\nassert f(1) == 2", PROMPT + BODY + "\ndef g():\n    pass\n\n"),
    (BODY + "\nif __name__ == '__main__':\n    f(1)", PROMPT + BODY + "\n"),
    ("f = lambda x: x + 1\n", PROMPT + "\nf = lambda x: x + 1\n"),
    ("", None),
    ("```python\n```", None),
    (" \n\t", None),
]


@pytest.mark.parametrize(("completion", "code"), EXTRACTED)
def test_the_code_of_a_completion(completion: str, code: str | None) -> None:
    assert extract_function(completion, "f", PROMPT) == code


def test_the_program_of_a_completion() -> None:
    assert extract_program("a = 1") == "a = 1"
    assert extract_program("```python\na\n```\n```python\nb\n```") == "b\n"
    assert extract_program("\n") is None


VALUES = [
    None, True, 0, -1, 2**63, -(2**200), 0.1, float("inf"), -0.0, "", "\u202e\ud800\x00", b"\x00\xff", bytearray(b"a"),
    [], [1, [2]], (), (1, (2,)), {1, 2}, frozenset({(1, 2)}), {}, {(1, 2): [3], "t": None, None: {"v": 1}}, 1 + 2j,
    range(1, 9, 2), [True, 1, 1.0],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_data_keeps_its_value_and_type(value) -> None:
    found = sandbox_runner.decode(json.loads(json.dumps(sandbox_runner.encode(value))))
    assert repr(found) == repr(value) and type(found) is type(value)


def test_other_values() -> None:
    from collections import Counter, OrderedDict, namedtuple

    pair = namedtuple("pair", "a b")
    assert sandbox_runner.decode(sandbox_runner.encode(pair(1, 2))) == (1, 2)
    assert sandbox_runner.decode(sandbox_runner.encode(OrderedDict(b=1, a=Counter("aab")))) == {
        "b": 1,
        "a": {"a": 2, "b": 1},
    }
    assert list(sandbox_runner.decode(sandbox_runner.encode(iter([1, 2])))) == [1, 2]
    for value in (len, object(), type):
        with pytest.raises(sandbox_runner.Unsendable):
            sandbox_runner.encode(value)


@pytest.mark.parametrize(
    "data", [{}, {"t": "int"}, {"t": "int", "v": 5}, {"t": "set", "v": [[1]]}, {"t": "x", "v": []}]
)
def test_data_that_encode_did_not_make(data) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        sandbox_runner.decode(data)


# ------------------------------------------------------------------------------------------------------------ running


@pytest.fixture(scope="module", params=["bubblewrap", "rlimit"])
def isolation(request) -> str:
    if request.param == "bubblewrap":
        request.getfixturevalue("bubblewrap")
    return request.param


@pytest.fixture(scope="module")
def functions(isolation: str) -> CodeVerifier:
    return CodeVerifier(CodeVerifier.Config(type="code", isolation=isolation, timeout=20))


@pytest.fixture(scope="module")
def stdio(isolation: str) -> CodeVerifier:
    return CodeVerifier(CodeVerifier.Config(type="code", tests="stdio", isolation=isolation, timeout=20))


def problem(test, prompt=PROMPT, **meta) -> Problem:
    return Problem("p", prompt, None, {"test": test, "entry_point": "f"} | meta)


CHECK = "def check(candidate):\n    assert candidate(2) == 3\n"

FUNCTIONS = [
    (CHECK, BODY, "correct"),
    (CHECK, "    return x\n", "wrong"),
    (CHECK, "    pass\n", "wrong"),
    (CHECK, "", "no_answer"),
    (CHECK, "    return (x\n", "unparseable"),
    (CHECK, "Here is what I think.", "unparseable"),
    (CHECK, "    raise ValueError('no')\n", "wrong"),
    (CHECK, "    return math.floor(x) + 1\n", "correct"),  # the prompt's import
    (CHECK, "```python\ndef g(x):\n    return 3\n```", "wrong"),  # another function
    ("assert f(2) == 3\nassert f(0) == 1", BODY, "correct"),  # MBPP
    (["assert f(2) == 3", "assert f(0) == 2"], BODY, "wrong"),
    ("def check(candidate):\n    assert candidate(", BODY, "bad_reference"),
    ("", BODY, "bad_reference"),
    ("def check(c):\n    assert c(lambda: 1)", BODY, "bad_reference"),  # a function cannot be sent
    ("a = [2, 1]\nf(a)\nassert a == [1, 2]", "    x.sort()\n", "correct"),  # changes its argument
    ("a = {}\nf(a)\nassert a == {1: 2}", "    x[1] = 2\n", "correct"),
    ("try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert 'no' in str(e)",
     "    raise ValueError('no')\n", "correct"),
    ("try:\n    f(1)\nexcept Exception:\n    pass", "    import os; os._exit(0)\n", "wrong"),  # the test swallows all
    ("assert f(1) == 2\nassert f(x=1) == 2", BODY, "correct"),  # by name
    ("assert abs(f(1) - 2) < 1e-9", "    import numpy\n    return numpy.float64(x + 1)\n", "correct"),
    ("assert f(3) == [0, 1, 2]", "    import numpy\n    return numpy.arange(x)\n", "correct"),
    ("assert list(f(3)) == [0, 1, 2]", "    yield from range(x)\n", "correct"),
    ("assert f(1) == (1, 2)", "    return [1, 2]\n", "wrong"),  # types are kept apart
    ("assert f(1) is None", "    pass\n", "correct"),
    ("assert f(2) == 3", "```python\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n"
     "@dataclass\nclass P:\n    a: int\ndef f(x):\n    return P(x).a + 1\n```", "correct"),
    ("import sys\nassert f(2) == 3\nsys.exit(0)", BODY, "wrong"),  # tests that do not come to their end
]  # fmt: skip


@pytest.mark.parametrize(("test", "completion", "status"), FUNCTIONS)
def test_unit_tests(functions: CodeVerifier, test, completion: str, status: str) -> None:
    context = {"prompt": ""} if "__future__" in completion else {}
    verdict = functions(problem(test, **context), completion)
    assert verdict.status == status, verdict


def test_the_entry_point_is_found_in_the_tests(functions: CodeVerifier) -> None:
    found = Problem("p", "Add one.", "assert sorted([f(1)]) == [2]", {"prompt": ""})
    assert functions(found, WHOLE).status == "correct"
    assert functions(Problem("p", "", "x = 1", {}), WHOLE).detail == "no entry point"


def test_a_prompt_may_end_in_the_head_of_the_function(functions: CodeVerifier) -> None:
    assert functions(problem(CHECK, "def f(x):\n"), BODY).status == "correct"
    assert functions(problem(CHECK, "Write a function f that adds one."), WHOLE).status == "bad_reference"


ECHO = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]
STDIO = [
    (ECHO, "print(sum(map(int, input().split())))", "correct"),
    (ECHO, "```python\nimport sys\nprint(sum(map(int, sys.stdin.read().split())), end='')\n```", "correct"),
    (ECHO, "print(3)", "wrong"),
    (ECHO, "print(3)\nprint(10)", "wrong"),  # everything at once
    (ECHO, "print(sum(map(int, input().split())))\nraise SystemExit(1)", "wrong"),
    (ECHO, "print(sum(", "unparseable"),
    (ECHO, "", "no_answer"),
    (ECHO, "if __name__ == '__main__':\n    print(sum(map(int, input().split())))", "correct"),
    (json.dumps(ECHO), "print(sum(map(int, input().split())))", "correct"),
    ({"inputs": ["2"], "outputs": ["4"]}, "print(2 * int(input()))", "correct"),
    ({"inputs": ["2"], "outputs": []}, "print(1)", "bad_reference"),
    ([], "print(1)", "bad_reference"),
    (None, "print(1)", "bad_reference"),
    ("not json", "print(1)", "bad_reference"),
    ([{"input": "", "output": "a  b\nc\n\n"}], "print('a  b  ')\nprint('c')", "correct"),  # white space at line ends
    ([{"input": "", "output": "a b"}], "print('a  b')", "wrong"),
    ([{"input": "x" * 300_000, "output": "300000"}], "print(len(input()))", "correct"),
    ([{"input": "x" * 300_000, "output": "0"}], "print(0)", "correct"),  # input that nobody reads
    ([{"input": "", "output": "\u00e9"}], "print('\u00e9')", "correct"),
]  # fmt: skip


@pytest.mark.parametrize(("cases", "completion", "status"), STDIO)
def test_input_and_output(stdio: CodeVerifier, cases, completion: str, status: str) -> None:
    verdict = stdio(Problem("p", "", None, {"tests": cases}), completion)
    assert verdict.status == status, verdict


def test_limits_of_a_program(isolation: str) -> None:
    sandbox = Sandbox(Limits(seconds=60.0, memory_mb=256, output_kb=64), isolation)  # a busy machine starts slowly
    hurried = Sandbox(Limits(seconds=1.0, memory_mb=256, output_kb=64), isolation)
    flood = sandbox.run_program("while True: print('x' * 1000)", b"")
    assert flood.end is End.OUTPUT and len(flood.output) == 64 * 1024
    assert hurried.run_program("import time\ntime.sleep(99)", b"").end is End.TIME
    assert hurried.run_program("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(99)", b"").end is End.TIME
    assert "MemoryError" in sandbox.run_program("x = 'x' * (1 << 30)", b"").errors
    errors = sandbox.run_program("import sys\nsys.stderr.write('y' * 10**6 + 'end')\nsys.exit(3)", b"")
    assert (errors.end, errors.status) == (End.EXITED, 3) and errors.errors.endswith("end")
    assert len(errors.errors) <= 4096


def test_rlimit_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sandbox = Sandbox(Limits(seconds=20), "rlimit")
    found = sandbox.run_program("import os\nopen('x', 'w').write('y')\nprint(os.environ['HOME'] == os.getcwd())", b"")
    assert found.output == b"True\n" and not list(tmp_path.iterdir())


def test_without_bubblewrap_it_refuses_and_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(StackError) as caught:
        CodeVerifier(CodeVerifier.Config(type="code"))
    assert "bwrap" in caught.value.what and "bubblewrap" in caught.value.hint and "rlimit" in caught.value.hint


def test_where_namespaces_are_forbidden_it_says_what_bubblewrap_said(tmp_path: Path, monkeypatch) -> None:
    from posttrain.verifiers import bubblewrap

    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    bubblewrap.command.cache_clear()
    try:
        with pytest.raises(StackError, match="No permissions to create new namespace"):
            CodeVerifier(CodeVerifier.Config(type="code"))
    finally:
        bubblewrap.command.cache_clear()


# ---------------------------------------------------------------------------------------------------------- HumanEval


def check_humaneval(folder: Path, step: int) -> None:
    with gzip.open(folder / "humaneval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::step]
    keys = ("test", "entry_point")
    problems = [Problem(row["task_id"], row["prompt"], None, {key: row[key] for key in keys}) for row in rows]
    verifier = CodeVerifier(CodeVerifier.Config(type="code", timeout=20))
    pool = VerifierPool([verifier], VerifierPoolConfig(workers=2, timeout=60))
    gold = pool.verify(problems, [row["canonical_solution"] for row in rows])
    chat = pool.verify(problems, [f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}```" for row in rows])
    empty = pool.verify(problems, ["    pass\n"] * len(rows))
    pool.close()
    assert [p.id for p, (v,) in zip(problems, gold, strict=True) if v.status != "correct"] == []
    assert [p.id for p, (v,) in zip(problems, chat, strict=True) if v.status != "correct"] == []
    assert [p.id for p, (v,) in zip(problems, empty, strict=True) if v.status != "wrong"] == []


@pytest.mark.usefixtures("bubblewrap")
def test_humaneval_on_a_sample(test_data: Path) -> None:
    check_humaneval(test_data, step=8)


@pytest.mark.slow
@pytest.mark.usefixtures("bubblewrap")
def test_humaneval_in_full(test_data: Path) -> None:
    check_humaneval(test_data, step=1)


CHECKER = """
import sys
given, expected, output = (open(name).read() for name in sys.argv[1:])
numbers = output.split()
# Any two numbers with the right sum.
sys.exit(0 if len(numbers) == 2 and sum(map(int, numbers)) == int(given) else 1)
"""
SCORING = "import sys; print(1.0 if open(sys.argv[3]).read().strip() in ('a', 'b') else 0.5)"


@pytest.mark.parametrize(
    ("expected", "printed", "tolerance", "same"),
    [
        ("0.333333", "0.33333334", 1e-6, True),
        ("0.333333", "0.3334", 1e-6, False),
        ("1000000", "1000000.5", 1e-6, True),  # relative where numbers are large
        ("1 2.0\nyes", "1  2.0000001\nyes\n", 1e-6, True),
        ("yes", "no", 1e-6, False),
        ("1 2", "1\n2", 1e-6, False),
        ("1 2", "1 2 3", 1e-6, False),
        ("1", "nan", 1e-6, False),
        ("inf", "1e999", 1e-6, False),
        ("1000", "1_000", 1e-6, False),
        ("0.333333", "0.3333330", 0.0, False),
    ],
)
def test_numbers_in_outputs_within_a_tolerance(expected: str, printed: str, tolerance: float, same: bool) -> None:
    assert same_output(expected, printed, tolerance) == same


@pytest.mark.parametrize(
    ("checker", "printed", "status"),
    [
        (CHECKER, "print(3, 4)", "correct"),
        (CHECKER, "print(7, 0)", "correct"),
        (CHECKER, "print(3, 5)", "wrong"),
        (CHECKER, "print('x')", "wrong"),
        (CHECKER, "import sys; sys.exit(1)", "wrong"),  # of the tested code
        (SCORING, "print('b')", "correct"),
        (SCORING, "print('c')", "wrong"),
        (7, "print(3, 4)", "bad_reference"),
        (None, "print(3, 4)", "wrong"),  # no checker: the expected output
    ],
)
def test_a_checker_program_judges_where_many_outputs_are_right(checker, printed: str, status: str) -> None:
    config = CodeVerifier.Config(type="code", tests="stdio", isolation="rlimit", timeout=20, checker="checker")
    meta = {"tests": [{"input": "7", "output": "1 6"}], "checker": checker}
    assert CodeVerifier(config)(Problem("p", "", None, meta), f"```python\n{printed}\n```").status == status


@pytest.mark.parametrize(("rule", "status", "score"), [("unknown", "timeout", None), ("wrong", "wrong", 0.0)])
def test_an_answer_that_keeps_the_checker_busy_follows_on_timeout(rule: str, status: str, score: float | None) -> None:
    config = CodeVerifier.Config(type="code", tests="stdio", isolation="rlimit", timeout=1.5, checker="checker")
    checker = "import sys\nwhile open(sys.argv[3]).read() == 'slow': pass"
    problem = Problem("p", "", None, {"tests": [{"input": "7", "output": "1"}], "checker": checker})
    pool = VerifierPool([CodeVerifier(config)], VerifierPoolConfig(workers=0, on_timeout=rule))
    (verdict,), (other,) = pool.verify([problem] * 2, ["```python\nprint('slow', end='')\n```", "```python\n1\n```"])
    pool.close()
    assert (verdict.status, verdict.score, other.status) == (status, score, "correct") and "checker" in verdict.detail


@pytest.mark.parametrize(
    ("checker", "status", "said"),
    [
        ("import nothing_like_it", "crash", "ModuleNotFoundError"),
        ("'x' * 10**11", "crash", "MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", "crash", "the checker fails"),
        ("def", "bad_reference", "SyntaxError"),
        ("\0", "bad_reference", "null bytes"),
        ("assert False", "wrong", "rejects"),
        ("import sys; int(open(sys.argv[3]).read())", "wrong", "ValueError"),  # the answer's fault
    ],
)
def test_a_checker_that_fails_says_nothing_of_the_answer(checker: str, status: str, said: str) -> None:
    config = CodeVerifier.Config(type="code", tests="stdio", isolation="rlimit", timeout=20, checker="checker")
    meta = {"tests": [{"input": "7", "output": "1"}], "checker": checker}
    verdict = CodeVerifier(config)(Problem("p", "", None, meta), "```python\nprint('one')\n```")
    assert verdict.status == status and said in verdict.detail


def test_a_checker_that_is_no_program_is_refused_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    config = CodeVerifier.Config(type="code", tests="stdio", isolation="rlimit", timeout=20, checker="checker")
    meta = {"tests": [{"input": "7", "output": "1"}]}
    judge = build_judge([config], VerifierPoolConfig(workers=0))
    with pytest.raises(DataError, match="1 of 1 references"):
        check_references(judge, [Problem("p", "", None, meta | {"checker": "if:"})])
    for _ in range(2):
        judge.judge([Problem("p", "", None, meta | {"checker": "1 / 0"})], ["```python\nprint(1)\n```"])
    judge.close()
    assert len([row for row in caplog.messages if "ZeroDivisionError" in row]) == 1


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"tolerance": 1e-6}, "needs `tests: stdio`"),
        ({"checker": "c"}, "needs `tests: stdio`"),
        ({"tests": "stdio", "checker": "c", "tolerance": 1e-6}, "leave out `tolerance`"),
    ],
)
def test_what_compares_outputs_needs_outputs(keys: dict, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        CodeVerifier.Config(type="code", **keys)
