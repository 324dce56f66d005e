"""Mathematical equality, judged by math-verify's grammar and comparison."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.verifier import VerifierConfig
from posttrain.data.encoding import unmarked
from posttrain.data.sample import Problem
from posttrain.errors import StackError
from posttrain.verifiers import references
from posttrain.verifiers.math_answer import MAX_ANSWER, TAIL, Stated, final_answer, last_time, said_last
from posttrain.verifiers.math_behind import changed_by_words, scaled_behind
from posttrain.verifiers.math_dimensions import in_radians, says_degrees, summed
from posttrain.verifiers.math_equal import Value, equal, read, same, spelling
from posttrain.verifiers.math_notation import as_latex, same_again, undressed
from posttrain.verifiers.math_parse import parse, readable, search
from posttrain.verifiers.math_prompt import restated
from posttrain.verifiers.math_units import plain_number, without_symbol
from posttrain.verifiers.verdict import Status, Verdict

_FORMS = {"hashes": "#### %s", "tags": "<answer>%s</answer>"}


class MathVerifier:
    r"""Correct if the final answer is mathematically equal to the reference.

    Strict, for rewards: the completion must state one final answer, in a box, in `<answer>` tags, behind `####` or by
    `answer is ...` (see `math_answer.final_answer`); `answer_format` names the only form that counts. Lenient, for
    evaluation: in any form; where none is stated, also what math-verify finds in the text; where it is stated in a
    sentence, what that says in the end; and a box counts whatever follows it.

    The reference may be the bare answer, or a whole solution that ends in one of these ways. Equality is exact where it
    can be decided (`math_exact`), else math-verify's: six decimals for what is written as a decimal, `18%` equals 18
    and 0.18, `x=5` equals 5, `(1,2)` is an interval and a pair. Beyond that, numbers below 0.01 must agree within 0.2%,
    two numbers side by side are not a product, an equation that is not solved is no answer, and an expression is read
    as a whole or not at all. Plain numbers are compared as fractions, without math-verify. Its time limits, which need
    signals and so the main thread, are off; work is bounded by `math_parse`, and the pool stops what takes too long.

    Raises:
        StackError: math-verify is not installed.
    """

    name = "math"
    outcome = True

    class Config(VerifierConfig):
        """Mathematical equality by math-verify."""

        type: Literal["math"] = "math"
        needs_reference: ClassVar[bool] = True
        names_answers: ClassVar[bool] = True
        profile: Literal["strict", "lenient"] = Field(
            "strict", description="strict for rewards, lenient for evaluation"
        )
        answer_format: Literal["boxed", "hashes", "tags", "any"] = Field(
            "any",
            description=r"the one form that earns the strict reward: \boxed{}, behind ####, in <answer> tags",
        )

        @model_validator(mode="after")
        def _one_form_in_strict(self) -> MathVerifier.Config:
            if self.profile == "lenient" and self.answer_format != "any":
                raise ValueError(
                    f"answer_format {self.answer_format} has no effect with profile lenient, which takes any"
                )
            return self

        def gold(self, problem: Problem) -> str | None:
            reference = problem.reference or ""
            if final_answer(reference, self.answer_format) is not None:
                return reference
            stated = final_answer(reference)
            return self.in_form(reference if stated is None else stated.answer)

        def excludes(self, one: Problem, other: Problem) -> bool:
            return references.differ(one, other)

        def spoilt(self, problem: Problem, completion: str) -> list[tuple[str, str]]:
            number = references.number(problem)
            if number is None:
                return []
            bare = references.digits(problem)
            right, wrong = self.in_form(bare), self.in_form(f"{bare}1")
            spoilt = [("another number", wrong), ("two answers", f"{right} or {wrong}")]
            return spoilt + ([("other sign", self.in_form(f"-({bare})"))] if number else [])

        def in_form(self, answer: str) -> str:
            """An answer in the form that earns the reward; a box where any does."""
            return _FORMS.get(self.answer_format, r"\boxed{%s}") % answer

    def __init__(self, config: MathVerifier.Config) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise StackError("math_verify is not installed", hint="pip install 'math-verify[antlr4_13_2]'")
        self.profile = config.profile
        self.answer_format = config.answer_format

    def prepare(self) -> None:
        """Import sympy and build the grammar, which takes seconds, before a clock runs."""
        parse("x+1")

    def reads_plainly(self, reference: str) -> bool:
        """Whether it is a plain number, which is compared without sympy and the grammar."""
        return plain_number(reference.strip()) is not None

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        gold = _reference(problem.reference or "")
        if gold is None:
            return Verdict(Status.BAD_REFERENCE, None, f"cannot be parsed: {str(problem.reference)[-60:]!r}")
        lenient = self.profile == "lenient"
        said = completion.rstrip().removesuffix("</think>") if lenient else completion
        stated = final_answer(said, self.answer_format)
        if stated is not None and stated.answer and lenient and not stated.denied:
            stated = replace(stated, problem="", after="")
        prompt = unmarked(problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"])
        verdict = Verdict(Status.NO_ANSWER, 0.0) if stated is None else _judge(gold, stated, prompt, not lenient)
        if (
            stated is not None
            and "rad" in stated.answer
            and in_radians(stated.answer)
            and says_degrees(f"{prompt} {problem.reference}")
        ):
            return Verdict(Status.WRONG, 0.0, f"{stated.answer[:80]}, where degrees were asked for")
        certain = stated is not None and (stated.marked or stated.denied)
        if not lenient or verdict.status is Status.CORRECT or certain:
            return verdict
        return _judge_text(gold, stated, completion, prompt, verdict)


def _judge(gold: Value, stated: Stated, prompt: str, strict: bool) -> Verdict:
    if stated.problem:
        status = Status.WRONG if stated.answer else Status.UNPARSEABLE
        return Verdict(status, 0.0, stated.problem)
    if len(stated.answer) > MAX_ANSWER:
        return Verdict(Status.UNPARSEABLE, 0.0, f"an answer of {len(stated.answer)} characters")
    again = None
    if not stated.answer.isdecimal():  # most answers
        amount = summed(stated.answer)
        stated = stated if amount is None else replace(stated, answer=amount)
        again = same_again(stated.answer)
    if again is not None and gold.is_number:
        both = [_judge(gold, replace(stated, answer=each), prompt, strict) for each in again]
        if all(verdict.status is Status.CORRECT for verdict in both):
            return both[0]
    answer = read(stated.answer)
    if answer is None and gold.number is not None:
        amount = without_symbol(as_latex(stated.answer))
        answer = None if amount is None else read(amount)
    if answer is None:
        return Verdict(Status.UNPARSEABLE, 0.0, stated.answer[:100])
    correct = equal(gold, answer, prompt)
    counts = correct and not answer.plain and gold.is_number
    if counts and changed_by_words(stated.answer, gold.text, prompt, strict):
        return Verdict(Status.WRONG, 0.0, f"{stated.answer[:80]}: more than a unit stands behind the number")
    if correct and not answer.plain and gold.words is None and restated(stated.answer, gold.text, prompt, strict):
        return Verdict(Status.WRONG, 0.0, f"{stated.answer[:80]} stands in the prompt, with its work undone")
    if correct and stated.after and gold.is_number and not equal(gold, read(stated.after), prompt):
        return Verdict(Status.WRONG, 0.0, f"{stated.answer[:80]}, and behind it {stated.after}")
    return Verdict(Status.CORRECT if correct else Status.WRONG, float(correct), stated.answer[:100], spelling(answer))


def _judge_text(gold: Value, stated: Stated | None, completion: str, prompt: str, verdict: Verdict) -> Verdict:
    """What a text says that states its answer in a sentence, or not at all; else the verdict so far."""
    text = completion[-TAIL:] if stated is None else stated.answer
    named = last_time(text) if gold.words is not None else None
    said = [named] if named is not None else [] if stated is None else said_last(text)
    for each in said:
        if gold.is_number and scaled_behind(each, text):
            continue
        found = _judge(gold, Stated(each, marked=False), prompt, strict=False)
        if found.status is Status.CORRECT or (named is not None and stated is None):
            return found
    # A wrong answer that could be read stays wrong: another value of its sentence would be picked out for being right.
    if stated is not None and verdict.status is not Status.UNPARSEABLE:
        return verdict
    values = search(text) if stated is None or readable(undressed(text)) else []
    if not values:
        return verdict
    correct = same(gold.expression, values)
    text = str(values[-1])
    return Verdict(Status.CORRECT if correct else Status.WRONG, float(correct), text[:100], text)


@lru_cache(maxsize=4096)
def _reference(reference: str) -> Value | None:
    stated = final_answer(reference) or Stated(reference.strip())
    return read(summed(stated.answer) or stated.answer) if len(stated.answer) <= MAX_ANSWER else None
