"""What single methods bring beside policy, reference and critic: what each is, and what it asks of a recipe.

`Needs.companions` holds them; trainers find what runs each by its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from posttrain.config.adapters import saves_head
from posttrain.config.needs import Companion
from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Message, Problem
from posttrain.errors import NeedsError
from posttrain.lazy import Tensor
from posttrain.objectives.action_mask import MaskRule
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.next_token import NextTokenDivergence
from posttrain.verifiers.process_reward import ProcessRewardVerifier

if TYPE_CHECKING:
    from posttrain.config.locations import Locations
    from posttrain.config.schema import Recipe
    from posttrain.config.teacher_server import TeacherServer
    from posttrain.methods.base import Scored

DESCRIPTION = "description"
"""In `Scored.infos` of a `Reasoner`: which description of its group a completion begins with, from 0."""

SCORER_LOGPS, UNMASKED_LOGPS, DIVERGENCE = "scorer_logps", "unmasked_old_logps", "divergence"
"""In `TokenBatch.further`: log-probs of rollouts under the model that scores them; `old_logps` over the whole
vocabulary, where tokens are masked; what `Divergence` says, in nats, with gradient."""

STEP_PROGRESS, DROPPED = "step_progress", "dropped"
"""In `TokenBatch.further`: what `StepScorer` says of each token's step; 1 for tokens that `CovariantTokens` drops, else
0."""


@dataclass(frozen=True, slots=True)
class Scorer(Companion):
    """A frozen model whose log-probs of the rollouts the method reads, or its distributions (`Divergence`).

    Attributes:
        path: folder or Hub id.
    """

    title = "scorer"
    adds = (SCORER_LOGPS,)
    path: str

    @property
    def holds(self) -> Literal["weights"]:
        return "weights"


@dataclass(frozen=True, slots=True)
class ServedScorer(Companion):
    """A `Scorer` whose weights a server has.

    Attributes:
        path: folder or Hub id with its tokenizer and config.json.
        server: where it answers.
        top_k: likeliest tokens that `Divergence` reads, all others spread evenly; 0 where log-probs alone are read.
        key: the recipe's key of the section `server`.
    """

    title = "scorer"
    adds = (SCORER_LOGPS,)
    path: str
    server: TeacherServer
    top_k: int = 0
    key: str = "method.server"

    def refuse(self, recipe: Recipe, method: str, locations: Locations) -> Iterator[NeedsError]:
        if recipe.rollouts is not None and recipe.rollouts.temperature != 1.0:
            yield NeedsError(
                "a server gives the log-probs of a prompt at temperature 1 alone",
                where=locations.where(("rollouts", "temperature")),
                hint=f"set temperature: 1.0, or name the teacher by a folder or Hub id alone, without {self.key}",
            )


@dataclass(frozen=True, slots=True)
class Writer(Companion):
    """A frozen model that writes completions. `start` gets its completion of the prompt as the one trace, and it ends
    completions where a start says `handover`.

    Attributes:
        path: folder or Hub id; None for the policy as the run begins.
        top_p: nucleus that it samples from; temperature and length limit are those of the rollouts.
        begins: whether `start` reads its completion of the prompt.
        share: of its logits in what it draws from; the rest are those of the policy as it is.
    """

    title = "writer"
    episodes = "begins or ends completions with what others wrote"
    path: str | None
    top_p: float
    begins: bool = True
    share: float = 1.0

    @property
    def holds(self) -> Literal["weights"]:
        return "weights"

    def refuse(self, recipe: Recipe, method: str, locations: Locations) -> Iterator[NeedsError]:
        if self.share < 1 and recipe.rollouts is not None and recipe.rollouts.engine != "transformers":
            yield NeedsError(
                f"method {method} draws tokens by two models at once, which {recipe.rollouts.engine} cannot do",
                where=locations.where(("rollouts", "engine")),
                hint="take engine: transformers",
            )


@dataclass(frozen=True, slots=True)
class Reasoner(Companion):
    """A frozen language model that ends the policy's completions from their text: it reads the policy's description,
    under the text of the prompt, and what it writes follows the description, in the policy's tokens.

    Attributes:
        path: folder or Hub id.
        number: of reasonings behind each description. So many completions of a group share one (`DESCRIPTION`).
        description_end: what a description ends with. The reasoner reads what stands before it. A completion without it
            is a description as a whole.
        description_tokens: most tokens of it.
        template: text of the reasoner's prompt, with `{prompt}` and, for the description, `{answer}`.
        top_p: nucleus that it samples from; temperature and length limit are those of the rollouts.
    """

    title = "reasoner"
    episodes = "ends completions with what others wrote"
    own_tokens = True
    path: str
    number: int
    description_end: str
    description_tokens: int | None
    template: str
    top_p: float

    @property
    def holds(self) -> Literal["weights"]:
        return "weights"

    def refuse(self, recipe: Recipe, method: str, locations: Locations) -> Iterator[NeedsError]:
        rollouts = recipe.rollouts
        if rollouts is None:
            return
        samples, tokens = rollouts.samples_per_prompt, self.description_tokens
        if samples % self.number:
            yield NeedsError(
                f"{samples} completions of a prompt are no whole number of descriptions with {self.number} reasonings",
                where=locations.where(("rollouts", "samples_per_prompt")),
                hint=f"set it to {max(samples // self.number, 1) * self.number}, or change method.reasonings",
            )
        if tokens is not None and tokens >= rollouts.max_new_tokens:
            yield NeedsError(
                f"a description of {tokens} tokens leaves no room for reasoning in {rollouts.max_new_tokens}",
                where=locations.where(("method", "description_tokens")),
                hint="lower it, or raise rollouts.max_new_tokens, which bounds both together",
            )


@dataclass(frozen=True, slots=True)
class Attempt:
    """A completion as text, and what the verifier said of it; None where it could not, or there is none."""

    text: str
    outcome: float | None


Told = Callable[[Problem, Sequence[KnownTrace], Sequence[Attempt]], list[str | tuple[Message, ...] | None]]
"""Takes a problem, traces as in `OnlineMethod.start`, and the completions of a group, in order. Gives the prompt that
the self-teacher reads in place of the problem's for each; those of None are not trained on."""


