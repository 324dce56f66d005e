"""Completions that are written to make a verifier fail: what cannot be judged escapes its penalty."""

from __future__ import annotations

import shutil
import time

import pytest

from posttrain.data.sample import Problem
from posttrain.verifiers.choice import ChoiceVerifier
from posttrain.verifiers.code import CodeVerifier
from posttrain.verifiers.exact import ExactVerifier
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.numeric import NumericVerifier
from posttrain.verifiers.verdict import Status, Verdict
from posttrain.verifiers.worker import run_verifier

HOSTILE = [
    "9" * 5000,
    "0." + "9" * 5000,
    "1e999999999",
    "1/0",
    "1e-999999999",
    "9" * 300 + "/" + "9" * 300,
    "1," * 3000,
]
HOSTILE += [
    "\ud800",
    "\x00",
    "\u0967",
    "\u00b2",
    "\u2164",
    "\u00bd" * 3,
    "1_000",
    "0x10",
    "inf",
    "nan",
    "-inf",
    "\u221e",
]
HOSTILE += ["(" * 3000, "{" * 3000, r"\boxed{" * 2000, r"\frac" * 500, "\\" * 3000, "<answer>" * 1000, "#### " * 1500]
HOSTILE += ["answer is " * 800, "\n" * 8000, "</think>" * 800, "1 " * 3000, "$" * 3000, "1" + "0" * 900]
HOSTILE += [
    r"\sqrt[0]{5}",
    r"\log_{1}5",
    "0^0",
    "0^{-1}",
    r"\frac{1}{0.0}",
    "10^{10^{10^{10}}}",
    "99999!!",
    r"\binom{5}{-1}",
]
HOSTILE += [r"\sum_{k=1}^{\infty}\frac{1}{k}", r"\lim_{x\to0}\frac{1}{x}", r"\tan\frac{\pi}{2}", r"\ln 0", r"5 \pmod 0"]
HOSTILE += [
    r"x \equiv 5 \pmod{0}",
    r"0.\dot{}",
    "0.()",
    "]5[",
    r"{}_{5}C_{99999}",
    r"\nicefrac{}{}",
    "5_{1}",
    "Z_{36}",
    "5_{0}",
]
HOSTILE += [
    r"\{1,\ldots",
    r"5\text{ km/}",
    r"5\text{ /s}",
    r"5 m^{9}",
    r"\langle",
    "a:b:c:d",
    r"\overline{" * 19 + "1" + "}" * 19,
]
GOLDS = ("5", "(1,2)", r"3 \pmod 5")

NO_REPORT = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, {0!r})
    except OSError:
        pass
os._exit(0)
"""


def verifiers() -> list:
    found = [NumericVerifier(NumericVerifier.Config(type="numeric"))]
    found += [ExactVerifier(ExactVerifier.Config(type="exact"))]
    found += [ChoiceVerifier(ChoiceVerifier.Config(type="choice"))]
    for profile in ("strict", "lenient"):
        found.append(MathVerifier(MathVerifier.Config(type="math", profile=profile)))
    return found


@pytest.mark.parametrize("gold", GOLDS)
def test_no_completion_ends_without_a_verdict(gold: str) -> None:
    """A decimal of 5,000 digits once raised an error in the mathematical one, which is a crash and no penalty."""
    for verifier in verifiers():
        for text in HOSTILE:
            for completion in (rf"\boxed{{{text}}}", f"The answer is {text}"):
                started = time.process_time()
                verdict = verifier(Problem("p", "", gold), completion)
                assert verdict.status.known or verdict.status.value == "bad_reference", (verifier.name, completion[:60])
                assert time.process_time() - started < 10, (verifier.name, completion[:60])


def code_verdict(test: str, code: str) -> Verdict:
    problem = Problem("p", "", meta={"test": test, "entry_point": "f"})
    return run_verifier(CodeVerifier(CodeVerifier.Config()), problem, code)


@pytest.mark.parametrize("test", ["assert f(1) == 2, f(1)", "assert {1: 2}[f(1)] == 2"])
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")
def test_a_value_of_which_no_message_can_be_made_is_wrong(test: str) -> None:
    """Python makes no text of 5,000 digits: the tests ended without a report, and the completion without a penalty."""
    assert code_verdict(test, "def f(x):\n    return 10 ** 5000").status is Status.WRONG


@pytest.mark.parametrize("frame", [b"x", b"[" * 100_000, b'{"status": "perfect", "detail": 1}', b"7"])
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")
def test_tests_of_somebodys_data_that_report_nothing(frame: bytes) -> None:
    found = code_verdict(NO_REPORT.format(b"xxxx" + frame), "def f(x): return 2")
    assert found.status is Status.CRASH and "the tests ended with status 0" in found.detail
