"""What flows through posttrain: rows as read, problems and examples as typed, samples as token ids.

Token ids are the only currency after sampling; text is derived from them for verifiers and people.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, Any]
"""One chat message: `{"role": ..., "content": ...}`, both text; further keys as `data.messages` has them."""


class Origin(StrEnum):
    """Who wrote the tokens that a sample trains on."""

    POLICY = "policy"
    EXPERT = "expert"
    PREFIX = "prefix"
    RESET = "reset"
    REPLAY = "replay"
    GUIDED = "guided"


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row and the place it came from.

    Attributes:
        values: column name to value, unchanged.
        where: `file:line` or `dataset[split] row N`, for error messages.
    """

    values: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with what a verifier needs to judge an answer to it.

    Attributes:
        id: stable identity within its source (source name and row number); groups and intervals cluster by it.
        prompt: plain text, or chat messages.
        reference: the gold answer as text, or None where the verifier needs none.
        meta: all further columns (task parameters, level, source row), passed to verifiers.
        where: the place it came from.
        chat: how a text prompt is rendered: True as a user message, False as plain text, None as a user message if the
            tokenizer has a chat template. Chat messages always go through the template.
        tools: JSON descriptions of the functions that the assistant may call, which the template shows.
        repeated: its completions were written behind it, and begin with the white space that parted them from it. Of a
            reply in a chat that is no part.
    """

    id: str
    prompt: str | tuple[Message, ...]
    reference: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    chat: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """A problem with a written completion, for supervised training (expert traces, annotator traces)."""

    problem: Problem
    completion: str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Preference:
    """A problem with a chosen and a rejected completion.

    Attributes:
        others: further completions by role (`gold` for TPO).
        scores: what the completions were scored, by role, where it is known.
    """

    problem: Problem
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    others: dict[str, str | tuple[Message, ...]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A problem with one completion that somebody found good (`label` True) or bad."""

    problem: Problem
    completion: str | tuple[Message, ...]
    label: bool


@dataclass(frozen=True, slots=True)
class Stepwise:
    """A problem with a solution in steps, each labelled right (True) or wrong. Steps and labels are equally many."""

    problem: Problem
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


@dataclass(slots=True)
class Sample:
    """One token sequence ready for training.

    Attributes:
        ids: token ids of prompt and completion, no padding, length L.
        loss_mask: length L; 1 where the token is trained on. Built from positions, never from token values.
        origin: who wrote the trained tokens.
        problem_id: identity of the problem.
        group: index of the group within its batch that shares a baseline; samples of one (problem, prefix) share it.
        behaviour_logps: length L; log-prob under the policy that sampled the token, 0 elsewhere; None if unknown.
        policy_version: number of weight syncs of the engine that sampled it; None for data from files.
        outcome: 1.0 right, 0.0 wrong, None where the verifier could not tell (excluded from advantages, counted).
        reward: what is optimised: the outcome plus shaping; None where a verifier could not judge.
        finished: the completion ended by a stop token; False means it was cut at the length limit.
        verdict: the verifier's word for the outcome (`Status` value), for logs.
        prefix: tokens between the prompt and the first trained token that somebody else wrote for this completion: a
            part of a trace, or what a chat template puts before a reply.
        info: numbers about where the completion begins (`methods.base.Start`).
        weight: how often it is drawn from the data, relative to other samples.
        guided: tokens at its end that a guide wrote; under the loss mask, but no actions of the policy.
        turn_rewards: of an episode, the reward of each action; empty for other samples.
        part: number of this row among those of its episode: there are several where the environment has changed the
            history that the policy reads.
        limit: tokens that a rollout could have behind its context; None where `rollouts.max_new_tokens` says it.
    """

    ids: list[int]
    loss_mask: list[int]
    origin: Origin
    problem_id: str = ""
    group: int = 0
    behaviour_logps: list[float] | None = None
    policy_version: int | None = None
    outcome: float | None = None
    reward: float | None = None
    finished: bool = True
    verdict: str = ""
    prefix: int = 0
    info: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    guided: int = 0
    limit: int | None = None
    turn_rewards: list[float] = field(default_factory=list)
    part: int = 0

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, the prefix not counted."""
        trained = self.loss_mask.index(1) if 1 in self.loss_mask else len(self.ids)
        return trained - self.prefix

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.loss_mask):
            raise ValueError(f"{len(self.ids)} ids but {len(self.loss_mask)} mask entries")
        if self.behaviour_logps is not None and len(self.behaviour_logps) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids but {len(self.behaviour_logps)} behaviour log-probs")