@dataclass(frozen=True, slots=True)
class SelfTeacher(Companion):
    """The policy's own word, with more in its prompt, where a `Scorer`'s would be.

    Attributes:
        rate: by which its weights move to the policy's after each optimizer step: 0 keeps those of the start
            (`needs.reference`), 1 are the policy's own, between is a moving average.
        told: what it reads.
        skip_tokens: tokens at the start of each completion that are not trained on.
    """

    title = "average"
    adds = (SCORER_LOGPS,)
    episodes = "shows its teacher another prompt"
    rate: float
    told: Told
    skip_tokens: int = 0

    @property
    def averages(self) -> bool:
        """Whether its weights are its own."""
        return 0 < self.rate < 1

    @property
    def holds(self) -> Literal["trained weights"] | None:
        return "trained weights" if self.averages else None

    def refuse(self, recipe: Recipe, method: str, locations: Locations) -> Iterator[NeedsError]:
        if self.averages and recipe.model.dtype != "float32" and not recipe.model.adapted:
            yield NeedsError(
                f"a moving average of {recipe.model.dtype} weights stands still: what an update adds is rounded away",
                where=locations.where(("model", "dtype")),
                hint="set float32, with training.bf16: true for the arithmetic, or method.teacher: start or live",
            )
        if self.rate > 0 and saves_head(recipe.model):
            yield NeedsError(
                "the teacher's distributions are read from the base's head, and the policy has one of its own",
                where=locations.where(("model", "peft", "modules_to_save")),
                hint="leave the head out, or set method.teacher: start",
            )


@dataclass(frozen=True, slots=True)
class TargetCritic(Companion):
    """A copy of the critic that follows it, whose values of the same states stand in `batch.further` behind `TARGET`.

    Attributes:
        rate: by which its weights move to the critic's after each optimizer step.
    """

    title = "target critic"
    rate: float

    @property
    def holds(self) -> Literal["weights"]:
        return "weights"


@dataclass(frozen=True, slots=True)
class MaskModel(Companion):
    """A lagging copy of the policy that restricts the tokens that are drawn, and with them `batch.logps` and
    `old_logps`; those over the whole vocabulary are in `batch.further`."""

    title = "mask model"
    adds = (UNMASKED_LOGPS,)
    rule: MaskRule

    @property
    def holds(self) -> Literal["trained weights"]:
        return "trained weights"

    def refuse(self, recipe: Recipe, method: str, locations: Locations) -> Iterator[NeedsError]:
        rollouts = recipe.rollouts
        if rollouts is None:
            return
        if rollouts.engine != "transformers":
            yield NeedsError(
                f"method {method} draws tokens by two models at once, which {rollouts.engine} cannot do",
                where=locations.where(("rollouts", "engine")),
                hint="take engine: transformers",
            )
        if rollouts.stale:
            key = "sync_every" if rollouts.sync_every > 1 else "delay" if rollouts.delay else "replay"
            yield NeedsError(
                f"method {method} masks actions by a model that may have changed since stale rollouts were sampled",
                where=locations.where(("rollouts", key)),
                hint="remove it",
            )


@dataclass(frozen=True, slots=True)
class Divergence(Companion):
    """The policy's next-token distributions against those of the model that scores (`Scorer`, `SelfTeacher`), or of the
    reference where there is none, by a pass of it in every step and in place of its log-probs.

    Attributes:
        between: what is read of the two.
    """

    between: NextTokenDivergence


@dataclass(frozen=True, slots=True)
class ValueHeads(Companion):
    """Several outputs of the critic.

    Attributes:
        number: of them.
        of_rows: (B,) int64, which of them `values` and `old_values` of a row come from. By what the row is, so that the
            head that was read for its advantages is the one that regresses on its returns. None: all of them for every
            row, in `TokenBatch.further` behind `HEAD`, and no `values`.
    """

    number: int
    of_rows: Callable[[TokenBatch], Tensor] | None = None

    @property
    def content(self) -> dict[str, str]:
        return {"value_heads": str(self.number)}


@dataclass(frozen=True, slots=True)
class RowValues(Companion):
    """Numbers of whole completions beside their advantages, which stand in `TokenBatch.further` at every trained token.

    Attributes:
        names: of them there.
        of: makes them of the step's completions, name -> (N,); called on all ranks.
    """

    names: tuple[str, ...]
    of: Callable[[Scored], dict[str, Tensor]]

    @property
    def adds(self) -> tuple[str, ...]:  # type: ignore[override]  # of this one, not of the class
        return self.names


@dataclass(frozen=True, slots=True)
class StepScorer(Companion):
    """A process reward model that scores the steps of completions; it runs as the verifier of that name does.

    Attributes:
        config: of that verifier.
        before: the score before the first step.
    """

    title = "process reward model"
    adds = (STEP_PROGRESS,)
    episodes = "scores the steps of single answers"
    config: ProcessRewardVerifier.Config
    before: float


@dataclass(frozen=True, slots=True)
class CovariantTokens(Companion):
    """Tokens that are drawn, once for a batch of rollouts, among those whose covariance of log-prob and advantage lies
    within bounds.

    Attributes:
        share: of all trained tokens of the rollouts that is drawn, as far as there are so many.
        low, high: the bounds.
    """

    adds = (DROPPED,)
    share: float
    low: float
    high: float
