"""Log-probs of tokens from a causal LM: only the positions that are asked for, shared prompts once, no padding.

`prepare` gives a model the way to do it; `token_logps` asks for it through whatever wraps the model (DDP, DeepSpeed,
PEFT), so that their hooks run. Exact up to rounding; see docs/design/0003-shared-prefix.md.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.models import attention, flex_attention
from posttrain.models.full_kl import ReferenceStates, full_kl, head_logps
from posttrain.models.masked_head import allowed_bits, masked_score
from posttrain.models.scored_head import LogitMap, Scores, score
from posttrain.models.shared_prefix import Costs, Plan, plan
from posttrain.objectives.action_mask import ActionMask

SHAREABLE = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2"}
    | {"qwen3", "smollm3", "starcoder2"}
)
"""Model types (`config.model_type`) for which sharing is tested to be exact. Others run plain rows."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a scoring call asks for; `mask` (B, T) is nonzero on scored tokens."""

    mask: Tensor
    entropy: bool = False
    top1: bool = False
    logps: bool = True
    values: bool = False
    action_mask: ActionMask | None = None
    reference: ReferenceStates | None = None
    states: bool = False


def prepare(model: PreTrainedModel, *, temperature: float = 1.0) -> bool:
    """Let `token_logps` use a model; calls without it are untouched.

    Args:
        model: the causal LM itself, not what wraps it; with PEFT the base model.
        temperature: what logits are divided by, as in the engine that samples.

    Returns:
        Whether its passes are packed: without padding, and with shared prompts once.
    """
    obstacle = sharing_obstacle(model)
    if obstacle is None:
        follow_layouts(model)
    else:
        _say_once(f"no shared prompts in training: {obstacle}; every row is computed whole")
    logit_map = LogitMap.of(model.config.get_text_config(), temperature)
    plain = model.forward.__func__

    @functools.wraps(type(model).forward)  # generation checks its arguments against the signature
    def forward(self: PreTrainedModel, *args: Any, wanted: _Wanted | None = None, **kwargs: Any) -> Any:
        if wanted is None:
            return plain(self, *args, **kwargs)
        # A wrapper (PEFT) adds arguments that nobody gave, all None.
        return _score(self, kwargs["input_ids"], wanted=wanted, logit_map=logit_map, share=obstacle is None)

    model.forward = MethodType(forward, model)
    return obstacle is None


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why rows of this model cannot share a prompt's computation; None if they can."""
    config = model.config
    if config.model_type not in SHAREABLE:
        return f"it is not tested for models of type {config.model_type!r}"
    if config._attn_implementation not in ("sdpa", attention.NAME, flex_attention.CHOICE, flex_attention.NAME):
        return f"it is written for sdpa and flex_attention, not {config._attn_implementation!r}"
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return "the model has dropout in its attention"
    return None


def follow_layouts(model: PreTrainedModel) -> None:
    """Attention that follows a layout, by SDPA or FlexAttention, whichever the model has. For models without a
    `sharing_obstacle`."""
    if flexes(model):
        model.set_attn_implementation(flex_attention.NAME)
        return
    attention.flash_is_usable()  # now: its trial within a checkpointed layer would count as a part of it
    model.set_attn_implementation(attention.NAME)


def flexes(model: PreTrainedModel) -> bool:
    """Whether the model's attention is FlexAttention."""
    return model.config._attn_implementation in (flex_attention.CHOICE, flex_attention.NAME)


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def token_logps(
    model: torch.nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    *,
    entropy: bool = False,
    top1: bool = False,
    action_mask: ActionMask | None = None,
) -> Scores:
    """Log-probs of the tokens under `mask`, aligned to tokens: [i, t] is that of token t of row i.

    Args:
        model: a model that went through `prepare`, possibly wrapped.
        ids, attention_mask, mask: (B, T) right-padded; mask[:, 0] must be 0, as nothing predicts the first token.
        entropy: also entropies of the next-token distributions in nats, without gradient.
        top1: also 1 where the token was the likeliest.
        action_mask: all of that for the policy renormalised over the tokens that this mask allows. Costs one more
            forward pass.

    Returns:
        (B, T) each, 0 outside of `mask`; float32, or float64 for such a model.

    Raises:
        ValueError: the rows are padded on the left.
    """
    wanted = _Wanted(mask, entropy, top1, action_mask=action_mask)
    return Scores(*_ask(model, ids, attention_mask, wanted)[:3])


def token_logps_and_values(
    model: torch.nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    *,
    entropy: bool = False,
    top1: bool = False,
    action_mask: ActionMask | None = None,
) -> tuple[Scores, Tensor]:
    """As `token_logps`, and the values of the critic in the model (`models.value.attach`), from the same pass.

    Returns:
        The scores, and values (B, T) with gradient: [i, t] is that of the state before token t of row i; 0 outside of
        `mask`. Those of a critic with several heads are (heads, B, T).
    """
    wanted = _Wanted(mask, entropy, top1, values=True, action_mask=action_mask)
    found = _ask(model, ids, attention_mask, wanted)
    return Scores(*found[:3]), found[3]


