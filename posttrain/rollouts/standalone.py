"""Engines for sampling and evaluation by themselves: no trainer, and weights that stay as they were loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.schema import ModelConfig, ValueSearchConfig, VllmConfig
from posttrain.config.stack import stack
from posttrain.data.rendering import Renderer
from posttrain.models.reference_cache import weights_hash
from posttrain.models.value import load_value_model
from posttrain.rollouts.engine import Engine
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.value_search import ValueSearchEngine, search_engine
from posttrain.rollouts.vllm_engine import ColocatedVllm, load_vllm
from posttrain.rollouts.weight_sync import CANARY_PROMPTS, Canary, PolicyWeights, canary_limit

GPU_SHARE = 0.9
"""Share of a GPU's memory that vLLM takes where no trainer shares it, unless the settings say more."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which engine, as far as the settings say it.

    Attributes:
        name: of the engine.
        model: what is loaded.
        max_batch: sequences that it holds at once.
        vllm: settings of the vllm engine.
        value: value model of a guided search; transformers only.
        restricted: whether top-p or top-k is used and log-probs are read.
    """

    name: Literal["transformers", "vllm"]
    model: ModelConfig
    max_batch: int
    vllm: VllmConfig = VllmConfig()
    value: ValueSearchConfig | None = None
    restricted: bool = False

    def identity(self, policy: PreTrainedModel) -> dict[str, Any]:
        """What samples depend on beside policy and sampling. A path may move, so a value model's weights count.

        Raises:
            ModelError: the value model cannot be loaded or does not fit.
        """
        if self.name != "transformers":
            return {"engine": self.name, "engine_dtype": self.vllm.dtype or self.model.dtype}
        if self.value is None:
            return {}
        vocabulary = policy.get_input_embeddings().num_embeddings
        loaded = load_value_model(self.value.path, like=self.model, vocabulary=vocabulary, where="value.path")
        return {"value": self.value.model_dump(mode="json", exclude={"path"}) | {"weights": weights_hash(loaded)}}

    @property
    def kind(self) -> type[Engine]:
        """Class of the engine."""
        if self.name == "vllm":
            return FixedVllm
        return TransformersEngine if self.value is None else ValueSearchEngine

    def versions(self) -> dict[str, str]:
        """Of the packages that only this engine needs."""
        return {each.name: each.installed or "" for each in stack() if each.name == self.name == "vllm"}

    def require(self) -> None:
        """Before the minutes that loading a model can take. vLLM itself is imported where it is used.

        Raises:
            StackError: the engine is not installed.
        """
        if self.name == "vllm" and importlib.util.find_spec("vllm") is None:
            load_vllm()


@dataclass(frozen=True, slots=True)
class Extent:
    """What an engine of vLLM is sized and checked by.

    Attributes:
        max_length: most tokens of a prompt and its completion.
        canary: prompts whose log-probs are compared with the loaded model's when it starts.
    """

    max_length: int
    canary: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, prompts: Sequence[tuple[list[int], int]], policy: PreTrainedModel, *, grows: bool) -> Extent:
        """For prompts, each with the number of its new tokens.

        Args:
            prompts: all that will be asked.
            policy: says how many positions there are.
            grows: later prompts are longer than these (revisions), so that all positions are needed.
        """
        longest = max(len(ids) + tokens for ids, tokens in prompts)
        positions = getattr(policy.config, "max_position_embeddings", None)
        if positions is not None:
            longest = positions if grows else min(longest, positions)
        return cls(longest, [ids for ids, _ in prompts[:CANARY_PROMPTS]])


class FixedVllm(ColocatedVllm):
    """vLLM with weights that it gets once: when it starts they are copied, checked and let go.

    Args: as of `ColocatedVllm`.

    Raises:
        StackError: vLLM is not installed.
        EngineError: vLLM cannot run this model, or gives other log-probs than the model itself.
    """

    def __init__(self, weights: PolicyWeights, canary: Canary, **settings: Any) -> None:
        super().__init__(weights, canary, **settings)
        try:
            self.sync(0)
        except BaseException:
            self.close()
            raise
        del self.weights, self.canary  # the loaded model takes as much memory as the engine's copy


@dataclass(frozen=True, slots=True)
class _NoTrainer:
    """What `PolicyWeights` asks of an accelerator. A real one is global to the process, and a trainer may follow."""

    device: torch.device = torch.device("cpu")
    mixed_precision: str = "no"

    def autocast(self) -> AbstractContextManager:
        return nullcontext()


def open_engine(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    settings: EngineSettings,
    extent: Extent,
) -> Engine:
    """The engine, ready to sample.

    Args:
        policy: the loaded model. The transformers engine samples from it, on the GPU if there is one; vLLM copies it,
            and may be the only one to hold the weights afterwards.
        tokenizer, renderer: for the ids that pad and end completions.
        settings: which engine.
        extent: sizes vLLM.

    Raises:
        StackError: vLLM is not installed.
        EngineError: vLLM cannot run this model.
        ModelError: the value model cannot be loaded or does not fit.
    """
    policy.requires_grad_(False)
    if settings.name == "transformers":
        policy.to("cuda" if torch.cuda.is_available() else "cpu")
        return search_engine(
            policy,
            settings.model,
            renderer,
            settings.value,
            pad_id=tokenizer.pad_token_id,
            max_batch=settings.max_batch,
        )
    weights, vllm = PolicyWeights(policy, _NoTrainer()), settings.vllm
    dtype = vllm.dtype or settings.model.dtype
    limit = canary_limit(vllm.canary_limit, trainer_float32=weights.computes_in_float32, engine_dtype=dtype)
    share = vllm.gpu_memory_utilization if "gpu_memory_utilization" in vllm.model_fields_set else GPU_SHARE
    return FixedVllm(
        weights,
        Canary(extent.canary, renderer.stop_ids[0], limit),
        stop_ids=renderer.stop_ids,
        dtype=dtype,
        max_length=extent.max_length,
        max_batch=settings.max_batch,
        restricted=settings.restricted,
        kv_cache_bytes=None if vllm.kv_cache_mb is None else vllm.kv_cache_mb << 20,
        gpu_memory_utilization=share,
        enforce_eager=vllm.enforce_eager,
        trust_remote_code=settings.model.trust_remote_code,
    )
