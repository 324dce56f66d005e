"""Completions that the policy revises while traces are collected, each drawn with numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.config.collection import SampleSettings
from posttrain.data.rendering import Renderer
from posttrain.data.revisions import revision
from posttrain.data.sample import Problem
from posttrain.rollouts.engine import Completion, Engine, Sampling
from posttrain.rollouts.sentence_control import Controlled


@dataclass(slots=True)
class Chain:
    """A completion with its revisions.

    Attributes:
        number: of the problem.
        sample: number of the completion within its problem.
        problem: as it was asked.
        prompt_ids: of the prompt that the last answer was written for.
        first: the completion.
        readings: how often the engine read the first prompt for it.
        answers: the completion and its revisions.
        read_tokens: prompt tokens read for all of them.
        sentences: the completion as it was written, where each sentence was asked for levels.
    """

    number: int
    sample: int
    problem: Problem
    prompt_ids: list[int]
    first: Completion
    readings: int
    answers: list[Completion] = field(init=False)
    read_tokens: int = field(init=False)
    sentences: Controlled | None = None

    def __post_init__(self) -> None:
        self.answers, self.read_tokens = [self.first], self.readings * len(self.prompt_ids)


def revise(engine: Engine, renderer: Renderer, chains: Sequence[Chain], config: SampleSettings) -> None:
    """Revise the last answer of every chain `config.revisions` times, in place; beam search revises by beam search.

    The draws of a revision depend on (seed, round, problem, completion) alone. An answer whose revision prompt would
    not leave room for an answer stays as it is; the chain then ends.
    """
    assert config.revision_template is not None  # the settings ask for it
    tokens = config.rollouts.max_new_tokens
    longest = None if engine.positions is None else engine.positions - tokens
    for number in range(1, config.revisions + 1):
        asked: dict[int, list[tuple[Chain, list[int]]]] = {}
        for chain in chains:
            answer = renderer.text(chain.answers[-1].ids)
            ids = renderer.prompt_ids(revision(chain.problem, answer, config.revision_template))
            if len(chain.answers) == number and (longest is None or len(ids) <= longest):
                asked.setdefault(chain.sample, []).append((chain, ids))
        # The completions of one number together: numbers of a draw are those of problem and completion.
        for sample, group in asked.items():
            sampling = Sampling(
                max_new_tokens=tokens,
                temperature=config.rollouts.temperature,
                top_p=config.rollouts.top_p,
                top_k=config.rollouts.top_k,
                seed=revision_seed(config.seed, number),
                first_sample=sample,
                prompt_numbers=tuple(chain.number for chain, _ in group),
                beams=config.beams or 1,
            )
            revised = engine.generate([ids for _, ids in group], sampling)
            for (chain, ids), (completion,) in zip(group, revised, strict=True):
                chain.answers.append(completion)
                chain.prompt_ids, chain.read_tokens = ids, chain.read_tokens + len(ids)


def revision_seed(seed: int, number: int) -> int:
    """Seed of the draws of a round of revisions, from 1."""
    digest = hashlib.sha256(f"revision {number} of {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
