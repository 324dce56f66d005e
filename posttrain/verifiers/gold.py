"""Gold answers written as a model would write them, and answers made wrong on purpose, as a verifier's section says."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.config.schema import FileSource, GymSource, Source, TaskSource
from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Message, Problem
from posttrain.data.sources import examples, problems
from posttrain.errors import RecipeError

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
    gold = [config.gold(problem) for problem in found]
    if any(answer is None for answer in gold):
        pattern = getattr(config, "pattern", None)
        why = f"with the pattern {pattern!r}" if pattern is not None else "from a reference"
        raise RecipeError(
            f"nothing says how a right answer to verifier {config.type} is written {why}",
            where="data.completion",
            hint="name a column with right completions: `completion: <column>`",
        )
    return list(zip(found, gold, strict=True))


def wrong_answers(config: VerifierConfig, gold: Sequence[Written]) -> dict[str, list[Written]]:
    """Answers that must not be correct, by what was done to the gold answer.

    `empty`: nothing is written. `other row`: the gold answer of the next problem that has another one. Further kinds
    depend on the verifier: another number, a second answer beside the right one, another letter, a body without code.
    """
    found: dict[str, list[Written]] = {"empty": [(problem, "") for problem, _ in gold]}
    found["other row"] = [(problem, other) for problem, other in _neighbours(config, gold)]
    for problem, completion in gold:
        for kind, answer in config.spoilt(problem, completion):
            found.setdefault(kind, []).append((problem, answer))
    return {kind: rows for kind, rows in found.items() if rows}


def _neighbours(config: VerifierConfig, gold: Sequence[Written]) -> list[Written]:
    rows = []
    for index, (problem, _) in enumerate(gold):
        for other, completion in (*gold[index + 1 : index + 20], *gold[: max(0, index + 20 - len(gold))]):
            if config.excludes(problem, other):
                rows.append((problem, completion))
                break
    return rows


def _text(completion: str | tuple[Message, ...]) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if message["role"] == "assistant")
