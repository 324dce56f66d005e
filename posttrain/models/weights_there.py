"""Whether a folder holds every weight that its model needs, by the headers of its files alone.

Imports without torch, so the names come from a table of architectures. It has those whose layers are all alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.adapters import resolved
from posttrain.config.foreign_files import read_header, read_json
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.models.start_files import load_config, other_shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS_OF_LAYER = {
    "gemma": NORMS,
    "gemma2": FOUR_NORMS,
    "gemma3_text": FOUR_NORMS,
    "llama": NORMS,
    "mistral": NORMS,
    "qwen2": NORMS,
    "qwen3": NORMS,
}
"""Of each architecture that is known here."""

HEAD_NORMS = ("gemma3_text", "qwen3")
"""Those that normalise queries and keys."""


def check_weights(model: ModelConfig, *, classifier: bool) -> str | None:
    """Refuse a local folder that lacks a weight, or has one of another shape than its config says.

    Args:
        model: section of the recipe.
        classifier: its head is made anew where the folder has none.

    Returns:
        Why that cannot be said; None if it was, and for what is no local folder.

    Raises:
        ModelError: `train` would refuse the folder when it loads the weights.
    """
    base = resolved(model)
    folder = Path(str(base.path)).expanduser()
    if base.path is None or not folder.is_dir() or base.pictures is not None:
        return None
    config = load_config(base)
    if config.model_type not in NORMS_OF_LAYER or getattr(config, "quantization_config", None) is not None:
        return f"not checked: whether the weights of this {config.model_type!r} model are all there; loading them tells"
    files = _files(folder)
    if not files:
        return f"not checked: whether the weights are all there, since there is no {WEIGHTS}; loading them tells"
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        header = read_header(file)[1]
        found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    needed = dict(needed_weights(config))
    if classifier or config.tie_word_embeddings:
        needed.pop("lm_head.weight", None)
    # A model without a head is saved without the first part of the names.
    full = ("model.", "lm_head.")
    stored = {name if name.startswith(full) else f"model.{name}": shape for name, shape in found.items()}
    if missing := sorted(needed.keys() - stored.keys()):
        raise ModelError(
            f"{base.path!r} lacks {len(missing)} weights of its {config.model_type} model: {', '.join(missing[:3])}",
            where="model.path",
            hint="take the whole folder of a language model, as it was saved; a classifier has no head for tokens",
        )
    for name in sorted(name for name in needed if stored[name] != needed[name]):
        raise other_shape(base.path, name, stored[name], needed[name])
    return None


def needed_weights(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights of a causal model whose architecture is known here.

    Args:
        config: as transformers has it.
    """
    kind, hidden, inner = config.model_type, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    query, kv = heads * size, config.num_key_value_heads * size
    attention = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, query)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    biased = set(attention if getattr(config, "attention_bias", False) else ())
    biased |= set(mlp if getattr(config, "mlp_bias", False) else ())
    biased = {"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else biased
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "lm_head.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}"
        for part, linears in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in linears.items():
                yield f"{place}.{part}.{name}.weight", shape
                if name in biased:
                    yield f"{place}.{part}.{name}.bias", shape[:1]
        for name in NORMS_OF_LAYER[kind]:
            yield f"{place}.{name}.weight", (hidden,)
        for name in ("q_norm", "k_norm") if kind in HEAD_NORMS else ():
            yield f"{place}.self_attn.{name}.weight", (size,)


def _files(folder: Path) -> list[Path]:
    """The files that transformers would load, or none that it is known of."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    index: Mapping[str, Any] = read_json(folder / INDEX).get("weight_map", {})
    return sorted({folder / str(name) for name in index.values()})
