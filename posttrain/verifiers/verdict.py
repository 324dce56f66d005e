"""Verdicts: what a verifier says. Never a bare float, so that "could not tell" is not mistaken for "wrong"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from posttrain.config.own_code import OwnCode
from posttrain.data.sample import Problem


class Status(StrEnum):
    """Outcome of one verification.

    The first four judge the answer; the others say that there is no judgement. The latter are excluded from
    advantages and counted. SKIPPED is the verifier's own word for having nothing to say.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    UNPARSEABLE = "unparseable"
    BAD_REFERENCE = "bad_reference"
    TIMEOUT = "timeout"
    CRASH = "crash"
    SKIPPED = "skipped"

    @property
    def known(self) -> bool:
        """Whether the answer was judged. No answer and an unparseable answer are the model's fault: judged as wrong."""
        return self in (Status.CORRECT, Status.WRONG, Status.NO_ANSWER, Status.UNPARSEABLE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one completion.

    Attributes:
        status: what was found.
        score: in [0, 1]; 1.0 for correct, 0.0 for the other judged ones unless the verifier grades; None if not judged.
            A reward model with `transform: none` gives any finite number.
        detail: a short reason for people (the extracted answer, the failed step, the exception).
        answer: the answer that was found, in a form in which equal answers are equal texts as far as the verifier can
            say; None where there is none, or the verifier does not extract answers. Majority votes count it.
    """

    status: Status
    score: float | None
    detail: str = ""
    answer: str | None = None

    def __post_init__(self) -> None:
        if self.status.known != (self.score is not None):
            raise ValueError(f"a verdict {self.status} must {'have a' if self.status.known else 'have no'} score")


class Verifier(Protocol):
    """Judges one completion. Pure and picklable: it runs in worker processes.

    `outcome` is True for verifiers that judge whether the answer is right and False for those that only shape the
    reward (format, length). A verifier may also have a method `prepare()` that does slow work once per worker, before
    the clock of the first completion starts.
    """

    name: str
    outcome: bool

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        """Judge `completion` (text of the continuation only, special tokens removed) for `problem`."""
        ...


@runtime_checkable
class ReadsPlainly(Protocol):
    """A verifier that sees of some references that it can read them, without the work and the clock of a worker."""

    def reads_plainly(self, reference: str) -> bool:
        """Whether it can surely read this one."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion with what is known of it beside its text.

    Attributes:
        text: of the continuation only, special tokens removed.
        tokens: how many were sampled; None where nobody counted.
        outcome: the verdict on the answer; None for the verifier that gives it.
        ids: the sampled tokens; None where they are not known, or no code of the user's own is there to read them.
    """

    text: str
    tokens: int | None = None
    outcome: Verdict | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """How a user's code wants to be called.

    Attributes:
        whole: all completions of a prompt together, under the limit for each of them times their number.
        columns: those of the data that it cannot do without.
    """

    whole: bool
    columns: tuple[str, ...]


@runtime_checkable
class OwnVerifier(Protocol):
    """Runs code of the user's own, in worker processes as a `Verifier` does. See `verifiers.python`."""

    name: str
    outcome: bool
    code: OwnCode

    def prepare(self) -> None: ...

    def form(self) -> Form: ...

    def judge(self, problem: Problem, answers: Sequence[Answer], limit: float | None) -> Iterator[Verdict]:
        """One verdict for each completion of a problem, in their order."""
        ...


class BatchVerifier(Protocol):
    """Judges whole batches, in the process of the caller, after the workers: a model, a remote judge, a length.

    Instead of a limit by the pool it bounds its own time, and it fails by verdicts. A verifier is one of the two: it is
    called (`Verifier`) or has `verify`. It may have `close()`.
    """

    name: str
    outcome: bool

    def verify(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """All verdicts on one completion, combined.

    Attributes:
        verdicts: by verifier name, the outcome verifier first, then in recipe order.
        outcome: 1.0/0.0 (or a graded score) from the outcome verifier; None if it could not judge.
        reward: sum of weight * score over all verifiers, or 0 where a gate is closed; None if one could not judge. One
            that shapes and skipped the completion adds nothing.
    """

    verdicts: dict[str, Verdict]
    outcome: float | None
    reward: float | None

    @property
    def status(self) -> Status:
        """Status of the outcome verifier (the first one)."""
        return next(iter(self.verdicts.values())).status


class Judge(Protocol):
    """A recipe's verifiers together: the thing trainers and evaluation call. Runs them in killable workers."""

    def judge(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        tokens: Sequence[int] | None = None,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Judgement]:
        """One judgement for each completion; `tokens` are their lengths and `ids` the tokens, for who reads them."""
        ...

    def close(self) -> None: ...
