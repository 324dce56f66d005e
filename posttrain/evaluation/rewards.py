"""Implicit and explicit rewards on the same preference pairs, in and out of the distribution they were trained on.

Implicit: beta (log policy - log reference) of a policy trained by DPO. Explicit: a sequence classifier. A pair is used
only if both can read it whole within the limits, so that the two are compared on the same rows (arXiv 2409.03650; the
usual trainers treat over-long rows differently). Beside the implicit reward stand the same per token and what is left
without the reference, and beside both the rule that the longer response is the better one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.config.rewards import RewardsConfig
from posttrain.config.schema import ModelConfig
from posttrain.data.sample import Sample
from posttrain.data.sources import preferences
from posttrain.evaluation.pair_accuracy import (
    LengthControl,
    PairAccuracy,
    compare_accuracies,
    length_control,
    pair_accuracy,
)
from posttrain.evaluation.reward_rows import RewardRows, fit_rewards, loaded
from posttrain.evaluation.reward_scores import Implicit, classifier_scores, response_logps
from posttrain.evaluation.statistics import Interval, PairedTest
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.reference_cache import weights_hash
from posttrain.models.token_logps import prepare
from posttrain.safe_files import write_json_atomic
from posttrain.state.environment import environment

SHIFTS = ("id", "prompt", "response")


@dataclass(frozen=True, slots=True)
class RewardAccuracy:
    """One score on one set of pairs.

    Attributes:
        found: its accuracy.
        by_length: apart by which response is longer.
        margin: mean score of chosen minus rejected, in units of the score.
    """

    found: PairAccuracy
    by_length: LengthControl
    margin: float


@dataclass(frozen=True, slots=True)
class RewardSet:
    """All scores on one set of pairs.

    Attributes:
        name: as configured.
        shift: `id`, `prompt` or `response`.
        prompts: number of different prompts.
        rows: what became of the rows.
        scores: name of the score -> its accuracy.
        explicit_minus_implicit: difference of their accuracies with its interval; None without both.
        test: whether it is one.
    """

    name: str
    shift: str
    prompts: int
    rows: dict[str, Any]
    scores: dict[str, RewardAccuracy]
    explicit_minus_implicit: Interval | None = None
    test: PairedTest | None = None


@dataclass(frozen=True, slots=True)
class RewardReport:
    """Reward models on sets of pairs.

    Attributes:
        settings: as configured, defaults included.
        weights: which model -> hash of its weights.
        sets: in-distribution ones first.
        out_of_distribution: score -> mean accuracy over the shifted sets minus that over the others; empty without
            both.
        environment: versions and machine.
    """

    settings: dict[str, Any]
    weights: dict[str, str]
    sets: list[RewardSet]
    out_of_distribution: dict[str, float]
    environment: dict[str, Any] = field(default_factory=environment)

    def save(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_json_atomic(path, asdict(self))


def evaluate_rewards(config: RewardsConfig) -> RewardReport:
    """Score all pairs; one model in memory at a time.

    Raises:
        ModelError: a model that cannot be loaded, or policy and reference with different tokenizers.
        DataError: as for training.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pairs = {
        name: preferences(config.data[name], name)
        for name in sorted(config.data, key=lambda n: SHIFTS.index(config.data[n].shift))
    }
    fitted = fit_rewards(config, pairs)
    weights: dict[str, str] = {}
    scores: dict[str, dict[str, Tensor]] = {name: {} for name in pairs}
    if config.implicit is not None:
        for name, found in _implicit(config, {name: rows.language for name, rows in fitted.items()}, weights).items():
            scores[name] |= found
    if config.explicit is not None:
        for name, found in _explicit(config, {name: rows.classifier for name, rows in fitted.items()}, weights).items():
            scores[name] |= found
    sets = [_set(config, name, fitted[name], scores[name]) for name in pairs]
    return RewardReport(config.model_dump(mode="json"), weights, sets, _out_of_distribution(sets))


# ------------------------------------------------------------------------------------------------------------- scores


def _implicit(
    config: RewardsConfig, sequences: dict[str, list[Sample]], weights: dict[str, str]
) -> dict[str, dict[str, Tensor]]:
    def of(which: str, path: str) -> dict[str, Tensor]:
        how = ModelConfig(path=path, dtype=config.dtype)
        model, tokenizer = loaded(f"implicit.{which}", lambda: load_policy(how, seed=0))
        weights[which] = weights_hash(model)
        prepare(model)
        return _each(sequences, response_logps, _placed(model), tokenizer.pad_token_id, config.batch_size)

    policy = of("policy", config.implicit.policy)
    reference = of("reference", config.implicit.reference)
    found = {}
    for name, samples in sequences.items():
        tokens = torch.tensor([sum(sample.loss_mask) for sample in samples], dtype=torch.float64)
        found[name] = Implicit(policy[name], reference[name], tokens).scores()
    return found


def _explicit(
    config: RewardsConfig, sequences: dict[str, list[Sample]], weights: dict[str, str]
) -> dict[str, dict[str, Tensor]]:
    how = ModelConfig(path=config.explicit.path, dtype=config.dtype)
    model, tokenizer = loaded("explicit.path", lambda: load_classifier(how, seed=0, new_head=False))
    weights["explicit"] = weights_hash(model)
    found = _each(sequences, classifier_scores, _placed(model), tokenizer.pad_token_id, config.batch_size)
    return {name: {"explicit": scores} for name, scores in found.items()}


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _each(
    sequences: dict[str, list[Sample]],
    score: Callable[[PreTrainedModel, Sequence[Sample], int, int], Tensor],
    model: PreTrainedModel,
    pad_id: int,
    batch_size: int,
) -> dict[str, Tensor]:
    return {name: score(model, samples, pad_id, batch_size) for name, samples in sequences.items()}


# --------------------------------------------------------------------------------------------------------- accuracies


def _set(config: RewardsConfig, name: str, rows: RewardRows, scores: dict[str, Tensor]) -> RewardSet:
    lengths = [float(length) for length in rows.lengths]
    margins = {score: _margins(values) for score, values in scores.items()} | {"longer": lengths}
    scale = {"implicit": config.implicit.beta, "implicit per token": config.implicit.beta} if config.implicit else {}
    accuracies = {
        score: RewardAccuracy(
            pair_accuracy(values, rows.prompts),
            length_control(values, rows.lengths, rows.prompts),
            scale.get(score, 1.0) * fmean(values),
        )
        for score, values in margins.items()
    }
    difference, test = None, None
    if "implicit" in margins and "explicit" in margins:
        difference, test = compare_accuracies(margins["implicit"], margins["explicit"], rows.prompts)
    shift, ledger = config.data[name].shift, rows.ledger.to_dict()
    return RewardSet(name, shift, len(set(rows.prompts)), ledger, accuracies, difference, test)


def _margins(scores: Tensor) -> list[float]:
    chosen, rejected = scores.view(2, -1)
    return (chosen - rejected).tolist()


def _out_of_distribution(sets: Sequence[RewardSet]) -> dict[str, float]:
    inside = [one for one in sets if one.shift == "id"]
    outside = [one for one in sets if one.shift != "id"]
    if not inside or not outside:
        return {}

    def mean(group: Sequence[RewardSet], score: str) -> float:
        return fmean(one.scores[score].found.accuracy.value for one in group)

    return {score: mean(outside, score) - mean(inside, score) for score in sets[0].scores}
