"""Gold answers written as a model would write them, and answers made wrong on purpose, for each type of verifier."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from posttrain.config.schema import FileSource, GymSource, MathVerifierConfig, Source, TaskSource, VerifierConfig
from posttrain.data.sample import Message, Problem
from posttrain.data.sources import examples, problems
from posttrain.errors import RecipeError
from posttrain.verifiers.choice import letters_and_gold
from posttrain.verifiers.math_answer import final_answer
from posttrain.verifiers.math_notation import as_latex
from posttrain.verifiers.math_units import plain_number

_FORMS = {"hashes": "#### %s", "tags": "<answer>%s</answer>"}

Written = tuple[Problem, str]


def gold_answers(source: Source, config: VerifierConfig, *, offline: bool = False) -> list[Written]:
    """All problems of a source, each with a completion that states the right answer.

    Args:
        source: with a completion column, or a task that writes traces, those are the answers.
        config: of the verifier that judges the outcome; says how a reference is written as an answer.
        offline: read Hub data from the local cache only.

    Raises:
        RecipeError: nothing says what a right answer looks like.
        DataError: as `data.sources.problems`.
    """
    if isinstance(source, TaskSource) or (isinstance(source, FileSource) and source.completion is not None):
        return [(row.problem, _text(row.completion)) for row in examples(source, "data", offline=offline)]
    found = problems(source, "data", offline=offline)
    if isinstance(source, GymSource) and config.type == "reasoning_gym":
        return [(problem, f"<answer>{problem.meta['entry']['answer']}</answer>") for problem in found]
    pattern = getattr(config, "pattern", None)
    if config.type not in ("math", "numeric", "exact", "choice") or pattern is not None:
        why = f"with the pattern {pattern!r}" if pattern is not None else "from a reference"
        raise RecipeError(
            f"nothing says how a right answer to verifier {config.type} is written {why}",
            where="data.completion",
            hint="name a column with right completions: `completion: <column>`",
        )
    return [(problem, write_gold(config, problem)) for problem in found]


def write_gold(config: VerifierConfig, problem: Problem) -> str:
    """The reference as a completion. What a verifier cannot read stays as it is."""
    reference = problem.reference or ""
    if config.type == "math":
        if final_answer(reference, config.answer_format) is not None:
            return reference
        stated = final_answer(reference)
        return in_form(config, reference if stated is None else stated.answer)
    if config.type == "choice":
        _, gold = letters_and_gold(config, problem)
        return rf"\boxed{{{gold}}}" if gold else reference
    return reference


def in_form(config: MathVerifierConfig, answer: str) -> str:
    """An answer in the form that earns the reward; a box where any does."""
    return _FORMS.get(config.answer_format, r"\boxed{%s}") % answer


def wrong_answers(config: VerifierConfig, gold: Sequence[Written]) -> dict[str, list[Written]]:
    """Answers that must not be correct, by what was done to the gold answer.

    `empty`: nothing is written. `other row`: the gold answer of the next problem that has another one. Further kinds
    depend on the verifier: another number, a second answer beside the right one, another letter, a body without code.
    """
    found: dict[str, list[Written]] = {"empty": [(problem, "") for problem, _ in gold]}
    found["other row"] = [(problem, other) for problem, other in _neighbours(config, gold)]
    for problem, completion in gold:
        for kind, answer in _spoilt(config, problem, completion):
            found.setdefault(kind, []).append((problem, answer))
    return {kind: rows for kind, rows in found.items() if rows}


def _neighbours(config: VerifierConfig, gold: Sequence[Written]) -> list[Written]:
    if config.type in (
        "procedural",
        "reasoning_gym",
        "reward_model",
        "process_reward",
        "judge",
        "python",
    ):  # many answers may be right
        return []
    rows = []
    for index, (problem, _) in enumerate(gold):
        for other, completion in (*gold[index + 1 : index + 20], *gold[: max(0, index + 20 - len(gold))]):
            if _differ(config, problem, other):
                rows.append((problem, completion))
                break
    return rows


def _differ(config: VerifierConfig, one: Problem, other: Problem) -> bool:
    if config.type == "code":
        return one.meta != other.meta and one.prompt != other.prompt
    if config.type == "choice":
        return letters_and_gold(config, one)[1] != letters_and_gold(config, other)[1]
    numbers = _number(one), _number(other)
    if None not in numbers:
        return numbers[0] != numbers[1]
    return one.reference != other.reference and numbers != (None, None)


def _spoilt(config: VerifierConfig, problem: Problem, completion: str) -> list[tuple[str, str]]:
    number = _number(problem)
    if config.type == "math" and number is not None:
        bare = _answer(problem)
        right, wrong = in_form(config, bare), in_form(config, f"{bare}1")
        spoilt = [("another number", wrong), ("two answers", f"{right} or {wrong}")]
        return spoilt + ([("other sign", in_form(config, f"-({bare})"))] if number else [])
    if config.type == "numeric" and number is not None and config.tolerance == 0:
        return [("another number", f"{_answer(problem)}1")]
    if config.type == "choice":
        letters, letter = letters_and_gold(config, problem)
        if letter is None:
            return []
        other = letters[(letters.index(letter) + 1) % len(letters)]
        rows = [("another letter", rf"\boxed{{{other}}}")]
        return rows + ([("two answers", f"The answer is {letter} or {other}.")] if config.profile == "strict" else [])
    if config.type == "code":
        return [("no code", "    pass\n" if config.tests == "functions" else "pass\n")]
    return []


def _answer(problem: Problem) -> str:
    stated = final_answer(problem.reference or "")
    return re.sub(r"[^0-9.\-]", "", as_latex((problem.reference or "") if stated is None else stated.answer))


def _number(problem: Problem) -> Fraction | None:
    stated = final_answer(problem.reference or "")
    return plain_number(as_latex((problem.reference or "") if stated is None else stated.answer))


def _text(completion: str | tuple[Message, ...]) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if message["role"] == "assistant")
