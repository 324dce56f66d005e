"""Policies and tokenizers from a path, from the Hub, or from `model.init`.

Safetensors only, no remote code unless asked.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from posttrain.config.schema import Lora, ModelConfig
from posttrain.errors import ModelError
from posttrain.models import flex_attention
from posttrain.models.initial import build_classifier, build_model, build_tokenizer
from posttrain.models.token_logps import follow_layouts, sharing_obstacle

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
        model = AutoModelForCausalLM.from_pretrained(config.path, **_how(config))
    except (OSError, ValueError) as error:
        raise _unloadable(config, error) from error
    _check_embeddings(model, tokenizer)
    align(model)
    if config.attn_implementation == flex_attention.CHOICE and sharing_obstacle(model) is None:
        follow_layouts(model)  # also for those who only sample, as transformers' own is hard to run on a CPU
    return model, tokenizer


def load_classifier(
    config: ModelConfig,
    *,
    seed: int,
    corpus: Iterable[str] | None = None,
    new_head: bool = True,
    outputs: int = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with so many outputs and its tokenizer, without an adapter.

    A language model keeps its backbone and gets a new head, random by the seed alone; a reward model keeps its head.
    With `new_head` False only the latter will do. Errors as for `load_policy`.

    Raises:
        ModelError: also a classifier with another number of outputs, or a model whose backbone is not found in the
            weights.
    """
    tokenizer = load_tokenizer(config, corpus=corpus)
    if config.init is not None:
        return build_classifier(config.init, tokenizer, seed=seed, dtype=DTYPES[config.dtype]), tokenizer
    before, load = transformers_logging.get_verbosity(), AutoModelForSequenceClassification.from_pretrained
    transformers_logging.set_verbosity_error()  # the head that a language model lacks is a warning there
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = load(
                config.path, output_loading_info=True, **_labels(config, tokenizer, outputs), **_how(config)
            )
    except (OSError, ValueError) as error:
        raise _unloadable(config, error) from error
    finally:
        transformers_logging.set_verbosity(before)
    if model.config.num_labels != outputs:
        raise ModelError(
            f"{config.path!r} is a classifier with {_outputs(model.config.num_labels)} and should have {outputs}",
            where="model.path",
            hint="a reward model or value model has one, the critic of a method with several value heads one for each",
        )
    missing = sorted(name for name in info["missing_keys"] if name.partition(".")[0] not in HEADS)
    if info["missing_keys"] and not missing and not new_head:
        raise ModelError(
            f"{config.path!r} is no trained sequence classifier: it has no head",
            where="model.path",
            hint="a language model has to be trained as a reward model first: method reward",
        )
    if missing:
        raise ModelError(f"{config.path!r} lacks weights of its backbone: {', '.join(missing[:3])}", where="model.path")
    _check_embeddings(model, tokenizer)
    align(model)
    return model, tokenizer


HEADS = ("score", "classifier")
"""Names that transformers gives the head of a sequence classifier."""


def _outputs(number: int) -> str:
    return f"{number} output{'' if number == 1 else 's'}"


def _labels(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, outputs: int) -> dict[str, int]:
    """How many outputs, unless the model is a classifier already, and the id by which it finds the end of a row."""
    known = AutoConfig.from_pretrained(
        config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    classifies = any("SequenceClassification" in name for name in known.architectures or ())
    return {"pad_token_id": tokenizer.pad_token_id} | ({} if classifies else {"num_labels": outputs})


def _how(config: ModelConfig) -> dict[str, Any]:
    """How weights are loaded."""
    chosen = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    return {
        "revision": config.revision,
        "dtype": DTYPES[config.dtype],
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,
        **chosen,
    }


ALIGNMENT = 64
"""Bytes: where PyTorch puts what it allocates on a CPU."""


def align(model: torch.nn.Module) -> None:
    """Move weights on a CPU to where PyTorch would have put them, in place.

    Weights that are read from a file lie wherever its header ends, and MKL rounds small products by where their
    operands begin. So the same weights would give other bits from another file.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _check_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {embeddings} embeddings", where="model.path"
        )


def lora_config(config: Lora, *, classifier: bool = False):
    """The recipe's adapter as a `peft.LoraConfig`; a classifier's head is trained whole beside it."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha or 2 * config.r,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
    )


def _unloadable(config: ModelConfig, error: Exception) -> ModelError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"cannot load {config.path!r}: {first_line}",
        where="model.path",
        hint="check the id and your access to the Hub, or give a local folder, or `model: {init: ...}`",
    )
