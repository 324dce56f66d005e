"""PrefixRL: on-policy RL that starts some rollouts within a correct trace and trains on the continuation only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from numpy.random import Generator
from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.config.patterns import Pattern
from posttrain.data.known_traces import KnownTrace
from posttrain.data.prefixes import CutRule, Prefix, cutter, fixed_cuts
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem
from posttrain.lazy import torch
from posttrain.methods.base import Scored, Start
from posttrain.methods.grpo import GRPO, GRPOConfig


class PrefixRLConfig(GRPOConfig):
    """The policy gradient has all parameters of `grpo`."""

    name: Literal["prefixrl"] = "prefixrl"  # type: ignore[assignment]  # a method of its own
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "none", description="deviation that divides advantages; none: prefixes of any length weigh alike"
    )
    prefixed_share: float = Field(0.75, ge=0, le=1, description="share of rollouts that start with a prefix")
    fraction_low: float = Field(0.4, ge=0, lt=1, description="shortest prefix, as a share of its trace's tokens")
    fraction_high: float = Field(0.8, gt=0, le=1, description="longest prefix, as a share of its trace's tokens")
    cuts_per_problem: int | None = Field(
        3, ge=1, description="prefixes of a problem, cut once; null: a fresh cut for each rollout"
    )
    boundary: Literal["token", "line", "turn"] = Field(
        "token",
        description="where a prefix may end; turn: traces are episodes, whose first turns are played again in the "
        "`environment`",
    )
    separator: str = Field("\n", min_length=1, description="text that ends a line; boundary line only")
    answer_pattern: Pattern | None = Field(
        None, description="where the final answer begins, which no prefix shows; default: the reference as a word"
    )
    cut_seed: int = Field(0, ge=0, description="of the fixed cuts")
    adapt: Literal["none", "success"] = Field(
        "none", description="success: lengthen a problem's prefix where too few continuations succeed, else shorten it"
    )
    target_success: float = Field(0.5, gt=0, lt=1, description="success rate that adapted prefixes aim at")
    adapt_step: float = Field(0.05, gt=0, le=1, description="change of the fraction after each group of rollouts")

    @model_validator(mode="after")
    def _prefixes(self) -> PrefixRLConfig:
        written = self.model_fields_set
        if self.fraction_low > self.fraction_high:
            raise ValueError(f"fraction_low {self.fraction_low} is above fraction_high {self.fraction_high}")
        if self.boundary != "line" and "separator" in written:
            raise ValueError(f"separator has no effect with boundary {self.boundary}: set boundary: line")
        if self.boundary == "turn" and "answer_pattern" in written:
            raise ValueError("answer_pattern has no effect with boundary turn: turns give no answer away")
        if self.adapt == "none" and written & {"target_success", "adapt_step"}:
            raise ValueError("target_success and adapt_step have no effect without adapt: success")
        if self.adapt == "success" and written & {"cuts_per_problem", "cut_seed"}:
            raise ValueError("cuts_per_problem and cut_seed have no effect with adapt: success, whose cuts move")
        if self.adapt == "success" and self.terms is not None and not self.terms.judged:
            raise ValueError("adapt: success reads verdicts, and no term does: add terms.outcome")
        if self.cuts_per_problem is None and "cut_seed" in written:
            raise ValueError("cut_seed has no effect on fresh cuts")
        return self


class PrefixRL(GRPO):
    """GRPO over groups of one (problem, prefix), mixed with groups without prefix.

    Problems without a correct trace, and traces without a place to cut, give rollouts without prefix. Traces that
    nobody verified count as correct: choosing them (`data.traces.keep: all`) says so.
    """

    Config = PrefixRLConfig
    paper = "Reuse your FLOPs: scaling RL on hard problems with very off-policy prefixes, arXiv 2601.18795"
    config: PrefixRLConfig

    def __init__(self, config: PrefixRLConfig) -> None:
        super().__init__(config)
        self.fractions: dict[str, float] = {}
        """Problem id -> fraction of its next prefix, where it is not `fraction_high` (`adapt: success`)."""
        self._fixed: dict[str, list[Prefix]] = {}

    @property
    def needs(self) -> Needs:
        return replace(super().needs, data=("prompts", "traces"))

    @property
    def rule(self) -> CutRule:
        c = self.config
        return CutRule(c.fraction_low, c.fraction_high, c.boundary, c.separator, c.answer_pattern)

    @property
    def replays(self) -> bool:
        return self.config.boundary == "turn"

    def bind(self, renderer: Renderer, seed: int) -> None:
        self._text = renderer.text

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        correct = [trace for trace in traces if trace.outcome in (None, 1.0)]
        if draw.random() >= self.config.prefixed_share or not correct:
            return Start()
        prefix = self._prefix(problem, correct, draw)
        if prefix is None:
            return Start()
        info = {"prefix_tokens": float(len(prefix.ids)), "prefix_fraction": prefix.fraction}
        if prefix.replay is not None:
            return Start(origin=Origin.PREFIX, info=info, replay=prefix.replay)
        return Start(prefix.ids, Origin.PREFIX, info)

    def _prefix(self, problem: Problem, traces: Sequence[KnownTrace], draw: Generator) -> Prefix | None:
        c = self.config
        if c.adapt == "none" and c.cuts_per_problem is not None:
            if problem.id not in self._fixed:
                self._fixed[problem.id] = fixed_cuts(traces, self._text, self.rule, c.cuts_per_problem, c.cut_seed)
            cuts = self._fixed[problem.id]
            return cuts[int(draw.integers(len(cuts)))] if cuts else None
        one = cutter(traces[int(draw.integers(len(traces)))], self._text, self.rule)
        if c.adapt == "none":
            return one.draw(draw)
        return one.at(self.fractions.get(problem.id, c.fraction_high))

    def observe(self, scored: Scored) -> None:
        c = self.config
        if c.adapt == "none":
            return
        prefixed = torch.tensor([kind is Origin.PREFIX for kind in scored.kinds])
        for group in scored.groups[prefixed & scored.known].unique().tolist():
            rows = (scored.groups == group) & scored.known
            success = float(scored.outcomes[rows].mean())
            problem = scored.problem_ids[int(torch.nonzero(rows)[0])]
            change = c.adapt_step * (1 if success < c.target_success else -1 if success > c.target_success else 0)
            fraction = self.fractions.get(problem, c.fraction_high) + change
            self.fractions[problem] = min(max(fraction, c.fraction_low), c.fraction_high)

    def state_dict(self) -> dict[str, Any]:
        return {"fractions": dict(self.fractions)} if self.config.adapt == "success" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fractions = dict(state.get("fractions", {}))
