"""Terms that add up: an advantage made of several signals, each with its weight and schedule, its bound and its rows.

| signal | advantage of a token |
| --- | --- |
| `outcome` | the method's own: the reward against the rest of its group; the outcome alone beside `shaping` |
| `shaping` | the same of what shaping verifiers add to the outcome |
| `teacher` | log p(y) - log q(y) under a frozen teacher (`objectives.distillation`) |
| `process` | what the token's step has changed in the score of a process reward model (`objectives.process`) |
| `entropy` | -log q(y) less its expectation, whose policy gradient is that of the entropy (`objectives.exploration`) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Companion
from posttrain.config.relative_paths import ModelPath
from posttrain.config.schema import Section
from posttrain.config.teacher_server import TeacherServer
from posttrain.data.sample import Origin
from posttrain.lazy import Tensor, torch
from posttrain.methods.companions import SCORER_LOGPS, STEP_PROGRESS, RowValues, Scorer, ServedScorer, StepScorer
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.distillation import teacher_advantages
from posttrain.objectives.expert import mixing_weight
from posttrain.objectives.exploration import entropy_advantages
from posttrain.objectives.policy_gradient import per_token
from posttrain.verifiers.process_reward import ProcessRewardVerifier

if TYPE_CHECKING:
    from posttrain.methods.base import Scored

Rows = Literal["all", "right", "wrong", "prefixed", "whole"]

SHAPING, ROWS = "shaping", "rows/"
"""Names in `TokenBatch.further`: the advantages of that signal, and behind the other with a signal's name 1 in rows
that it is for, else 0."""


class TermConfig(Section):
    weight: float = Field(1.0, ge=0, description="factor of the term, after `decay_steps`")
    start_weight: float | None = Field(None, ge=0, description="factor in the first step; default: weight")
    decay_steps: int = Field(0, ge=0, description="optimizer steps from start_weight to weight, by a cosine")
    clip: float | None = Field(None, gt=0, description="bound on its advantages, either way; default: none")
    rows: Rows = Field(
        "all", description="completions that it is for: by verdict (right, wrong), or by start (prefixed, whole)"
    )

    @model_validator(mode="after")
    def _scheduled(self) -> TermConfig:
        if (self.start_weight is None) != (self.decay_steps == 0):
            raise ValueError("start_weight and decay_steps go together")
        return self

    def at(self, step: int) -> float:
        """Its weight in an optimizer step, from 0."""
        if self.start_weight is None:
            return self.weight
        return mixing_weight(step, 0, self.decay_steps, self.start_weight, self.weight)


class TeacherTerm(TermConfig):
    path: ModelPath = Field(description="folder or Hub id of the teacher; the policy's vocabulary")
    server: TeacherServer | None = Field(
        None, description="has the teacher's weights; of `path` tokenizer and config.json are then read"
    )
    discount: float = Field(0.0, ge=0, le=1, description="of later tokens' log-ratios")

    @property
    def scorer(self) -> Scorer | ServedScorer:
        """What grades the tokens."""
        if self.server is None:
            return Scorer(self.path)
        return ServedScorer(self.path, self.server, key="method.terms.teacher.server")


class ProcessTerm(TermConfig):
    path: str = Field(description="folder or Hub id of a process reward model, as method prm trains it")
    separator: str = Field("\n", min_length=1, description="text between two steps, as in its training")
    before: float = Field(1.0, ge=0, le=1, description="score before the first step, where nothing is wrong yet")
    max_length: int = Field(2048, ge=8, description="its tokens of prompt and completion; longer ones lose their start")


class TermsConfig(Section):
    """At least one signal."""

    mix: Literal["loss", "advantage"] = Field(
        "loss", description="each its own surrogate, clip and mean over its rows; or one of the weighted sum over all"
    )
    outcome: TermConfig | None = None
    shaping: TermConfig | None = None
    teacher: TeacherTerm | None = None
    process: ProcessTerm | None = None
    entropy: TermConfig | None = None

    @model_validator(mode="after")
    def _some(self) -> TermsConfig:
        if not self.given:
            raise ValueError("give at least one of outcome, shaping, teacher, process, entropy")
        return self

    @property
    def given(self) -> dict[str, TermConfig]:
        """Signal to its section."""
        named = {name: getattr(self, name) for name in ("outcome", "shaping", "teacher", "process", "entropy")}
        return {name: term for name, term in named.items() if term is not None}

    @property
    def compares(self) -> bool:
        """Whether completions of a prompt are compared with each other."""
        return self.outcome is not None or self.shaping is not None

    @property
    def judged(self) -> bool:
        """Whether a verifier is read."""
        return self.compares or any(term.rows in ("right", "wrong") for term in self.given.values())


@dataclass(frozen=True, slots=True)
class Surrogate:
    """What one surrogate is of.

    Attributes:
        weight: its factor in the loss.
        advantages: (B,) or (B, T), without gradient.
        mask: (B, T) bool, the tokens that it is over, which are its count.
        seen: what is logged of it, name -> (sum, count).
    """

    weight: float
    advantages: Tensor
    mask: Tensor
    seen: dict[str, tuple[Tensor, Tensor]]


class Terms:
    """The terms of a method.

    Args:
        config: of the recipe.
        shaping: the advantages (N,) of what shaping verifiers add, by the method's own statistics of groups.
    """

    def __init__(self, config: TermsConfig, shaping: Callable[[Scored], Tensor]) -> None:
        self.config, self._shaping = config, shaping
        self.step = 0

    @property
    def companions(self) -> tuple[Companion, ...]:
        """What the signals need."""
        c, found = self.config, list[Companion]()
        names = [SHAPING] * (c.shaping is not None)
        names += [ROWS + name for name, term in c.given.items() if term.rows != "all"]
        if names:
            found.append(RowValues(tuple(names), self._row_values))
        if c.teacher is not None:
            found.append(c.teacher.scorer)
        if c.process is not None:
            own = {"path": c.process.path, "separator": c.process.separator, "max_length": c.process.max_length}
            found.append(StepScorer(ProcessRewardVerifier.Config.model_validate(own), c.process.before))
        return tuple(found)

    def _row_values(self, scored: Scored) -> dict[str, Tensor]:
        right = scored.known & (scored.outcomes >= 1)
        begun = torch.tensor([kind in (Origin.PREFIX, Origin.RESET) for kind in scored.kinds])
        chosen = {"right": right, "wrong": scored.known & ~right, "prefixed": begun, "whole": ~begun}
        found = {ROWS + n: chosen[t.rows].float() for n, t in self.config.given.items() if t.rows != "all"}
        return found if self.config.shaping is None else found | {SHAPING: self._shaping(scored)}

    def masks(self, batch: TokenBatch) -> dict[str, Tensor]:
        """(B, T) bool of each signal, or of all together where they share one surrogate; without a forward pass."""
        own = {name: self._mask(name, batch) for name in self.config.given}
        return own if self.config.mix == "loss" else {"policy": torch.stack(list(own.values())).any(dim=0)}

    def parts(self, batch: TokenBatch) -> dict[str, Surrogate]:
        """What the loss is made of, with the keys of `masks`."""
        made = {name: self._part(name, term, batch) for name, term in self.config.given.items()}
        if self.config.mix == "loss":
            return made
        total = torch.stack([part.weight * masked(part.advantages, part.mask) for part in made.values()]).sum(dim=0)
        seen = {name: sums for part in made.values() for name, sums in part.seen.items()}
        return {"policy": Surrogate(1.0, total, self.masks(batch)["policy"], seen)}

    def _mask(self, name: str, batch: TokenBatch) -> Tensor:
        return batch.mask & (batch.further.get(ROWS + name, batch.mask) != 0)

    def _part(self, name: str, term: TermConfig, batch: TokenBatch) -> Surrogate:
        mask, weight = self._mask(name, batch), term.at(self.step)
        found = self._signal(name, batch)
        bounded = found if term.clip is None else found.clamp(-term.clip, term.clip)
        tokens, one = mask.sum(), torch.ones(())
        seen = {
            f"terms/{name}_size": (masked(bounded.abs(), mask).sum(), tokens),
            f"terms/{name}_clipped": ((mask & (bounded != found)).sum(), tokens),
            f"terms/{name}_rows": (mask.any(dim=1).sum(), batch.mask.any(dim=1).sum()),
            f"terms/{name}_weight": (weight * one, one),
        }
        return Surrogate(weight, bounded, mask, seen)

    def _signal(self, name: str, batch: TokenBatch) -> Tensor:
        """(B, T)."""
        if name == "outcome":
            assert batch.advantages is not None and batch.logps is not None  # the loss is asked behind the forward
            return per_token(batch.advantages, batch.logps)
        if name == "teacher":
            assert self.config.teacher is not None and batch.logps is not None
            old = batch.logps.detach() if batch.old_logps is None else batch.old_logps
            return teacher_advantages(old, batch.further[SCORER_LOGPS], batch.mask, self.config.teacher.discount)
        if name == "entropy":
            return entropy_advantages(batch.logps, batch.entropies)
        return batch.further[{"shaping": SHAPING, "process": STEP_PROGRESS}[name]]
