"""Policies and classifiers from a path, from the Hub, or from `model.init`; tokenizers are in `models.tokenizer`.

Safetensors only, no remote code unless asked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from posttrain.config.adapters import resolved
from posttrain.config.positions import config_json
from posttrain.config.schema import ModelConfig
from posttrain.config.stack import require
from posttrain.errors import ModelError, nearest
from posttrain.models import flex_attention
from posttrain.models.adapters import adapter_to_train, merge_adapter, untied_for
from posttrain.models.heads import keep_digits
from posttrain.models.initial import build_classifier, build_model
from posttrain.models.outline import outlining, without_memory
from posttrain.models.sharing import follow_layouts, sharing_obstacle
from posttrain.models.start_files import load_config, other_shape, unloadable
from posttrain.models.tokenizer import check_embeddings, load_tokenizer

# Its bars for loading and saving run into the live console and fill log files.
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _check_activation(config: ModelConfig) -> None:
    """Refuse an activation that transformers does not know, for which it has no message."""
    settings = config_json(config) or {}
    for part in (settings, settings.get("text_config")):
        for key in ("hidden_act", "hidden_activation", "activation_function"):
            name = part.get(key) if isinstance(part, dict) else None
            if name is not None and (not isinstance(name, str) or name not in ACT2FN):
                where = f"{config.path}: config.json"
                raise ModelError(f"{key}: unknown activation {name!r}", where=where, hint=nearest(str(name), ACT2FN))


def load_policy(
    config: ModelConfig, *, seed: int, corpus: Iterable[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready for the adapter that is to be trained and without it; one to start from is merged.

    Dropout stays as the model's config says. Within `outline.outlined` the model has no weights.

    Raises:
        ModelError: the folder or Hub id cannot be loaded; names the nearest folder.
    """
    tokenizer, config = load_tokenizer(config, corpus=corpus), resolved(config)
    if config.init is not None:
        with without_memory():
            model = _build(config, tokenizer, seed)
        return _ready(model, config, tokenizer), tokenizer
    _check_activation(config)
    try:
        kind = AutoModelForCausalLM if config.pictures is None else AutoModelForImageTextToText
        with _converted(config):
            model, info = kind.from_pretrained(config.path, output_loading_info=True, **_how(config))
    # config.json may name packages that are not here
    except (OSError, ValueError, ImportError, RecursionError, SafetensorError) as error:
        raise unloadable(config, error) from error
    _refuse_other_shapes(config, info)
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ModelError(
            f"{config.path!r} lacks {len(missing)} weights of a {type(model).__name__}: {', '.join(missing[:3])}",
            where="model.path",
            hint="take the whole folder of a language model, as it was saved; a classifier has no head for tokens",
        )
    check_embeddings(model.get_input_embeddings().num_embeddings, tokenizer)
    model = _ready(model, config, tokenizer)
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
    tokenizer, config = load_tokenizer(config, corpus=corpus), resolved(config)
    if config.init is not None:
        with without_memory():
            classifier = _build(config, tokenizer, seed, classifier=True)
        if config.pictures is not None:
            _open_eyes(classifier, config, tokenizer)
        return keep_digits(classifier), tokenizer
    config_json(config)
    before, load = transformers_logging.get_verbosity(), _classifiers(config).from_pretrained
    transformers_logging.set_verbosity_error()  # the head that a language model lacks is a warning there
    try:
        with torch.random.fork_rng(devices=[]), _converted(config):
            torch.manual_seed(seed)
            model, info = load(
                config.path, output_loading_info=True, **_labels(config, tokenizer, outputs), **_how(config)
            )
    # config.json may name packages that are not here
    except (OSError, ValueError, ImportError, RecursionError, SafetensorError) as error:
        raise unloadable(config, error) from error
    finally:
        transformers_logging.set_verbosity(before)
    if model.config.num_labels != outputs:
        raise ModelError(
            f"{config.path!r} is a classifier with {_outputs(model.config.num_labels)} and should have {outputs}",
            where="model.path",
            hint="a reward model or value model has one, the critic of a method with several value heads one for each",
        )
    _refuse_other_shapes(config, info)
    missing = sorted(name for name in info["missing_keys"] if name.partition(".")[0] not in HEADS)
    if info["missing_keys"] and not missing and not new_head:
        raise ModelError(
            f"{config.path!r} is no trained sequence classifier: it has no head",
            where="model.path",
            hint="a language model has to be trained as a reward model first: method reward",
        )
    if missing:
        raise ModelError(f"{config.path!r} lacks weights of its backbone: {', '.join(missing[:3])}", where="model.path")
    check_embeddings(model.get_input_embeddings().num_embeddings, tokenizer)
    if config.pictures is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # by which it finds the end of a row
    model = _ready(model, config, tokenizer, classifier=True)
    align(model)
    return keep_digits(model), tokenizer


