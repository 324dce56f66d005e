"""The scoring forward of a causal LM, in three ways, each of which a model is proven for before it is used.

From the fastest to the plainest: without padding and with shared prompts once (`packed`), plain rows up to the last
scored token (`rows`), and the model's own logits (`logits`). The first two read the trunk's hidden states and apply the
LM head to scored places only, so they are right where nothing but the head, a factor and a soft cap lie between the
two. `models.proof` finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models import attention, router
from posttrain.models.full_divergence import ReferenceStates, head_logps, scores_and_divergence
from posttrain.models.masked_head import allowed_bits, masked_score
from posttrain.models.modes import without_dropout
from posttrain.models.scored_head import LogitMap, Scores, score
from posttrain.models.shared_prefix import Costs, plan
from posttrain.models.sharing import flexes
from posttrain.objectives.action_mask import ActionMask
from posttrain.objectives.next_token import NextTokenDivergence

Way = Literal["packed", "rows", "logits"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a scoring call asks for; `mask` (B, T) bool, True on scored tokens, `attending` (B, T) on real ones; the
    `divergence` is that from `reference`."""

    mask: Tensor
    attending: Tensor
    entropy: bool = False
    top1: bool = False
    logps: bool = True
    values: bool = False
    action_mask: ActionMask | None = None
    reference: ReferenceStates | None = None
    divergence: NextTokenDivergence | None = None
    states: bool = False


Found = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, ReferenceStates | None]
"""Log-probs, entropies, top-1, values, divergences, states."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a model scores.

    Attributes:
        way: see the module.
        forward: the model's own forward, called with the model.
        temperature: what logits are divided by.
        costs: of a pass, for the plan; None for those of the model and its device.
    """

    way: Way
    forward: Callable[..., Any]
    temperature: float = 1.0
    costs: Costs | None = None

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, wanted: Wanted) -> Found:
        """The scores of rows (B, T) on the model's device."""
        run = _own_logits if self.way == "logits" else _trunk_and_head
        return run(self, model, input_ids, wanted)


def trunk(model: PreTrainedModel) -> nn.Module | None:
    """The part of a causal LM that gives hidden states; None if it is not found.

    The text part of a wrapper of several modalities has a trunk of another name than its weights begin with, so it is
    looked for by the embeddings that it holds.
    """
    if model.base_model is not model:
        return model.base_model
    table = model.get_input_embeddings()
    holders = (part for part in model.children() if part is not table and any(m is table for m in part.modules()))
    return next(holders, None)


# ------------------------------------------------------------------------------------------------- trunk, then head


def _trunk_and_head(scoring: Scoring, model: PreTrainedModel, input_ids: Tensor, wanted: Wanted) -> Found:
    device, config = input_ids.device, model.config.get_text_config()
    logit_map = LogitMap.of(config, scoring.temperature)
    critic = model.critic if wanted.values else None
    share = scoring.way == "packed" and (critic is None or critic.shares)
    costs = scoring.costs or Costs.of(config, device, flex=flexes(model))
    passes = plan(input_ids.cpu(), wanted.mask.cpu(), costs, layouts=share, device=device)
    flat = input_ids.flatten()
    arguments: dict[str, Any] = {"input_ids": flat[passes.source], "use_cache": False}
    if passes.layout is not None:
        arguments |= {"position_ids": passes.positions, "attention_mask": attention.no_mask(device)}
        arguments["layout"] = passes.layout

    def states() -> Tensor:
        output = trunk(model)(**arguments, **router.asked())
        router.keep(output, passes.source.shape, passes.predictors, passes.layout)
        return output.last_hidden_state.flatten(0, 1)[passes.predictors]

    head, targets = model.get_output_embeddings(), flat[passes.targets]
    allowed = None
    if wanted.action_mask is not None:  # before the policy's own pass, whose backward needs its own weights
        allowed = _allowed(model, wanted.action_mask, head, states, targets, logit_map)
    hidden = None
    if wanted.logps or wanted.states or not critic.separate:
        hidden = states()
    values = None
    found, apart = _scores(head, hidden, targets, passes.targets, logit_map, wanted, allowed)
    if critic is not None:
        values = critic(arguments, passes.predictors, hidden)
    return _aligned(found, apart, values, input_ids, passes.targets, head, hidden, logit_map, wanted)


