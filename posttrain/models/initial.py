"""Small models with random weights, from a recipe's `model.init`: work without a download."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from posttrain.config.schema import ModelInit

CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def build_model(
    config: ModelInit, tokenizer: PreTrainedTokenizerFast, *, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """A model with random weights; the same weights for the same seed, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(text_config(config, tokenizer), dtype=dtype)


def build_classifier(
    config: ModelInit, tokenizer: PreTrainedTokenizerFast, *, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """As `build_model`, a sequence classifier with one output."""
    model_config = text_config(config, tokenizer)
    model_config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(model_config, dtype=dtype)


def text_config(config: ModelInit, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The config of a text model."""
    return CONFIGS[config.architecture](
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or 3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