def _classifiers(config: ModelConfig) -> Any:
    """What loads a classifier."""
    if config.pictures is None:
        return AutoModelForSequenceClassification
    from posttrain.models.picture_classifier import classifier_class

    return classifier_class(load_config(config))


REPORTS = logging.getLogger("transformers.modeling_utils")
"""To which transformers tells what it could not make of the weights of a file; its error does not say it."""

UNCONVERTED = re.compile(r"^(\S.*?) *\|.*CONVERSION", re.MULTILINE)
"""In such a report: a weight of the model that those of the file could not be made into."""

CAUSE = re.compile(r"^\w+Error: (.+)", re.MULTILINE)


@contextmanager
def _converted(config: ModelConfig) -> Iterator[None]:
    """Within the block transformers loads a model, and makes the weights of its class of those in the files: one tensor
    of those of all experts, say.

    Raises:
        ModelError: that cannot be done.
        RuntimeError: there is no memory for it.
    """
    told: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        told.append(text)
        return record.levelno >= shown and "CONVERSION" not in text  # which holds a traceback for each weight

    level, shown = REPORTS.level, REPORTS.getEffectiveLevel()
    REPORTS.addFilter(keep)
    REPORTS.setLevel(min(shown, logging.WARNING))
    try:
        yield
    except RuntimeError as error:
        report = "\n".join(told)
        names, causes = UNCONVERTED.findall(report), CAUSE.findall(report)
        if not names:
            raise
        cause = causes[0] if causes else str(error)
        if "DefaultCPUAllocator" in cause or "out of memory" in cause:
            raise RuntimeError(cause) from error
        raise ModelError(
            f"{config.path!r}: {names[0]} cannot be made of the weights in its files: {cause}",
            where="model.path",
            hint="take config.json and weights from one save of a model",
        ) from error
    finally:
        REPORTS.setLevel(level)
        REPORTS.removeFilter(keep)


HEADS = ("score", "classifier")
"""Names that transformers gives the head of a sequence classifier."""


def _refuse_other_shapes(config: ModelConfig, info: dict[str, Any]) -> None:
    for name, found, needed in sorted(info["mismatched_keys"]):
        raise other_shape(str(config.path), name, found, needed)


def _outputs(number: int) -> str:
    return f"{number} output{'' if number == 1 else 's'}"


def _labels(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, outputs: int) -> dict[str, int]:
    """How many outputs, unless the model is a classifier already, and the id by which it finds the end of a row."""
    known = load_config(config)
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
        "ignore_mismatched_sizes": True,  # they are in what loading tells, and refused by name
        **({"device_map": {"": "meta"}} if outlining() else {}),
        **chosen,
        **_quantised(config),
    }


def _quantised(config: ModelConfig) -> dict[str, Any]:
    given = config.quantization
    if given is None:
        return {}
    require("quantized", "bitsandbytes")
    if given.bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=given.type,
            bnb_4bit_use_double_quant=given.double,
            bnb_4bit_compute_dtype=DTYPES[given.compute_dtype or config.dtype],
        )
    }


def _build(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int, *, classifier: bool = False
) -> PreTrainedModel:
    """What `model.init` says, with a tower where the model reads pictures."""
    how: dict[str, Any] = {"seed": seed, "dtype": DTYPES[config.dtype]}
    if config.pictures is None:
        return (build_classifier if classifier else build_model)(config.init, tokenizer, **how)
    from posttrain.models.tower import build_with_tower

    return build_with_tower(config.init, config.pictures.init, tokenizer, classifier=classifier, **how)


def _ready(
    model: PreTrainedModel,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    classifier: bool = False,
) -> PreTrainedModel:
    """The model with the adapter to start from merged, and fit for the one to train, and for pictures where it reads
    them."""
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has loaded its base beneath it
        raise ModelError(
            f"{config.path!r} is an adapter on the Hub",
            where="model.path",
            hint="download it (`hf download`), and start from that folder",
        )
    for module in model.modules() if config.quantization is not None else ():
        # On CPUs with bfloat16 instructions bitsandbytes lays 4-bit weights out anew at the first pass without a
        # gradient and rounds its products to bfloat16; who reads the weights afterwards, to train or save, misreads.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if config.adapter is not None and config.adapter.mode == "merge":
        model = merge_adapter(model, Path(config.adapter.path).expanduser())
    if config.pictures is not None:
        _open_eyes(model, config, tokenizer)
    trained = adapter_to_train(config, classifier=classifier)
    return model if trained is None else untied_for(model, trained)


def _open_eyes(model: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    from posttrain.models.eyes import open_eyes

    assert config.pictures is not None
    open_eyes(model, tokenizer.pictures, tokenizer.pad_token_id, config.pictures.train)


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
