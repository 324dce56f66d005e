"""A policy on held-out pairs while it is trained: does it prefer what was chosen, and how far has it moved to do so?

Rewards are log-ratios to the policy as the run found it (the start), whatever the method compares: DPO's implicit
reward without its beta. `accuracy_per_token` compares log-probs per token instead, which is SimPO's reward. The unit is
the prompt, as in `pair_accuracy`. The KL to the start is the mean log-ratio of completions that the policy samples for
held-out prompts at temperature 1, scored by trainer and start, never by the engine.

Nothing here draws from a global generator or leaves a trace in the model: a run with this evaluation trains on the same
numbers as one without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.config.mixtures import source_of
from posttrain.config.schema import HeldOutConfig
from posttrain.data.sample import Origin, Sample
from posttrain.evaluation.pair_accuracy import TIE, Mean, PairAccuracy, by_prompt, mean_over_prompts, pair_accuracy
from posttrain.rollouts.engine import Engine, Sampling
from posttrain.safe_files import write_json_atomic

SHOWN = 32
"""Pairs that people may look at, at most."""

RowScorer = Callable[[Sequence[Sample]], list[Tensor]]
"""Samples to their log-probs (T,), 0 outside of the loss mask."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the policy has moved from its start.

    Attributes:
        kl: to the start, in nats per completion; single estimates may be negative.
        length: tokens per completion.
        truncated: share of completions cut at the token limit.
        prompts: number of prompts.
        samples: completions for each.
    """

    kl: Mean
    length: float
    truncated: float
    prompts: int
    samples: int


@dataclass(frozen=True, slots=True)
class Rows:
    """What was measured on each row, so that two runs can be paired (`compare_pairs`).

    Attributes:
        pairs: (P,) hash of the tokens of both responses.
        prompts: (P,) hash of those of the prompt.
        margins: (P,) log-ratio of the chosen minus that of the rejected response, in nats.
        margins_per_token: (P,) log-prob per token of the chosen minus that of the rejected response.
        tie: margins up to it are no preference.
        kl: one mean log-ratio for each prompt that completions were sampled for; empty without.
    """

    pairs: list[str]
    prompts: list[str]
    margins: list[float]
    margins_per_token: list[float]
    tie: float
    kl: list[float]


@dataclass(frozen=True, slots=True)
class HeldOutReport:
    """The policy on held-out pairs, at one step.

    Attributes:
        step: optimizer steps that the policy has done.
        accuracy: of log-ratios to the start.
        accuracy_per_token: of log-probs per token, without a reference.
        margin: log-ratio of the chosen minus that of the rejected response, in nats.
        logps_chosen, logps_rejected: mean log-prob, summed over tokens.
        chosen_shift: log-ratio of the chosen response per token; below 0 it has become less likely.
        length_difference: tokens of the chosen minus those of the rejected response.
        drift: None where no completions are sampled.
        rows: of which all of these are means.
        sources: `accuracy` of the pairs of each source, where there are several.
    """

    step: int
    accuracy: PairAccuracy
    accuracy_per_token: PairAccuracy
    margin: Mean
    logps_chosen: float
    logps_rejected: float
    chosen_shift: float
    length_difference: float
    drift: Drift | None
    rows: Rows
    sources: dict[str, PairAccuracy] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Values under names of the metric registry."""
        values: dict[str, float | None] = {
            "held_out/accuracy": self.accuracy.accuracy.value,
            "held_out/accuracy_low": self.accuracy.accuracy.low,
            "held_out/accuracy_high": self.accuracy.accuracy.high,
            "held_out/ties": self.accuracy.ties / self.accuracy.pairs,
            "held_out/accuracy_per_token": self.accuracy_per_token.accuracy.value,
            "held_out/margin": self.margin.value,
            "held_out/logps_chosen": self.logps_chosen,
            "held_out/logps_rejected": self.logps_rejected,
            "held_out/chosen_shift": self.chosen_shift,
            "held_out/length_difference": self.length_difference,
        }
        for name, found in self.sources.items():
            values[f"source/{name}/held_out/accuracy"] = found.accuracy.value
        if self.drift is not None:
            values |= {
                "held_out/kl": self.drift.kl.value,
                "held_out/kl_low": self.drift.kl.low,
                "held_out/kl_high": self.drift.kl.high,
                "held_out/completion_length": self.drift.length,
                "held_out/truncated_share": self.drift.truncated,
            }
        return {name: value for name, value in values.items() if value is not None}

    def summary(self) -> str:
        """One line for people."""
        right = self.accuracy.accuracy
        text = (
            f"of {self.accuracy.pairs:,} held-out pairs {right.value:.1%} right ({right.low:.1%} to {right.high:.1%}), "
            f"{self.accuracy.ties:,} ties; margin {self.margin.value:.3f} nats, chosen {self.chosen_shift:+.3f} a token"
        )
        if self.drift is None:
            return text
        kl = self.drift.kl
        ends = "" if kl.low is None else f" ({kl.low:.3f} to {kl.high:.3f})"
        return f"{text}; KL to the start {kl.value:.3f}{ends} nats, {self.drift.length:.1f} tokens"

    def save(self, folder: Path) -> None:
        """Write `step-<step>.json` into the folder."""
        write_json_atomic(folder / f"step-{self.step:06d}.json", json.loads(json.dumps(asdict(self))))


