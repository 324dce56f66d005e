"""Problems of `reasoning-gym` generators, by name.

Train and test come from disjoint ranges of generator seeds. That makes them different draws, not different prompts: a
generator with few distinct questions may give the same one in both. A few generators depend on the order of sets and
give other problems in every process unless PYTHONHASHSEED is set (codeio, isomorphic_strings, knight_swap,
list_functions, polynomial_multiplication, ransom_note, word_ladder in version 0.1.25). So each problem carries its
whole entry for the scorer, besides what it was drawn from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from types import ModuleType
from typing import Any

from posttrain.config.schema import GymSource
from posttrain.data.sample import Message, Problem
from posttrain.errors import DataError, RecipeError, StackError, nearest

_FIRST_SEED = {"train": 0, "test": 2**31}
_SEEDS = 2**30
_BRACES = re.compile(r"\{\{|\}\}|\{question\}|[{}]")


def generate_problems(source: GymSource, name: str) -> list[Problem]:
    """The problems of a `reasoning-gym` generator.

    `meta` holds `reasoning_gym` (the generator's name), `config`, `seed`, `index` and `entry`, what the generator gave.

    Args:
        source: the recipe section.
        name: name of the source, the first part of each problem's id.

    Raises:
        StackError: reasoning-gym is not installed.
        DataError: an unknown generator, or parameters it refuses.
        RecipeError: a template that cannot be filled, or `system` together with `chat: false`.
    """
    if source.system is not None and source.chat is False:
        raise RecipeError("`system` makes the prompt a chat, `chat: false` forbids it", where=f"{name}.system")
    first_seed = generator_seed(source.seed, source.split)
    place = f"{source.reasoning_gym}[{source.split}] seed {source.seed}"
    return [
        Problem(
            id=f"{name}/{index}",
            prompt=_prompt(source, name, entry["question"]),
            reference=entry["answer"],
            meta={
                "reasoning_gym": source.reasoning_gym,
                "config": source.config,
                "seed": first_seed,
                "index": index,
                "entry": entry,
            },
            where=f"{place} problem {index}",
            chat=source.chat,
        )
        for index, entry in enumerate(_entries(source, name, first_seed))
    ]


def generator_seed(seed: int, split: str) -> int:
    """The seed given to the generator: in [0, 2**30) for train, in [2**31, 2**31 + 2**30) for test.

    Generators draw problem i from their seed plus i, so neighbouring seeds would share all but one problem. The seed
    of the recipe is therefore hashed.
    """
    digest = hashlib.blake2b(f"{split} {seed}".encode(), digest_size=8).digest()
    return _FIRST_SEED[split] + int.from_bytes(digest) % _SEEDS


def _entries(source: GymSource, name: str, seed: int) -> list[dict[str, Any]]:
    gym = _import()
    known = gym.factory.DATASETS
    if source.reasoning_gym not in known:
        raise DataError(
            f"reasoning-gym has no generator {source.reasoning_gym!r}",
            where=f"{name}.reasoning_gym",
            hint=nearest(source.reasoning_gym, known),
        )
    if taken := {"seed", "size"} & set(source.config):
        raise DataError(
            f"{' and '.join(sorted(taken))} cannot be set in config",
            where=f"{name}.config",
            hint="set it beside config",
        )
    parameters = {field.name for field in dataclasses.fields(known[source.reasoning_gym][1])} - {"seed", "size"}
    for key in source.config:
        if key not in parameters:
            raise DataError(
                f"{source.reasoning_gym} has no parameter {key!r}",
                where=f"{name}.config.{key}",
                hint=nearest(key, parameters),
            )
    try:
        dataset = gym.create_dataset(source.reasoning_gym, seed=seed, size=source.size, **source.config)
        return [dataset[index] for index in range(source.size)]
    # Generators state limits on their parameters by asserts, and find others only when they draw.
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{source.reasoning_gym} refuses its parameters: {type(error).__name__}: {error}",
            where=f"{name}.config",
            hint="parameters: " + ", ".join(sorted(parameters)),
        ) from error


def _import() -> ModuleType:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise StackError(f"{error.name} is not installed", hint="pip install reasoning-gym") from error
    return reasoning_gym


def _prompt(source: GymSource, name: str, question: str) -> str | tuple[Message, ...]:
    text = question if source.template is None else _fill(source.template, question, f"{name}.template")
    if source.system is None:
        return text
    return {"role": "system", "content": source.system}, {"role": "user", "content": text}


def _fill(template: str, question: str, where: str) -> str:
    """The template with the question in place of {question}; `{{` and `}}` are braces."""
    if "{question}" not in template:
        raise RecipeError("the template has no {question}, so all prompts would be equal", where=where)
    written = {"{{": "{", "}}": "}", "{question}": question}

    def replacement(found: re.Match[str]) -> str:
        if found[0] not in written:
            raise RecipeError(f"single {found[0]!r} at character {found.start()}", where=where, hint="write {{ or }}")
        return written[found[0]]

    return _BRACES.sub(replacement, template)
