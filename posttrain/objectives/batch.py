"""What objectives take and give. Shapes: B sequences, T positions; every tensor is aligned to tokens:
`x[i, t]` belongs to token t of row i, and `logps[i, t] = log p(token t | tokens before t)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from posttrain.lazy import Tensor, torch

Unit = Literal["tokens", "sequences", "pairs", "groups", "steps"]

HEAD, TARGET = "head/", "target/"
"""Names in `TokenBatch.further`, with a number behind: values of a critic's several heads, where the method reads all
of them for every row; and those of the copy of the critic that follows it (`companions.TargetCritic`), without
gradient."""

GUIDED = "guided"
"""Name in `TokenBatch.further` of a mask: tokens that a guide wrote, which are no actions of the policy. Not there
where there are none."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One micro-batch as an objective sees it.

    Attributes:
        mask: (B, T) bool, True on tokens that are trained on.
        logps: (B, T) log-probs under the current policy, with gradient; 0 where mask is 0. None before the forward.
        entropies: (B, T) entropy of the next-token distribution in nats, without gradient; None if nobody reads it.
        old_logps: (B, T) log-probs under the policy that sampled the tokens; None when it is the current policy.
        ref_logps: (B, T) log-probs under the frozen reference; None without one.
        advantages: (B,) or (B, T); None for supervised data.
        max_length: the length limit of completions in tokens, for objectives that divide by it; None without one.
        expert: (B,) bool, True for rows from `data.traces` beside rows that the policy has sampled; None where a method
            takes none. Their advantages, old and reference log-probs mean nothing: see `rollouts` and `experts`.
        scores: outputs of a sequence classifier, with gradient: (B,) of the rows, or (B, T) of the states behind the
            tokens where steps are judged. None for language models and before the forward.
        values: (B, T) values of the states before each token, with gradient; None without a critic and before the
            forward.
        old_values: (B, T) values when the rollouts were scored; None without a critic.
        returns: (B, T) what the critic regresses on; None without a critic or before the shell has estimated them.
        rewards: (B,) rewards of whole rows; None where `advantages` say it all. Of actions that the policy has drawn
            beside traces 1, or 0 where the length limit has cut them.
        steps: (B, T) int64, number of the step that each trained token belongs to, from 0 and without a gap in a row;
            what stands outside of the mask means nothing. None where rows have no steps.
        further: name -> (B, T), what the method's companions add (`methods.companions`), `GUIDED`, and behind `HEAD`
            and `TARGET` the values of several heads.
    """

    mask: Tensor
    logps: Tensor | None = None
    entropies: Tensor | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    advantages: Tensor | None = None
    max_length: int | None = None
    expert: Tensor | None = None
    scores: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    rewards: Tensor | None = None
    steps: Tensor | None = None
    further: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask.dim() != 2 or self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be (B, T) bool, got {self.mask.dtype} of shape {tuple(self.mask.shape)}")
        aligned = ("logps", "entropies", "old_logps", "ref_logps", "values", "old_values", "returns", "steps")
        named = {name: getattr(self, name) for name in aligned} | self.further
        for name, value in named.items():
            if value is not None and value.shape != self.mask.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, mask {tuple(self.mask.shape)}")
        if self.advantages is not None and self.advantages.shape not in (self.mask.shape, self.mask.shape[:1]):
            raise ValueError(f"advantages have shape {tuple(self.advantages.shape)}, mask {tuple(self.mask.shape)}")
        if self.expert is not None and (self.expert.shape != self.mask.shape[:1] or self.expert.dtype != torch.bool):
            raise ValueError(f"expert must be (B,) bool, got {self.expert.dtype} of shape {tuple(self.expert.shape)}")
        if self.scores is not None and self.scores.shape not in (self.mask.shape, self.mask.shape[:1]):
            raise ValueError(f"scores have shape {tuple(self.scores.shape)}, mask {tuple(self.mask.shape)}")

    @property
    def rollouts(self) -> TokenBatch:
        """The rows that the policy sampled; there may be none. Their sums have a gradient all the same."""
        return self if self.expert is None else self.rows(~self.expert)

    @property
    def experts(self) -> TokenBatch:
        """The rows from `data.traces`; there may be none."""
        return self.rows(slice(0, 0) if self.expert is None else self.expert)

    def rows(self, index: slice | Tensor) -> TokenBatch:
        """The same batch with some of its rows."""
        return self.mapped(lambda values: values[index])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The same batch with `change` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, further={name: change(value) for name, value in self.further.items()}, **changed)


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss before normalisation.

    Attributes:
        value: scalar, summed over units of this micro-batch; has a gradient even if no unit is in it.
        unit: what is counted.
        count: scalar tensor, number of units in this micro-batch. The shell divides `value` by the count over all
            micro-steps and ranks; no objective divides by a count of its own micro-batch.
        diagnostics: name -> (sum, count), detached scalars; reduced by the shell as sum of sums over sum of counts.
    """

    value: Tensor
    unit: Unit
    count: Tensor
    diagnostics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """One micro-batch of rows with several responses each, as a preference objective sees it. B rows.

    Attributes:
        responses: role -> (B, T_role) tokens of that response with log-probs; widths differ by role. `chosen` and
            `rejected` for pairs; a method may name others. Empty where a micro-batch holds samples only.
        values: name -> (B,) or (B, K) numbers that the rows carry (scores, margins, rewards).
        samples: completions drawn from the policy in this step for methods that regularise online, N rows apart from
            the B; their `advantages` (N,) hold the method's `online_weights`. None where this micro-batch has none.
    """

    responses: dict[str, TokenBatch]
    values: dict[str, Tensor] = field(default_factory=dict)
    samples: TokenBatch | None = None

    def rows(self, index: slice | Tensor) -> PreferenceBatch:
        """The same batch with some of its rows; `samples` stay."""
        return PreferenceBatch(
            {role: tokens.rows(index) for role, tokens in self.responses.items()},
            {name: value[index] for name, value in self.values.items()},
            self.samples,
        )

    @property
    def usable(self) -> Tensor:
        """(B,) bool: rows in which every response has a trained token. An empty completion says nothing."""
        if not self.responses:
            return torch.zeros(0, dtype=torch.bool)
        lengths = [tokens.mask.sum(dim=1) for tokens in self.responses.values()]
        return torch.stack(lengths).min(dim=0).values > 0
