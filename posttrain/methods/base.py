"""What a method is: its parameters, what it needs, its advantages and its loss sums. Nothing about how it is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from posttrain.config.needs import Needs
from posttrain.config.schema import Section
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Preference, Sample
from posttrain.objectives.batch import LossSum, PreferenceBatch, TokenBatch


class MethodConfig(Section):
    """Base of all method sections. Subclasses set `name` to a Literal and carry the paper's parameter names."""

    name: str


C = TypeVar("C", bound=MethodConfig)


class Method(ABC, Generic[C]):
    """Base of all methods.

    Class attributes:
        Config: the method's section of the recipe; its defaults are the paper's.
        shell: which trainer shell runs it.
        paper: title, identifier.
    """

    Config: ClassVar[type[MethodConfig]]
    shell: ClassVar[Literal["sft", "online", "preference"]]
    paper: ClassVar[str]

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What preflight checks and the shell builds."""

    @property
    def reads_entropy(self) -> bool:
        """Whether `loss` reads `batch.entropies`."""
        return False

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that share one batch of rollouts; 1 without rollouts."""
        return 1

    @abstractmethod
    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Number of units per loss term in a micro-batch, from masks alone (called before the forward pass)."""

    @abstractmethod
    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        """Loss sums per term. The terms and their counts are those of `counts` for the same batch."""

    def state_dict(self) -> dict[str, Any]:
        """Everything with memory (schedules, curricula); JSON values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {sorted(state)}")


@dataclass(frozen=True, slots=True)
class Scored:
    """The rollouts of one optimizer step over all ranks, as advantages see them. N completions.

    Attributes:
        rewards: (N,) float; 0 where not `known`.
        outcomes: (N,) what the verifier said, before shaping; 0 where not `known`.
        known: (N,) bool; False where the verifier could not judge. Such rows get advantage 0 and no loss.
        groups: (N,) int; completions of one prompt (and prefix) share a number.
        lengths: (N,) number of trained tokens.
        finished: (N,) bool; False where the completion was cut at the length limit.
        max_new_tokens: that limit.
    """

    rewards: Tensor
    outcomes: Tensor
    known: Tensor
    groups: Tensor
    lengths: Tensor
    finished: Tensor
    max_new_tokens: int


class OnlineMethod(Method[C]):
    """A method of the online shell: rollouts, verdicts, advantages, policy-gradient loss."""

    shell: ClassVar[Literal["online"]] = "online"

    @abstractmethod
    def advantages(self, scored: Scored) -> Tensor:
        """(N,) advantages; 0 for rows that are not known."""

    def keep(self, scored: Scored) -> Tensor:
        """(N,) bool: rows whose tokens are trained on. Default: all that the verifier could judge."""
        return scored.known


class PreferenceMethod(Method[C]):
    """A method of the preference shell: rows with several responses, compared with each other.

    `counts` and `loss` take a `PreferenceBatch`. Rows that are not `batch.usable` are left out of values and counts.
    The terms are the same for every micro-batch, also where it holds pairs only or samples only.
    """

    shell: ClassVar[Literal["preference"]] = "preference"

    def prepare(self, rows: Sequence[Preference]) -> list[Preference]:
        """The rows to train on, made of those read. May pair up, expand or leave out rows. Default: as they are.

        Called once, after loading and before rendering. Every row has a problem id of its own, and its `chosen` and
        `rejected` differ, because rows that say nothing are left out afterwards.

        Raises:
            DataError: a row lacks a response, a score or a column that the method reads.
        """
        return list(rows)

    def order(self, rows: Sequence[Preference]) -> list[list[int]]:
        """Indices of the rows of each stage of training. Stages follow one another; within one, order is free.

        Called once, with the prepared rows that fit the length limits. Default: one stage of all rows.
        """
        return [list(range(len(rows)))]

    @property
    def refresh_reference(self) -> bool:
        """Whether the reference becomes a copy of the policy at the start of each stage after the first."""
        return False

    def begin_stage(self, stage: int) -> None:
        """Called before the first step of each stage, with its index from 0; not again on resuming within it."""

    def responses(self, row: Preference, renderer: Renderer) -> dict[str, Sample]:
        """The token sequences that one row is made of, by role. Default: `chosen` and `rejected`.

        All rows of a method have the same roles.
        """
        return {
            "chosen": renderer.sample(Example(row.problem, row.chosen)),
            "rejected": renderer.sample(Example(row.problem, row.rejected)),
        }

    def values(self, row: Preference) -> dict[str, float | list[float]]:
        """Numbers of one row that the loss reads."""
        return {}

    @property
    def samples_per_prompt(self) -> int:
        """Completions drawn from the policy per prompt and step; 0 for methods without an online term."""
        return 0

    def online_weights(self, logps: Tensor, ref_logps: Tensor, groups: Tensor) -> Tensor:
        """(N,) weights of the step's samples, which the shell puts into `samples.advantages`.

        Called once per step, before the samples of all ranks are split into micro-batches, so that a group is whole.

        Args:
            logps, ref_logps: (N,) log-probs of the completions, summed over tokens, without gradient.
            groups: (N,) int; samples of one prompt share a number.
        """
        raise RuntimeError(f"{type(self).__name__} draws no samples")

    @abstractmethod
    def counts(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """As `Method.counts`; the unit of most terms is `pairs`."""

    @abstractmethod
    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        """As `Method.loss`."""
