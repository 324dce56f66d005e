"""Small models with random weights and tokenizers made here, from a recipe's `model.init`: work without a download."""

from __future__ import annotations

import string
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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

from posttrain.config.schema import ModelInit, TokenizerInit
from posttrain.errors import ModelError

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Ids 0 to 3 of every tokenizer made here."""

PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \n"

CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def build_tokenizer(config: TokenizerInit, corpus: Iterable[str] | None) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template; neither BOS nor EOS is added to text.

    Args:
        corpus: texts that a BPE vocabulary is learnt from; a character tokenizer ignores it.

    Raises:
        ModelError: a BPE vocabulary is asked for without a corpus.
    """
    backend = _character_backend(config) if config.type == "characters" else _bpe_backend(config, corpus)
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _character_backend(config: TokenizerInit) -> Tokenizer:
    characters = dict.fromkeys(PRINTABLE if config.alphabet is None else config.alphabet)
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _bpe_backend(config: TokenizerInit, corpus: Iterable[str] | None) -> Tokenizer:
    if corpus is None:
        raise ModelError(
            "a bpe tokenizer is learnt from the recipe's data, and there is none here",
            where="model.init.tokenizer",
            hint="give `data.prompts` or `data.completions`, or use `type: characters`",
        )
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return backend


def build_model(
    config: ModelInit, tokenizer: PreTrainedTokenizerFast, *, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """A model with random weights; the same weights for the same seed, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(_model_config(config, tokenizer), dtype=dtype)


def build_classifier(
    config: ModelInit, tokenizer: PreTrainedTokenizerFast, *, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """As `build_model`, a sequence classifier with one output."""
    model_config = _model_config(config, tokenizer)
    model_config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(model_config, dtype=dtype)


def _model_config(config: ModelInit, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
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
