"""What a method is: its parameters, what it needs, its advantages and its loss sums. Nothing about how it is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from numpy.random import Generator

from posttrain.config.metric import Metric
from posttrain.config.needs import Needs
from posttrain.config.schema import Section
from posttrain.data.episodes import Replay
from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Origin, Problem, Sample
from posttrain.data.steps import StepRule
from posttrain.lazy import Tensor
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
        metrics: what it alone logs, in the diagnostics of its losses.
    """

    Config: ClassVar[type[MethodConfig]]
    shell: ClassVar[Literal["sft", "online", "preference", "reward", "offline"]]
    paper: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]] = ()

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What preflight checks and the shell builds."""

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that share one batch of rollouts; 1 without rollouts."""
        return 1

    @abstractmethod
    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Number of units per loss term in a micro-batch, from masks alone (called before the forward pass).

        Args:
            batch: a `TokenBatch`, or what the shell has in its place.
        """

    @abstractmethod
    def loss(self, batch: Any) -> dict[str, LossSum]:
        """Loss sums per term. The terms and their counts are those of `counts` for the same batch."""

    def end_step(self, diagnostics: Mapping[str, float]) -> None:
        """Called on all ranks after the last backward pass of a step, with means over it and over all ranks: the
        diagnostics of the losses, and the shell's (`entropy`). The shells of rollouts and of traces do."""

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
        max_new_tokens: that limit, as the recipe says it.
        limits: (N,) int; tokens that each completion could have: fewer where a prefix counts, or fills the model's
            positions. None: `max_new_tokens` for all.
        seed: a number of 64 bits that differs from one batch of rollouts to the next and is the same on all ranks and
            when a run is repeated; for methods that draw.
        kinds: where each completion began and whether it is fresh, N of them.
        problem_ids: N ids.
        infos: `Start.info` of each completion.
        verdicts: the verifier's word for each outcome (`Status` value).
        turn_rewards: (N, K) of episodes, the reward of each action, 0 behind the last; None without an environment.
        turns: (N,) int; actions of each row; None without an environment.
        episodes: (N,) int from 0; the episode of each row, whose rows follow one another; None without an environment.
    """

    rewards: Tensor
    outcomes: Tensor
    known: Tensor
    groups: Tensor
    lengths: Tensor
    finished: Tensor
    max_new_tokens: int
    seed: int = 0
    kinds: tuple[Origin, ...] = ()
    problem_ids: tuple[str, ...] = ()
    infos: tuple[dict[str, float], ...] = ()
    verdicts: tuple[str, ...] = ()
    limits: Tensor | None = None
    turn_rewards: Tensor | None = None
    turns: Tensor | None = None
    episodes: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Where the completions of a group begin.

    Attributes:
        prefix: token ids behind the prompt that the policy goes on from; not trained on.
        origin: POLICY without a prefix, else PREFIX or RESET; GUIDED with a handover.
        info: numbers about the start, which come back in `Scored.infos`.
        counted: the prefix counts in `rollouts.max_new_tokens`, as if the policy had written it; else that many tokens
            may follow it. A prefix that leaves no room for a token, by this or by the model's positions, is left out.
        handover: the writer (`companions.Writer`) ends the completions: with this probability it goes on behind k of
            the L tokens that the policy has sampled, k uniform on 1 .. L - 1 and drawn for each completion, else from
            the start. None: the completions are the policy's.
        own: with a handover, the first so many completions of the group stay the policy's.
        replay: in an environment, the turns that are played again before the policy goes on; then there is no `prefix`.
    """

    prefix: tuple[int, ...] = ()
    origin: Origin = Origin.POLICY
    info: dict[str, float] = field(default_factory=dict)
    counted: bool = False
    handover: float | None = None
    own: int = 0
    replay: Replay | None = None


