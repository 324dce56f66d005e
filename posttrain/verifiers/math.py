"""Mathematical equality, judged by math-verify."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Any

from posttrain.config.schema import MathVerifierConfig
from posttrain.data.sample import Problem
from posttrain.errors import StackError
from posttrain.verifiers.math_answer import MAX_ANSWER, TAIL, Stated, as_latex, final_answer
from posttrain.verifiers.verdict import Status, Verdict

MAX_DEPTH = 20
"""Brackets within brackets; the parser takes seconds for some hundred of them."""


class MathVerifier:
    r"""Correct if the final answer is mathematically equal to the reference.

    Strict, for rewards: the completion must state one final answer, by `\boxed{...}`, `#### ...` or `answer is ...`
    (see `math_answer.final_answer`). Lenient, for evaluation: also anything that math-verify finds in the text.

    The reference may be the bare answer, or a whole solution that ends in one of these ways. Equality is math-verify's:
    six decimals, `18%` equals 18 and 0.18, `x=5` equals 5, `(1,2)` is an interval. Its own time limits, which need
    signals and so the main thread, are off; the pool stops what takes too long, such as `10^{10^{10}}`.

    Raises:
        StackError: math-verify is not installed.
    """

    name = "math"
    outcome = True

    def __init__(self, config: MathVerifierConfig) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise StackError("math_verify is not installed", hint="pip install 'math-verify[antlr4_13_2]'")
        self.profile = config.profile

    def prepare(self) -> None:
        """Import sympy and build the grammar, which takes seconds, before a clock runs."""
        _parse("1")

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        gold = _reference(problem.reference or "")
        if not gold:
            return Verdict(Status.BAD_REFERENCE, None, f"cannot be parsed: {str(problem.reference)[-60:]!r}")
        stated = final_answer(completion)
        verdict = Verdict(Status.NO_ANSWER, 0.0) if stated is None else _judge(gold, stated)
        if self.profile == "strict" or verdict.status is Status.CORRECT:
            return verdict
        found = _search(completion[-TAIL:])
        if not found:
            return verdict
        correct = _equal(gold, found)
        return Verdict(Status.CORRECT if correct else Status.WRONG, float(correct), str(found[-1])[:100])


def _judge(gold: list[Any], stated: Stated) -> Verdict:
    if stated.problem:
        status = Status.WRONG if stated.answer else Status.UNPARSEABLE
        return Verdict(status, 0.0, stated.problem)
    if len(stated.answer) > MAX_ANSWER:
        return Verdict(Status.UNPARSEABLE, 0.0, f"an answer of {len(stated.answer)} characters")
    answer = _parse(as_latex(stated.answer))
    if not answer:
        return Verdict(Status.UNPARSEABLE, 0.0, stated.answer[:100])
    correct = _equal(gold, answer)
    return Verdict(Status.CORRECT if correct else Status.WRONG, float(correct), stated.answer[:100])


@lru_cache(maxsize=2048)
def _reference(reference: str) -> list[Any]:
    stated = final_answer(reference) or Stated(reference.strip())
    return _parse(as_latex(stated.answer)) if len(stated.answer) <= MAX_ANSWER else []


def _parse(latex: str) -> list[Any]:
    """The expression as a list of one, or an empty list if math-verify cannot read it."""
    math_verify = _math_verify()
    if not latex or r"\boxed" in latex or not _readable(latex):
        return []
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    return math_verify.parse(
        rf"\boxed{{{latex}}}", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None
    )


def _search(text: str) -> list[Any]:
    return _math_verify().parse(text, parsing_timeout=None)


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    return _math_verify().verify(gold, answer, timeout_seconds=None)


def _readable(latex: str) -> bool:
    """Whether braces are balanced, so that the text cannot leave the box it is put in, and brackets not too deep."""
    braces = brackets = 0
    for character in latex.replace(r"\{", "(").replace(r"\}", ")"):
        braces += (character == "{") - (character == "}")
        brackets += (character in "([") - (character in ")]")
        if braces < 0 or braces + brackets > MAX_DEPTH:
            return False
    return braces == 0


def _math_verify() -> Any:
    import math_verify

    # It warns once per process that its time limits are off, which they are meant to be.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