def token_logps_and_kl(
    model: torch.nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    reference: ReferenceStates,
    *,
    entropy: bool = False,
    top1: bool = False,
    values: bool = False,
) -> tuple[Scores, Tensor | None, Tensor]:
    """As `token_logps`, with the KL from a reference over the whole vocabulary, from the same pass.

    Args:
        reference: from `token_states`, of the same rows and mask.
        values: also those of the critic.

    Returns:
        The scores; values (B, T) or None; and KL(policy || reference) in nats (B, T) with gradient: [i, t] is that of
        the distributions that token t of row i was drawn from; 0 outside of `mask`.
    """
    wanted = _Wanted(mask, entropy, top1, values=values, reference=reference)
    found = _ask(model, ids, attention_mask, wanted)
    return Scores(*found[:3]), found[3], found[4]


@torch.no_grad()
def token_states(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> ReferenceStates:
    """What `token_logps_and_kl` reads of a reference. Arguments as in `token_logps`."""
    return _ask(model, ids, attention_mask, _Wanted(mask, logps=False, states=True))[5]


def token_values(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """The values alone, as in `token_logps_and_values`."""
    return _ask(model, ids, attention_mask, _Wanted(mask, logps=False, values=True))[3]


def _ask(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, wanted: _Wanted) -> tuple[Any, ...]:
    if not bool(attention_mask[:, 0].all()):
        raise ValueError("rows must be padded on the right")
    return model(input_ids=ids, wanted=wanted)


def _score(
    model: PreTrainedModel, input_ids: Tensor, *, wanted: _Wanted, logit_map: LogitMap, share: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, ReferenceStates | None]:
    """The scoring forward of a prepared model: log-probs, entropies, top-1, values, KL, states."""
    device, shape = input_ids.device, input_ids.shape
    critic = model.critic if wanted.values else None
    share = share and (critic is None or critic.shares)
    costs = Costs.of(model.config.get_text_config(), device, flex=flexes(model))
    passes = plan(input_ids.cpu(), wanted.mask.cpu(), costs, layouts=share, device=device)
    flat = input_ids.flatten()
    arguments: dict[str, Any] = {"input_ids": flat[passes.source], "use_cache": False}
    if passes.layout is not None:
        arguments |= {"position_ids": passes.positions, "attention_mask": attention.no_mask(device)}
        arguments["layout"] = passes.layout
    allowed = None
    if wanted.action_mask is not None:  # before the policy's own pass, whose backward needs its own weights
        allowed = _allowed(model, arguments, passes, flat[passes.targets], logit_map, wanted.action_mask)
    hidden = None
    if wanted.logps or wanted.states or not critic.separate:
        hidden = model.base_model(**arguments).last_hidden_state.flatten(0, 1)[passes.predictors]
    found = Scores(None, None, None)
    if wanted.logps:
        head, targets = model.get_output_embeddings(), flat[passes.targets]
        asked = {"entropy": wanted.entropy, "top1": wanted.top1}
        if allowed is None:
            found = score(head, hidden, targets, logit_map, **asked)
        else:
            found = masked_score(head, hidden, targets, allowed, logit_map, **asked)
    values = None if critic is None else critic(arguments, passes.predictors, hidden)

    def aligned(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        spread = values.new_zeros(shape.numel(), *values.shape[1:]).index_copy(0, passes.targets, values)
        return spread.view(*shape, *values.shape[1:])

    kl = states = None
    if wanted.reference is not None:
        theirs = wanted.reference.hidden.flatten(0, 1)[passes.targets]
        kl = full_kl(model.get_output_embeddings(), hidden, logit_map, wanted.reference.logps, theirs)
    if wanted.states:
        states = ReferenceStates(aligned(hidden), head_logps(model.get_output_embeddings(), logit_map))
    scores = aligned(found.logps), aligned(found.entropies), aligned(found.top1)
    several = values is not None and values.dim() == 2
    values = torch.stack([aligned(head) for head in values]) if several else aligned(values)
    return *scores, values, aligned(kl), states


@torch.no_grad()
def _allowed(
    model: PreTrainedModel,
    arguments: dict[str, Any],
    passes: Plan,
    targets: Tensor,
    logit_map: LogitMap,
    mask: ActionMask,
) -> Tensor:
    """The allowed tokens of every scored one as bits, by a pass of the mask model."""
    was_training = model.training
    model.eval()
    try:
        with mask.in_place():
            hidden = model.base_model(**arguments).last_hidden_state.flatten(0, 1)[passes.predictors]
            return allowed_bits(model.get_output_embeddings(), hidden, targets, logit_map, mask)
    finally:
        model.train(was_training)