class OnlineMethod(Method[C]):
    """A method of the online shell: rollouts, verdicts, advantages, policy-gradient loss.

    In each optimizer step: `begin_step`, then, if it is the first of its rollouts, `start` for every prompt,
    `observe`, `advantages` and `keep`; then `expert_values`; `counts` and `loss` for every micro-batch; `end_step`.
    """

    shell: ClassVar[Literal["online"]] = "online"

    @property
    def linear_in_advantages(self) -> bool:
        """Whether the rollouts' loss of a token is c times as large where its advantage is, for c > 0. Then a
        correction for the engine's rounding (`rollouts.importance`) may be put into the advantages."""
        return True

    def bind(self, renderer: Renderer, seed: int) -> None:
        """Called once, before the first step, with what turns token ids into text, for methods that cut traces, and the
        run's seed, for those that draw for a whole rollout."""

    @property
    def chooses_starts(self) -> bool:
        """Whether completions may begin behind a prefix: the method has a `start` of its own."""
        return type(self).start is not OnlineMethod.start

    @property
    def replays(self) -> bool:
        """Whether those starts are turns of recorded episodes (`Start.replay`), so that there is an environment; else
        they are tokens, and there is none."""
        return False

    def begin_step(self, step: int) -> None:
        """Called on all ranks before everything else of optimizer step `step`, from 0. For schedules."""

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        """Where the completions of one prompt begin; called once per prompt that is sampled for.

        Must not change the method's state: the ranks call it for their own prompts.

        Args:
            problem: of the prompt.
            prompt_ids: as rendered.
            traces: those of `data.traces` for this problem, or the writer's, with the ids that continue `prompt_ids`.
            draw: a generator of this prompt alone, the same whenever the run is repeated or resumed.
        """
        return Start()

    def observe(self, scored: Scored) -> None:
        """Called on all ranks once per batch of rollouts, before `advantages`. For curricula and statistics."""

    def expert_values(self, problem_ids: Sequence[str]) -> list[float]:
        """A number for each expert row, which the shell puts into `batch.advantages`; called in every step.

        Args:
            problem_ids: of the rows. Problems that are among the prompts have the ids they have there.
        """
        return [0.0] * len(problem_ids)

    @abstractmethod
    def advantages(self, scored: Scored) -> Tensor:
        """(N,) advantages; 0 for rows that are not known."""

    def keep(self, scored: Scored) -> Tensor:
        """(N,) bool: rows whose tokens are trained on. Default: all that the verifier could judge."""
        return scored.known


@dataclass(frozen=True, slots=True)
class Weighed:
    """What a `ContrastMethod` makes of a step's completions.

    Attributes:
        advantages: (N,).
        metrics: name -> (sum, count), of all ranks' completions.
    """

    advantages: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


class ContrastMethod(OnlineMethod[C]):
    """An online method whose advantages follow from how likely whole completions are, compared with each other.

    The shell calls `advantages` and `keep` as ever, scores all completions by policy and reference, and puts what
    `weigh` makes of them in the place of the advantages. So completions that are compared need not share a micro-batch.
    One update per batch of rollouts: the weights are those of the policy as it is.
    """

    @abstractmethod
    def weigh(self, scored: Scored, logps: Tensor, ref_logps: Tensor) -> Weighed:
        """Called on all ranks once per step, without gradient.

        Args:
            scored: completions of all ranks.
            logps, ref_logps: (N,) log-probs of whole completions; 0 where they are not kept.
        """


@dataclass(frozen=True, slots=True)
class Estimates:
    """What a method makes of rewards and values, without gradient.

    Attributes:
        advantages: (B, T), 0 outside of the mask.
        returns: (B, T) what the critic regresses on.
        kl: (B,) KL to the reference at sampling time, summed over the completion; None without a reference.
    """

    advantages: Tensor
    returns: Tensor
    kl: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Regression:
    """What a critic is fitted to in a micro-batch, without gradient. (B, S) each, S states of a row.

    Attributes:
        values: of the states, in the units of the targets.
        targets: what the value loss pulls them to.
        mask: bool, True where there is a state.
    """

    values: Tensor
    targets: Tensor
    mask: Tensor


class ActorCriticMethod(OnlineMethod[C]):
    """An online method with a critic: advantages per token, made of rewards and values once per rollout.

    `advantages` gives the rewards of whole completions. The shell then asks for values, old and reference log-probs,
    calls `token_rewards` and `estimate` for every micro-batch, whitens rewards before the latter and advantages after
    it, over all micro-batches and ranks, if the method says so, and calls `settle`. In `loss`, `batch.advantages` is
    (B, T), and `batch.values`, `old_values` and `returns` are there.
    Its `needs` say `critic`; where they do not, it is an online method without one.
    """

    @property
    def whitens(self) -> bool:
        """Whether advantages get mean 0 and variance 1 over the trained tokens of a rollout."""
        return True

    @property
    def whitens_rewards(self) -> bool:
        """Whether token rewards get variance 1 over the trained tokens of a rollout, and keep their mean."""
        return False

    def value_mask(self, batch: TokenBatch) -> Tensor:
        """(B, T): the tokens whose states the value loss is over."""
        return batch.mask

    @abstractmethod
    def token_rewards(self, batch: TokenBatch) -> Tensor:
        """(B, T): rewards of tokens, each row from itself alone; `batch.advantages` are the rewards of the rows."""

    @abstractmethod
    def estimate(self, batch: TokenBatch, rewards: Tensor) -> Estimates:
        """Advantages and returns of the same rows from these token rewards, each from itself alone."""

    def settle(self, kl: float, completions: int) -> None:
        """Called on all ranks after the estimates of a rollout, if there is a reference.

        Args:
            kl: mean of `Estimates.kl` over all ranks.
            completions: their number.
        """


