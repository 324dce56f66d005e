"""Shapes of Llama-like decoders and their exact parameter counts, without loading a model."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from typing import Any

from posttrain.config.positions import config_json
from posttrain.config.schema import ModelConfig, ModelInit
from posttrain.config.sights import SightShape, init_sight, sight_shape

SPECIAL_TOKENS = 4
"""Special tokens of a tokenizer made from `model.init`: pad, BOS, EOS, unknown."""

PRINTABLE_TOKENS = len(string.digits + string.ascii_letters + string.punctuation + " \n")
"""Characters of the default alphabet."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and a gated MLP.

    Attributes:
        architecture: llama, qwen2 (bias on q, k, v), qwen3 (norms on q and k) or gemma3 (these, and four norms in
            a layer).
        vocab_size: rows of the embedding matrix.
        head_dim: width of one attention head.
        tied: the output head is the embedding matrix.
        sight: what looks at pictures, of a model that is loaded with it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    sight: SightShape | None = None

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear modules of one layer: name to (inputs, outputs)."""
        hidden, query, kv, inner = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: its linears, two norms, and the biases or head norms of its architecture."""
        extra = {
            "qwen2": self.query_size + 2 * self.kv_size,
            "qwen3": 2 * self.head_dim,
            "gemma3": 2 * self.head_dim + 2 * self.hidden_size,
        }
        weights = sum(inputs * outputs for inputs, outputs in self.linears.values())
        return weights + 2 * self.hidden_size + extra.get(self.architecture, 0)

    @property
    def whole(self) -> int:
        """Parameters with those that look at pictures."""
        return self.parameters + (0 if self.sight is None else self.sight.parameters)

    @property
    def parameters(self) -> int:
        """Parameters of the language model: layers, embedding, final norm, and the head unless it is tied."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden_size

    def lora_parameters(self, r: int, target_modules: list[str] | str) -> int:
        """r * (inputs + outputs) for each adapted linear of every layer; `all-linear` leaves the head out."""
        # PEFT matches the end of a module's dotted name.
        names = self.linears if target_modules == "all-linear" else {name.split(".")[-1] for name in target_modules}
        adapted = [size for name, size in self.linears.items() if name in names]
        return self.layers * sum(r * (inputs + outputs) for inputs, outputs in adapted)


def _qwen2(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int = 151936, tied: bool = True
) -> ModelShape:
    return ModelShape("qwen2", vocab, hidden, inner, layers, heads, kv, hidden // heads, tied)


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool = True) -> ModelShape:
    return ModelShape("qwen3", 151936, hidden, inner, layers, heads, 8, 128, tied)


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int = 128256, tied: bool = True
) -> ModelShape:
    return ModelShape("llama", vocab, hidden, inner, layers, heads, kv, hidden // heads, tied)


_QWEN25_05B = _qwen2(896, 4864, 24, 14, 2)
_QWEN25_15B = _qwen2(1536, 8960, 28, 12, 2)
_QWEN25_3B = _qwen2(2048, 11008, 36, 16, 2)
_QWEN25_7B = _qwen2(3584, 18944, 28, 28, 4, vocab=152064, tied=False)
_QWEN3_06B = _qwen3(1024, 3072, 28, 16)
_QWEN3_17B = _qwen3(2048, 6144, 28, 16)
_QWEN3_4B = _qwen3(2560, 9728, 36, 32)
_QWEN3_8B = _qwen3(4096, 12288, 36, 32, tied=False)
_LLAMA32_1B = _llama(2048, 8192, 16, 32, 8)
_LLAMA32_3B = _llama(3072, 8192, 28, 24, 8)
_LLAMA31_8B = _llama(4096, 14336, 32, 32, 8, tied=False)
_SMOLLM2_135M = _llama(576, 1536, 30, 9, 3, vocab=49152)
_SMOLLM2_360M = _llama(960, 2560, 32, 15, 5, vocab=49152)
_SMOLLM2_17B = _llama(2048, 8192, 24, 32, 32, vocab=49152)

PUBLIC_SHAPES: dict[str, ModelShape] = {
    "Qwen/Qwen2.5-0.5B": _QWEN25_05B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN25_05B,
    "Qwen/Qwen2.5-1.5B": _QWEN25_15B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN25_15B,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN25_15B,
    "Qwen/Qwen2.5-Math-1.5B-Instruct": _QWEN25_15B,
    "Qwen/Qwen2.5-3B": _QWEN25_3B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN25_3B,
    "Qwen/Qwen2.5-7B": _QWEN25_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN25_7B,
    "Qwen/Qwen2.5-Math-7B": _QWEN25_7B,
    "Qwen/Qwen2.5-Math-7B-Instruct": _QWEN25_7B,
    "Qwen/Qwen3-0.6B": _QWEN3_06B,
    "Qwen/Qwen3-0.6B-Base": _QWEN3_06B,
    "Qwen/Qwen3-1.7B": _QWEN3_17B,
    "Qwen/Qwen3-1.7B-Base": _QWEN3_17B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen3-4B-Base": _QWEN3_4B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-8B-Base": _QWEN3_8B,
    "meta-llama/Llama-3.2-1B": _LLAMA32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA32_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA32_3B,
    "meta-llama/Llama-3.1-8B": _LLAMA31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA31_8B,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M": _SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-1.7B": _SMOLLM2_17B,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _SMOLLM2_17B,
}


def model_shape(model: ModelConfig) -> ModelShape | None:
    """The shape of the recipe's model: from `init`, a local folder's config.json, or the table; None if unknown."""
    if model.init is not None:
        made = _init_shape(model.init)
        seeing = model.pictures
        return made if seeing is None else replace(made, sight=init_sight(seeing.init, made.hidden_size))
    config = config_json(model)
    if config is None:
        return PUBLIC_SHAPES.get(str(model.path))
    if model.pictures is None:
        return _config_shape(config)
    tied = config.get("tie_word_embeddings", config.get("model_type") == "gemma3")
    shape = _config_shape({**config, **(config.get("text_config") or {}), "tie_word_embeddings": tied})
    sight = sight_shape(config)
    return None if shape is None or sight is None else replace(shape, sight=sight)


def embedding_rows(model: ModelConfig) -> int | None:
    """Rows of the embedding matrix by the model's config.json or the table; None if unknown, or for `init`."""
    found = config_json(model)
    if found is None:
        shape = PUBLIC_SHAPES.get(str(model.path))
        return None if shape is None else shape.vocab_size
    return (found.get("text_config") or found).get("vocab_size")  # a wrapper of modalities keeps the text's apart


