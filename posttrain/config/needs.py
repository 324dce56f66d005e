"""What a method needs, stated as data, so that preflight can refuse a recipe without loading torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from posttrain.config.locations import Locations
    from posttrain.config.schema import Recipe
    from posttrain.errors import PosttrainError

DataSection = Literal["prompts", "completions", "preferences", "unpaired", "stepwise", "traces"]


class Companion:
    """What a method brings beside policy, reference and critic: a further model, or more of those. The classes are in
    `methods.companions`.

    Class attributes:
        title: what its model is called, in messages and in the estimate of memory; empty where it brings none.
        adds: names of (B, T) numbers that it adds to `TokenBatch.further` where the loss reads no divergence.
        episodes: why it cannot serve episodes; None where it can.
        own_tokens: whether its model has a vocabulary of its own and reads text alone: it may be one of text where the
            policy looks at pictures.
    """

    title: ClassVar[str] = ""
    adds: ClassVar[tuple[str, ...]] = ()
    episodes: ClassVar[str | None] = None
    own_tokens: ClassVar[bool] = False

    @property
    def holds(self) -> Literal["weights", "trained weights"] | None:
        """What it holds in memory: as much as the policy, as what of it is trained, or nothing of its own."""
        return None

    @property
    def content(self) -> dict[str, str]:
        """What of it shapes a checkpoint, which is continued only by a run with the same (`content.<name>` in
        `state.identity`)."""
        return {}

    def refuse(self, recipe: Recipe, method: str, locations: Locations) -> Iterator[PosttrainError]:
        """What of a recipe it cannot go with."""
        return iter(())


T = TypeVar("T", bound=Companion)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method needs of a recipe and of the shell.

    Attributes:
        data: the sections of `data` that hold the rows it reads.
        rollouts: it samples from the policy, so `rollouts` and `batch.prompts_per_step` are read (else
            `rows_per_step`).
        samples: completions that it draws for each of its rows and per step, from the policy as it is (temperature 1,
            all tokens), of the row's prompt, or where rows are episodes each of the conversation before one of its
            turns; 0 for none. Of `rollouts` only the length limit and the engine's settings are read.
        verifier: it is rewarded, so `verifier` is read.
        reference: a frozen copy of the starting policy is held (or the adapter switched off).
        min_samples_per_prompt: smallest group that gives a signal.
        expert_rows: rows of `data.traces` that are trained on beside the rollouts, per optimizer step over all ranks.
            They come in micro-batches of their own, with `batch.expert` True, and enter no advantage and no metric of
            these.
        minibatches: optimizer steps in a pass over a batch of rollouts, which are of so many times
            `batch.prompts_per_step` prompts.
        old_logps: `loss` reads the log-probs of the sampling policy also where that policy is the current one.
        traces_instead: `data.traces` may stand in for `data.completions`.
        critic: there is a value model, so `critic` is read.
        trains: which of policy and critic; the other one stays as it is.
        critic_first: optimizer steps at the start in which the policy stays as it is and the critic alone is trained.
        classifier: it trains a sequence classifier, which writes no text, so `evaluation` is not read.
        turns: it gives each turn of an episode an advantage of its own, so `environment` is read.
        forks: it takes episodes that are several rows, because the environment has changed their history.
        companions: what else it brings, at most one of a kind.
    """

    data: tuple[DataSection, ...]
    rollouts: bool = False
    samples: int = 0
    verifier: bool = False
    reference: bool = False
    min_samples_per_prompt: int = 1
    expert_rows: int = 0
    minibatches: int = 1
    old_logps: bool = False
    traces_instead: bool = False
    critic: bool = False
    trains: Literal["both", "policy", "critic"] = "both"
    critic_first: int = 0
    classifier: bool = False
    turns: bool = False
    forks: bool = False
    companions: tuple[Companion, ...] = ()

    def companion(self, kind: type[T]) -> T | None:
        """The one of that kind, if there is one."""
        return next((each for each in self.companions if isinstance(each, kind)), None)

    @property
    def generates(self) -> bool:
        """Whether the policy writes completions in training."""
        return self.rollouts or self.samples > 0

    @property
    def batch_key(self) -> Literal["prompts_per_step", "rows_per_step"]:
        """The key of the `batch` section that sets the size of a step."""
        return "prompts_per_step" if self.rollouts else "rows_per_step"