# -------------------------------------------------------------------------------------------- the model's own logits


def _own_logits(scoring: Scoring, model: PreTrainedModel, input_ids: Tensor, wanted: Wanted) -> Found:
    """Logits take the place of hidden states, and the head is the identity."""
    logit_map, head = LogitMap(scoring.temperature), nn.Identity()
    critic = model.critic if wanted.values else None
    flat, places = input_ids.flatten(), wanted.mask.flatten().nonzero().squeeze(1)
    arguments = {"input_ids": input_ids, "attention_mask": wanted.attending, "use_cache": False}
    kept: list[Tensor] = []

    def states() -> Tensor:
        hook = None
        if critic is not None and not critic.separate:
            hook = _trunk_of(model).register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state))
        try:
            output = scoring.forward(model, **arguments, **router.asked())
            router.keep(output, input_ids.shape, places - 1, None)
            return output.logits.flatten(0, 1)[places - 1]
        finally:
            if hook is not None:
                hook.remove()

    targets, allowed = flat[places], None
    if wanted.action_mask is not None:
        allowed = _allowed(model, wanted.action_mask, head, states, targets, logit_map)
    hidden = values = None
    if wanted.logps or wanted.states or not critic.separate:
        kept.clear()
        hidden = states()
    found, apart = _scores(head, hidden, targets, places, logit_map, wanted, allowed)
    if critic is not None:
        seen = None if critic.separate else kept[-1].flatten(0, 1)[places - 1]
        values = critic(arguments, places - 1, seen)
    return _aligned(found, apart, values, input_ids, places, head, hidden, logit_map, wanted)


def _trunk_of(model: PreTrainedModel) -> nn.Module:
    found = trunk(model)
    if found is None:
        raise ModelError(
            f"models of type {model.config.model_type!r} have no trunk of their own that a critic could share",
            where="critic.trunk",
            hint="set it to separate",
        )
    return found


# ---------------------------------------------------------------------------------------------------------- in common


def _scores(
    head: nn.Module,
    hidden: Tensor | None,
    targets: Tensor,
    places: Tensor,
    logit_map: LogitMap,
    wanted: Wanted,
    allowed: Tensor | None,
) -> tuple[Scores, Tensor | None]:
    """Of the scored tokens `targets`, which stand at `places` among all, and the divergence where it is asked for."""
    if not wanted.logps:
        return Scores(None, None, None), None
    asked = {"entropy": wanted.entropy, "top1": wanted.top1}
    if wanted.reference is not None:
        frozen = replace(wanted.reference, hidden=wanted.reference.hidden.flatten(0, 1)[places])
        return scores_and_divergence(head, hidden, targets, logit_map, frozen, wanted.divergence, **asked)
    if allowed is None:
        return score(head, hidden, targets, logit_map, **asked), None
    return masked_score(head, hidden, targets, allowed, logit_map, **asked), None


@torch.no_grad()
def _allowed(
    model: PreTrainedModel,
    mask: ActionMask,
    head: nn.Module,
    states: Callable[[], Tensor],
    targets: Tensor,
    logit_map: LogitMap,
) -> Tensor:
    """The allowed tokens of every scored one as bits, by a pass of the mask model."""
    with without_dropout(model), mask.in_place():
        return allowed_bits(head, states(), targets, logit_map, mask)


def _aligned(
    found: Scores,
    apart: Tensor | None,
    values: Tensor | None,
    input_ids: Tensor,
    targets: Tensor,
    head: nn.Module,
    hidden: Tensor | None,
    logit_map: LogitMap,
    wanted: Wanted,
) -> Found:
    """What was found of the N scored tokens at `targets`, put where they stand among the rows (B, T)."""
    shape = input_ids.shape

    def aligned(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        spread = part.new_zeros(shape.numel(), *part.shape[1:]).index_copy(0, targets, part)
        return spread.view(*shape, *part.shape[1:])

    states = None
    if wanted.states:
        states = ReferenceStates(aligned(hidden), head_logps(head, logit_map))
    several = values is not None and values.dim() == 2
    values = torch.stack([aligned(part) for part in values]) if several else aligned(values)
    return aligned(found.logps), aligned(found.entropies), aligned(found.top1), values, aligned(apart), states
