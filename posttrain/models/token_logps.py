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

from posttrain.models import attention
from posttrain.models.scored_head import LogitMap, Scores, score
from posttrain.models.shared_prefix import Costs, plan

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
        attention.flash_is_usable()  # now: its trial within a checkpointed layer would count as a part of it
        model.set_attn_implementation(attention.NAME)
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
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return f"it is written for sdpa attention, not {config._attn_implementation!r}"
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return "the model has dropout in its attention"
    return None


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
) -> Scores:
    """Log-probs of the tokens under `mask`, aligned to tokens: [i, t] is that of token t of row i.

    Args:
        model: a model that went through `prepare`, possibly wrapped.
        ids, attention_mask, mask: (B, T) right-padded; mask[:, 0] must be 0, as nothing predicts the first token.
        entropy: also entropies of the next-token distributions in nats, without gradient.
        top1: also 1 where the token was the likeliest.

    Returns:
        (B, T) each, 0 outside of `mask`; float32, or float64 for such a model.

    Raises:
        ValueError: the rows are padded on the left.
    """
    return Scores(*_ask(model, ids, attention_mask, _Wanted(mask, entropy, top1))[:3])


def token_logps_and_values(
    model: torch.nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    *,
    entropy: bool = False,
    top1: bool = False,
) -> tuple[Scores, Tensor]:
    """As `token_logps`, and the values of the critic in the model (`models.value.attach`), from the same pass.

    Returns:
        The scores, and values (B, T) with gradient: [i, t] is that of the state before token t of row i; 0 outside of
        `mask`.
    """
    *scores, values = _ask(model, ids, attention_mask, _Wanted(mask, entropy, top1, values=True))
    return Scores(*scores), values


def token_values(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """The values alone, as in `token_logps_and_values`."""
    return _ask(model, ids, attention_mask, _Wanted(mask, logps=False, values=True))[3]


def _ask(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, wanted: _Wanted) -> tuple[Any, ...]:
    if not bool(attention_mask[:, 0].all()):
        raise ValueError("rows must be padded on the right")
    return model(input_ids=ids, wanted=wanted)


def _score(
    model: PreTrainedModel, input_ids: Tensor, *, wanted: _Wanted, logit_map: LogitMap, share: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The scoring forward of a prepared model."""
    device, shape = input_ids.device, input_ids.shape
    critic = model.critic if wanted.values else None
    share = share and (critic is None or critic.shares)
    costs = Costs.of(model.config.get_text_config(), device)
    passes = plan(input_ids.cpu(), wanted.mask.cpu(), costs, layouts=share, device=device)
    flat = input_ids.flatten()
    arguments: dict[str, Any] = {"input_ids": flat[passes.source], "use_cache": False}
    if passes.layout is not None:
        arguments |= {"position_ids": passes.positions, "attention_mask": attention.no_mask(device)}
        arguments["layout"] = passes.layout
    hidden = None
    if wanted.logps or not critic.separate:
        hidden = model.base_model(**arguments).last_hidden_state.flatten(0, 1)[passes.predictors]
    found = Scores(None, None, None)
    if wanted.logps:
        head = model.get_output_embeddings()
        found = score(head, hidden, flat[passes.targets], logit_map, entropy=wanted.entropy, top1=wanted.top1)
    values = None if critic is None else critic(arguments, passes.predictors, hidden)

    def aligned(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(shape.numel()).index_copy(0, passes.targets, values).view(shape)

    return aligned(found.logps), aligned(found.entropies), aligned(found.top1), aligned(values)