def _init_shape(init: ModelInit) -> ModelShape:
    if init.tokenizer.type == "bpe":
        # An upper bound: a small corpus may not yield that many merges.
        vocab_size = init.tokenizer.vocab_size
    else:
        alphabet = init.tokenizer.alphabet
        vocab_size = SPECIAL_TOKENS + (PRINTABLE_TOKENS if alphabet is None else len(set(alphabet)))
    return ModelShape(
        architecture=init.architecture,
        vocab_size=vocab_size,
        hidden_size=init.hidden_size,
        intermediate_size=init.intermediate_size or 3 * init.hidden_size,
        layers=init.layers,
        heads=init.heads,
        kv_heads=init.kv_heads or init.heads,
        head_dim=init.hidden_size // init.heads,
        tied=init.tie_embeddings,
    )


_READ = ("num_attention_heads", "hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers")
"""Fields without which the shape is not known."""


_ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3")},
    "gemma3_text": "gemma3",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""By `model_type`; config files of Qwen2.5-VL may have the text model's sizes in no section of their own."""


def _config_shape(config: dict[str, Any]) -> ModelShape | None:
    """From a Hugging Face config.json; None for architectures that are not known here."""
    architecture = _ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        return None
    if config.get("attention_bias") or config.get("mlp_bias"):
        return None
    if any(not isinstance(config.get(key), int) for key in _READ):
        return None
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    # What the architecture's config class assumes where the file leaves a key out.
    head_dim = config.get("head_dim") or {"qwen3": 128, "gemma3": 256}.get(architecture, hidden // heads)
    return ModelShape(
        architecture=architecture,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