class HeldOutPairs:
    """Held-out pairs as token sequences, and what the start says of them.

    Args:
        pairs: role (`chosen`, `rejected`) -> sequence, one per pair; problem ids tell the prompts.
        config: `evaluation.preferences`.
        start: scores by the policy as the run found it; asked once, now.
        seed: of the sampled completions.
        max_new_tokens: their limit.

    Attributes:
        shown: role -> sequence and its (T,) log-probs under the start, of the first pairs, for people to look at.
    """

    def __init__(
        self,
        pairs: Sequence[dict[str, Sample]],
        config: HeldOutConfig,
        start: RowScorer,
        *,
        seed: int,
        max_new_tokens: int,
    ) -> None:
        self.chosen, self.rejected = ([pair[role] for pair in pairs] for role in ("chosen", "rejected"))
        self.config, self.start = config, start
        self.sampling = Sampling(n=config.kl_samples, max_new_tokens=max_new_tokens, seed=seed)
        prompts = {tuple(_prompt(sample)): None for sample in self.chosen}
        self.sources = [source_of(sample.problem_id) for sample in self.chosen]
        self.names = [str(_prompt(sample)) for sample in self.chosen]
        self.prompts = [list(prompt) for prompt in prompts][: config.kl_prompts]
        by_start = [start(samples) for samples in (self.chosen, self.rejected)]
        self.start_logps = [_sums(logps) for logps in by_start]
        responses = zip(self.chosen, self.rejected, *by_start, strict=True)
        self.shown = [
            {"chosen": (chosen, of_chosen), "rejected": (rejected, of_rejected)}
            for chosen, rejected, of_chosen, of_rejected in islice(responses, SHOWN)
        ]
        self.lengths = [np.array([sum(s.loss_mask) for s in samples]) for samples in (self.chosen, self.rejected)]

    def measure(self, step: int, policy: RowScorer, engine: Engine) -> HeldOutReport:
        """The policy as it is now.

        Args:
            step: optimizer steps done.
            policy: scores by the policy.
            engine: samples from the policy.
        """
        chosen, rejected = (_sums(policy(samples)) for samples in (self.chosen, self.rejected))
        ratios = chosen - self.start_logps[0], rejected - self.start_logps[1]
        per_token = chosen / self.lengths[0] - rejected / self.lengths[1]
        margins = list(ratios[0] - ratios[1])
        drift, kl = self._drift(policy, engine) if self.prompts else (None, [])
        return HeldOutReport(
            step=step,
            accuracy=pair_accuracy(margins, self.names),
            sources=self._by_source(margins),
            accuracy_per_token=pair_accuracy(list(per_token), self.names),
            margin=mean_over_prompts(by_prompt(ratios[0] - ratios[1], self.names)),
            logps_chosen=float(chosen.mean()),
            logps_rejected=float(rejected.mean()),
            chosen_shift=float((ratios[0] / self.lengths[0]).mean()),
            length_difference=float((self.lengths[0] - self.lengths[1]).mean()),
            drift=drift,
            rows=Rows(
                pairs=[
                    _hash(one.ids + [-1] + other.ids) for one, other in zip(self.chosen, self.rejected, strict=True)
                ],
                prompts=[_hash(_prompt(sample)) for sample in self.chosen],
                margins=(ratios[0] - ratios[1]).tolist(),
                margins_per_token=per_token.tolist(),
                tie=TIE,
                kl=kl,
            ),
        )

    def _by_source(self, margins: Sequence[float]) -> dict[str, PairAccuracy]:
        names = dict.fromkeys(self.sources)
        if len(names) == 1:
            return {}
        places = {name: [place for place, own in enumerate(self.sources) if own == name] for name in names}
        return {
            name: pair_accuracy([margins[place] for place in own], [self.names[place] for place in own])
            for name, own in places.items()
        }

    def _drift(self, policy: RowScorer, engine: Engine) -> tuple[Drift, list[float]]:
        """Means over prompts, and the mean log-ratio of each."""
        groups = engine.generate(self.prompts, self.sampling)
        samples = [
            Sample(prompt + completion.ids, [0] * len(prompt) + [1] * len(completion.ids), Origin.POLICY)
            for prompt, group in zip(self.prompts, groups, strict=True)
            for completion in group
        ]
        drawn = [completion for group in groups for completion in group]
        ratios = (_sums(policy(samples)) - _sums(self.start(samples))).reshape(len(self.prompts), -1)
        drift = Drift(
            kl=mean_over_prompts(ratios.mean(axis=1)),
            length=sum(len(completion.ids) for completion in drawn) / len(drawn),
            truncated=sum(completion.finish == "length" for completion in drawn) / len(drawn),
            prompts=len(self.prompts),
            samples=self.sampling.n,
        )
        return drift, ratios.mean(axis=1).tolist()


def _prompt(sample: Sample) -> list[int]:
    return sample.ids[: sample.prompt_length]


def _sums(logps: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.stack([values.double().sum() for values in logps]).numpy()


def _hash(ids: Sequence[int]) -> str:
    return sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
