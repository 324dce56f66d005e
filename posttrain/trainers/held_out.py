"""Held-out pairs in a preference run: who scores them, and by which policy as it was at the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.config.schema import Recipe
from posttrain.data.preparation import fit_preferences
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Preference, Sample
from posttrain.evaluation.preferences import HeldOutPairs, HeldOutReport, RowScorer
from posttrain.methods.base import Method, PreferenceMethod
from posttrain.models.adapters import continued
from posttrain.models.collate import collate
from posttrain.models.modes import without_dropout
from posttrain.models.reference import Reference, frozen_copy
from posttrain.models.token_logps import token_logps
from posttrain.trainers.ranks import on_main_rank
from posttrain.trainers.shell import Shell

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids, attention mask, mask), each (B, T), to log-probs (B, T)."""


def start_copy(recipe: Recipe, method: Method, model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of the policy as the run finds it, for the KL; None where nobody asks, or something else keeps the start.

    That is the reference, unless the method refreshes it, or with an adapter the weights below it.
    """
    evaluation = recipe.evaluation
    asked = evaluation is not None and evaluation.preferences is not None and evaluation.preferences.kl_prompts > 0
    refreshed = isinstance(method, PreferenceMethod) and method.refresh_reference
    other = recipe.reference is not None and recipe.reference.path is not None
    kept = recipe.model.adapted or (method.needs.reference and not refreshed and not other)
    return frozen_copy(model) if asked and not kept else None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out pairs of a run.

    Attributes:
        shell: of the run.
        pairs: with the start's scores.
        start: the policy as the run found it; None where it is not asked again.
    """

    shell: Shell
    pairs: HeldOutPairs
    start: Reference | None

    def together(self) -> AbstractContextManager:
        """What all ranks do together so that inside the block one of them may call `measure` alone."""
        copy = None if self.start is None or self.start.without_adapter is not None else self.start.model
        return self.shell.whole_model(*(() if copy is None else (copy,)))

    def measure(self, step: int) -> HeldOutReport:
        """The policy as it is now, after `step` optimizer steps; some of the pairs go into `tokens.jsonl`."""
        scorer = policy_scorer(self.shell)
        report = self.pairs.measure(step, scorer, self.shell.parts.engine)
        self.shell.token_values.write_held_out(step, self.pairs.shown, scorer)
        return report


def build_held_out(shell: Shell, rows: Sequence[Preference], copy: PreTrainedModel | None) -> HeldOut:
    """The pairs with the start's scores, which must be asked for now: the policy has not been trained yet.

    Args:
        shell: bound, before its first step and before a checkpoint is restored.
        rows: held out.
        copy: what `start_copy` gave.
    """
    recipe, renderer = shell.parts.recipe, shell.parts.renderer
    pairs, ledger = fit_preferences(
        recipe, rows, lambda row: _responses(cast(Preference, row), renderer), head_ids=renderer.head_ids, section=None
    )
    shell.parts.tracker.message(f"held-out pairs: {ledger.summary()}")
    start = _start(shell, copy)
    scorer = policy_scorer(shell) if start is None else _scorer(shell, start.token_logps)
    if start is None or start.without_adapter is not None:
        scorer = _by_who_has_the_weights(shell, scorer)
    evaluation = recipe.evaluation
    made = HeldOutPairs(
        pairs,
        evaluation.preferences,
        scorer,
        seed=evaluation.seed,
        max_new_tokens=evaluation.max_new_tokens,
    )
    return HeldOut(shell, made, start)


def _start(shell: Shell, copy: PreTrainedModel | None) -> Reference | None:
    """The policy as the run finds it, to be asked later too; None where it is needed at this moment only."""
    recipe = shell.parts.recipe
    if copy is not None:
        return Reference(shell.prepare_frozen(copy))
    if recipe.evaluation.preferences.kl_prompts == 0:
        return None
    if recipe.model.adapted:
        if continued(recipe.model) is not None:
            return shell.start_of_adapter()
        policy = shell.accelerator.unwrap_model(shell.model)
        return Reference(policy, without_adapter=policy.disable_adapter)
    return shell.parts.reference


def policy_scorer(shell: Shell) -> RowScorer:
    """Scores by the policy as it is at the moment of each call."""

    @torch.no_grad()
    def logps(ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        model = shell.accelerator.unwrap_model(shell.model)
        with without_dropout(model):
            return token_logps(model, ids, attention_mask, mask)[0]

    return _scorer(shell, logps)


def _by_who_has_the_weights(shell: Shell, scorer: RowScorer) -> RowScorer:
    """Scores by the policy itself, which the main rank has alone before it is taken apart; it then scores for all."""

    def score(samples: Sequence[Sample]) -> list[Tensor]:
        if not shell.whole_on_main_rank:
            return scorer(samples)
        return on_main_rank(PartialState(), lambda: scorer(samples))

    return score


def _scorer(shell: Shell, logps: TokenLogps) -> RowScorer:
    """In batches of a micro-batch's size, sequences of similar length together."""

    def score(samples: Sequence[Sample]) -> list[Tensor]:
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i].ids), i))
        found: dict[int, Tensor] = {}
        size = shell.args.per_device_train_batch_size
        for batch in (order[start : start + size] for start in range(0, len(order), size)):
            tensors = collate([samples[i] for i in batch], shell.parts.pad_id)
            inputs = (tensors[name].to(shell.accelerator.device) for name in ("ids", "attention_mask", "mask"))
            with shell.accelerator.autocast():
                scored = logps(*inputs).cpu()
            found |= {i: row[: len(samples[i].ids)] for i, row in zip(batch, scored, strict=True)}
        return [found[i] for i in range(len(samples))]

    return score


def _responses(row: Preference, renderer: Renderer) -> dict[str, Sample]:
    return {
        "chosen": renderer.sample(Example(row.problem, row.chosen)),
        "rejected": renderer.sample(Example(row.problem, row.rejected)),
    }
