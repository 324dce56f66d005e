"""Policies and tokenizers from a path, from the Hub, or from `model.init`.

Safetensors only, no remote code unless asked.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from posttrain.config.schema import Lora, ModelConfig
from posttrain.errors import ModelError
from posttrain.models.initial import build_model, build_tokenizer

# Its bars for loading and saving run into the live console and fill log files.
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def looks_local(path: str) -> bool:
    """Whether a model path means a folder on this machine: it exists, or is no `owner/name` or `name` of the Hub."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not folder.exists():
        parent = folder.parent if folder.parent.exists() else Path(".")
        names = sorted(p.name for p in parent.iterdir() if p.is_dir())
        close = difflib.get_close_matches(folder.name, names, n=1)
        hint = f"did you mean {str(parent / close[0])!r}?" if close else "give a folder made by save_pretrained"
        raise ModelError(f"no model folder {path!r}", where="model.path", hint=hint)
    if not (folder / "config.json").exists():
        raise ModelError(
            f"{path!r} holds no config.json, so it is no Hugging Face model folder",
            where="model.path",
            hint="a run's trained model is in its `model` folder",
        )
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{path!r} holds no safetensors weights; pickled weights are not loaded",
            where="model.path",
            hint="convert it with model.save_pretrained(folder, safe_serialization=True)",
        )


def load_tokenizer(
    config: ModelConfig, *, corpus: Iterable[str] | None = None, offline: bool = False
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. A missing pad token becomes the end token (masks never look at token values).

    Args:
        corpus: texts to learn a BPE vocabulary from; only for `model.init` with a bpe tokenizer.
        offline: use local files and the Hub cache only.

    Raises:
        ModelError: missing, or without an end token.
    """
    if config.init is not None:
        return build_tokenizer(config.init.tokenizer, corpus)
    if looks_local(config.path):
        _check_folder(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=offline,
        )
    except (OSError, ValueError) as error:
        raise _unloadable(config, error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.path!r} has no end token, so completions could not stop", where="model.path"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_policy(
    config: ModelConfig, *, seed: int, corpus: Iterable[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, without an adapter (see `lora_config`). Dropout stays as the model's config says.

    Raises:
        ModelError: the folder or Hub id cannot be loaded; names the nearest folder.
    """
    tokenizer = load_tokenizer(config, corpus=corpus)
    if config.init is not None:
        return build_model(config.init, tokenizer, seed=seed, dtype=DTYPES[config.dtype]), tokenizer
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **({} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}),
        )
    except (OSError, ValueError) as error:
        raise _unloadable(config, error) from error
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {embeddings} embeddings", where="model.path"
        )
    return model, tokenizer


def lora_config(config: Lora):
    """The recipe's adapter as a `peft.LoraConfig`."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha or 2 * config.r,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )


def _unloadable(config: ModelConfig, error: Exception) -> ModelError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"cannot load {config.path!r}: {first_line}",
        where="model.path",
        hint="check the id and your access to the Hub, or give a local folder, or `model: {init: ...}`",
    )