class OfflineMethod(Method[C]):
    """A method of the offline shell: rewarded traces that somebody sampled before, no rollouts.

    `counts` and `loss` take a `TokenBatch` with `rewards`, with `steps` where the method wants them, and with `values`
    if it needs a critic.
    """

    shell: ClassVar[Literal["offline"]] = "offline"

    def prepare(self, traces: Sequence[KnownTrace]) -> list[KnownTrace]:
        """The traces to train on, of those read. Default: all."""
        return list(traces)

    def reward(self, trace: KnownTrace) -> float:
        """The reward of a whole trace. Default: its outcome.

        Raises:
            DataError: it has none.
        """
        return trace.verified

    @property
    def steps(self) -> StepRule | None:
        """What ends a step of a trace; None: the method takes no steps."""
        return None

    def regression(self, batch: TokenBatch) -> Regression | None:
        """What the critic is fitted to, after every forward pass; its explained variance is logged. None: to nothing,
        in the whole run."""
        return None

    def begin_step(self, step: int) -> None:
        """Called on all ranks before everything else of optimizer step `step`, from 0. For schedules."""


class PreferenceMethod(Method[C]):
    """A method of the preference shell: rows with several responses, compared with each other.

    `counts` and `loss` take a `PreferenceBatch`. Rows are `Preference`s, or what the method's data section holds. Those
    that are not `batch.usable` are left out of values and counts.
    The terms are the same for every micro-batch, also where it holds pairs only or samples only.

    Class attributes:
        term: of the loss, if there is one.
    """

    shell: ClassVar[Literal["preference", "reward"]] = "preference"
    term: ClassVar[str] = "preference"

    @property
    def needs(self) -> Needs:
        """Default: pairs, and a reference."""
        return Needs(data=("preferences",), reference=True)

    @property
    def columns(self) -> Mapping[str, Any]:
        """Columns that rows must have beside responses and scores, with an example of what stands in them."""
        return {}

    def prepare(self, rows: Sequence[Any]) -> list[Any]:
        """The rows to train on, made of those read. May pair up, expand or leave out rows. Default: as they are, once
        each has what `values` reads.

        Called once, after loading and before rendering. Every row has a problem id of its own, and its `chosen` and
        `rejected` differ, because rows that say nothing are left out afterwards.

        Raises:
            DataError: a row lacks a response, a score or a column that the method reads.
        """
        for row in rows:
            self.values(row)
        return list(rows)

    def order(self, rows: Sequence[Any]) -> list[list[int]]:
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

    def responses(self, row: Any, renderer: Renderer) -> dict[str, Sample]:
        """The token sequences that one row is made of, by role. Default: `chosen` and `rejected`.

        All rows of a method have the same roles.
        """
        return {
            "chosen": renderer.sample(Example(row.problem, row.chosen)),
            "rejected": renderer.sample(Example(row.problem, row.rejected)),
        }

    def values(self, row: Any) -> Mapping[str, float | list[float]]:
        """Numbers of one row that the loss reads."""
        return {}

    def online_weights(self, logps: Tensor, ref_logps: Tensor, groups: Tensor) -> Tensor:
        """(N,) weights of the step's samples, which the shell puts into `samples.advantages`.

        Called once per step, before the samples of all ranks are split into micro-batches, so that a group is whole.

        Args:
            logps, ref_logps: (N,) log-probs of the completions, summed over tokens, without gradient.
            groups: (N,) int; samples of one prompt share a number.
        """
        raise RuntimeError(f"{type(self).__name__} draws no samples")

    def counts(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """As `Method.counts`. Default: the usable rows."""
        return {self.term: batch.usable.sum().float()}

    @abstractmethod
    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        """As `Method.loss`."""


class StepwiseMethod(PreferenceMethod[C]):
    """A method of the reward shell that scores the states behind tokens instead of whole rows.

    `TokenBatch.scores` is (B, T). Values of a row that are lists come padded with zeros to the longest of the
    micro-batch.
    """

    shell: ClassVar[Literal["reward"]] = "reward"


class PointwiseMethod(PreferenceMethod[C]):
    """A method of the preference shell whose loss holds each row against a number of the whole step.

    The shell makes log-ratios of policy to reference before the first pass with a gradient, over the rows of all ranks,
    and calls `observe`. So the number is the same for every split of a step over micro-batches and ranks.

    Class attributes:
        scores: of what: the rows themselves (`own`), or prompts with the completion of another row (`mismatched`).
    """

    scores: ClassVar[Literal["own", "mismatched"]]

    @abstractmethod
    def observe(self, total: float, n: int) -> None:
        """Called on all ranks once per optimizer step.

        Args:
            total: sum of the log-ratios, in nats.
            n: their number; 0 where no row has a completion that is another's.
        """
