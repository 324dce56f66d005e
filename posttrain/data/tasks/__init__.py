"""Procedural tasks with visible chains of thought: problems and traces, a function of the recipe section alone.

Every problem is drawn from its own generator, keyed by (task, split, seed, level, index), so a longer source starts
with the problems of a shorter one. Which split a prompt belongs to is a property of the prompt: a hash of it puts
about one fifth of all prompts into `test`, and a source draws until it hits a prompt of its split. So no prompt is in
both splits, whatever the seeds, sizes and levels. Within a split prompts may repeat, and do where a level has few.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace

from posttrain.config.schema import TaskSource, WeakAnnotator
from posttrain.config.tasks import TASKS
from posttrain.data.sample import Example, Problem
from posttrain.data.tasks.base import Task
from posttrain.errors import DataError, PluginError


def register(task: Task) -> Task:
    """Make a task of a plugin known: `data: {prompts: {task: <its name>, ...}}`, judged by `verifier: procedural`.

    The traces of `Task` are for methods that train on written completions, and may be missing.

    Raises:
        PluginError: the name is taken, or something is missing.
    """
    for part in ("name", "levels", "problem", "split_key", "check_strict", "check_lenient"):
        if not hasattr(task, part):
            raise PluginError(
                f"task {type(task).__name__} has no `{part}`", hint="posttrain/data/tasks/base.py: `Task`"
            )
    TASKS.add(task.name, task)
    return task


TEST_SHARE = 0.2
"""Share of the prompts of a task that belong to the test split."""

_MAX_DRAWS = 2000


def generate_problems(source: TaskSource, name: str) -> list[Problem]:
    """The problems of a task source.

    A list of levels is gone through in turn, a mapping is drawn from by its weights.

    Args:
        source: the recipe section.
        name: name of the source, the first part of each problem's id.

    Raises:
        DataError: a level the task does not have, weights that cannot be drawn from, or a level so small that no
            prompt of it falls into the split.
    """
    task = TASKS[source.task]
    return [_problem(task, source, name, index, level) for index, level in enumerate(_levels(source, name))]


def generate_examples(source: TaskSource, name: str) -> list[Example]:
    """The problems of a task source with traces by its annotator.

    Raises:
        DataError: as `generate_problems`, `weakness` given for the expert, or a task without such traces.
    """
    if source.annotator == "expert" and source.weakness is not None:
        raise DataError(
            "weakness has no effect on expert traces", where=name, hint="write `annotator: weak`, or leave weakness out"
        )
    task, weakness = TASKS[source.task], source.weakness or WeakAnnotator()
    if not hasattr(task, f"{source.annotator}_trace"):
        raise DataError(f"task {source.task!r} writes no traces: it has no `{source.annotator}_trace`", where=name)
    examples = []
    for index, problem in enumerate(generate_problems(source, name)):
        if source.annotator == "expert":
            trace = task.expert_trace(problem)
        else:
            trace = task.weak_trace(problem, _rng("trace", source, problem.meta["level"], index), weakness)
        examples.append(Example(problem, trace))
    return examples


def split_of(task: Task, problem: Problem) -> str:
    """The split that a problem belongs to: `train` or `test`."""
    digest = hashlib.blake2b(f"{task.name} {task.split_key(problem)}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest) < TEST_SHARE * 2**64 else "train"


def _rng(use: str, source: TaskSource, level: int | str, index: int) -> random.Random:
    key = f"{use} {source.task} {source.split} {source.seed} {level} {index}"
    return random.Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()))


def _levels(source: TaskSource, name: str) -> Iterator[int]:
    task, where = TASKS[source.task], f"{name}.levels"
    for level in source.levels:
        if level not in task.levels:
            raise DataError(
                f"{source.task} has no level {level}",
                where=where,
                hint=f"levels {task.levels[0]} to {task.levels[-1]} can be made",
            )
    if isinstance(source.levels, list):
        if not source.levels:
            raise DataError("no levels given", where=where, hint="for example [2, 3, 4], or {2: 0.5, 3: 0.5}")
        return (source.levels[index % len(source.levels)] for index in range(source.size))
    levels, weights = list(source.levels), list(source.levels.values())
    if min(weights, default=0) < 0 or not 0 < sum(weights) < float("inf"):
        raise DataError(f"weights {weights} cannot be drawn from", where=where, hint="give each level a weight above 0")
    return (_rng("level", source, "", index).choices(levels, weights)[0] for index in range(source.size))


def _problem(task: Task, source: TaskSource, name: str, index: int, level: int) -> Problem:
    rng = _rng("problem", source, level, index)
    for _ in range(_MAX_DRAWS):
        problem = task.problem(rng, level)
        if split_of(task, problem) == source.split:
            where = f"{source.task}[{source.split}] seed {source.seed} level {level} problem {index}"
            return replace(problem, id=f"{name}/{index}", where=where)
    raise DataError(
        f"level {level} of {source.task} has no prompt in the {source.split} split",
        where=f"{name}.levels",
        hint="the level has too few prompts to be divided; use a higher one",
    )
