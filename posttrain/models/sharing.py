"""Which models can compute a shared prompt once, and how they are made to."""

from __future__ import annotations

from transformers import PreTrainedModel

from posttrain.config.model_types import SHAREABLE, SHAREABLE_PICTURES
from posttrain.models import attention, flex_attention

EYES = "eyes"
"""Attribute of a model that reads pictures (`models.eyes`)."""


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why rows of this model cannot share a prompt's computation; None if they can."""
    config = model.config
    if config.model_type not in (SHAREABLE_PICTURES if hasattr(model, EYES) else SHAREABLE):
        return f"it is not tested for models of type {config.model_type!r}"
    if config._attn_implementation not in ("sdpa", attention.NAME, flex_attention.CHOICE, flex_attention.NAME):
        return f"it is written for sdpa and flex_attention, not {config._attn_implementation!r}"
    text = config.get_text_config()
    if getattr(text, "attention_dropout", 0) or getattr(text, "attn_pdrop", 0):
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
