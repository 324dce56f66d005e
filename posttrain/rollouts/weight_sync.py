"""The trainer's weights for an engine that holds a copy of them, and the check that the copy is right.

`PolicyWeights` reads a model as a checkpoint would hold it: names of the plain Hugging Face model, adapters merged,
shards gathered one tensor at a time (ZeRO-3, FSDP2). `Canary` compares log-probs of a few fixed tokens after a sync.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Protocol

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from posttrain.data.sample import Sample
from posttrain.errors import EngineError, NeedsError
from posttrain.models.adapters import adapted_name, plain_name
from posttrain.models.modes import without_dropout
from posttrain.models.sharing import EYES
from posttrain.models.value import NAME as CRITIC

LAYER = re.compile(r".*?\.\d+\.")
"""The part of a name that says in which layer a tensor is."""

CANARY_PROMPTS, CANARY_TOKENS = 4, 64
"""Canary sequences, and the most tokens of one of them."""

COMPARED_ROWS, COMPARED_TOKENS = 8, 128
"""Samples per rank, and tokens of each, on which stale rollouts compare trainer and engine."""

EXACT, ROUNDED = 1e-4, 0.5
"""Default limits in nats for the largest difference on canary tokens: where trainer and engine compute in float32, and
where one of them computes in 16 bits. docs/vllm.md has the measured differences behind them."""


class ScoringEngine(Protocol):
    """An engine that holds a copy of `weights` and gives log-probs under it."""

    weights: PolicyWeights

    def logps(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of all tokens but the first of each sequence, at temperature 1."""
        ...


class PolicyWeights:
    """The current weights of a policy, and its log-probs.

    With several ranks both methods are collective: every rank calls them, and exhausts the iterator.

    Args:
        model: the policy, unwrapped; a PEFT model stands for its merged weights.
        accelerator: of the trainer.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        self.policy: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.config = self.policy.config
        self.adapted = {adapted_name(n, m): m for n, m in self.policy.named_modules() if isinstance(m, LoraLayer)}

    @property
    def computes_in_float32(self) -> bool:
        """Whether the trainer's log-probs carry no 16-bit rounding."""
        return self.accelerator.mixed_precision == "no" and self.policy.dtype == torch.float32

    def named_tensors(self, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name in the plain model, copy of the whole tensor), in the order of the model. A tied head has no entry.

        With `merged` adapters are in the weights that they adapt, else they are left out.
        """
        for name, parameter in self._sent():
            plain = plain_name(name)
            layer = self.adapted.get(plain) if merged else None
            needed = [parameter] if layer is None else [parameter, *_adapter_parameters(layer)]
            with torch.no_grad(), gathered(needed):
                weight = self._unpacked(name, parameter)
                yield plain, weight if layer is None else _merged(weight, layer)

    def _unpacked(self, name: str, parameter: Tensor) -> Tensor:
        """A copy of the whole tensor; of a quantised one in the type of the weights that are not."""
        if not quantised(parameter):
            return whole(parameter)
        module = self.policy.get_submodule(name.rpartition(".")[0])
        return dequantize_module_weight(module).detach().to(self._plain_type(), copy=True)

    def _plain_type(self) -> torch.dtype:
        return next(p.dtype for p in self.policy.parameters() if p.is_floating_point() and not quantised(p))

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the plain model, copy) of what a checkpoint holds beside parameters, such as a router's biases."""
        saved = set(self.policy.state_dict())
        for name, buffer in self.policy.named_buffers():
            if name in saved and ".lora_" not in name and not name.startswith(f"{CRITIC}."):
                yield plain_name(name), whole(buffer)

    def tensors_of_files(self, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as the files of a checkpoint of this architecture have them, which is what engines read: of
        experts that lie in memory as one tensor, for example, each by itself. Parameters, then buffers; a layer's
        tensors are turned back together, as one in the files can be made of several."""
        tensors = chain(self.named_tensors(merged=merged), self.named_buffers())
        if getattr(self.policy, "_weight_conversions", None) == []:  # the files that were loaded have them as they are
            yield from tensors
            return
        for _, layer in groupby(tensors, key=lambda pair: found.group() if (found := LAYER.match(pair[0])) else None):
            for name, tensor in revert_weight_conversion(self.policy, dict(layer)).items():
                yield name, tensor.contiguous()

    def _sent(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.policy.named_parameters():
            if ".lora_" not in name and ".original_module." not in name and not name.startswith(f"{CRITIC}."):
                yield name, parameter

    def sizes(self) -> Iterator[int]:
        """Bytes of each parameter that is sent."""
        for name, parameter in self._sent():
            if quantised(parameter):
                module = self.policy.get_submodule(name.rpartition(".")[0])
                yield module.in_features * module.out_features * self._plain_type().itemsize
            else:
                yield getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()

    @torch.no_grad()
    def logps(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of all tokens but the first of each sequence, at temperature 1, under the model as it trains."""
        with without_dropout(self.model), self.accelerator.autocast():
            return [self._logps(sequence) for sequence in sequences]

    def _logps(self, sequence: Sequence[int]) -> list[float]:
        ids = torch.tensor([sequence], device=self.accelerator.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        eyes = getattr(self.policy, EYES, None)
        named = ids if eyes is None else eyes.named(ids)
        return logits.log_softmax(-1).gather(1, named[0, 1:, None]).squeeze(1).tolist()

    def refuse_tied_adapters(self) -> None:
        """Refuse an adapter that cannot be merged for the engine.

        Raises:
            NeedsError: an adapter on embeddings that are tied to the head, which no merged copy can represent.
        """
        if not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return
        ends = {id(self.policy.get_input_embeddings()), id(self.policy.get_output_embeddings())}
        for name, module in self.adapted.items():
            if id(module) in ends or id(module.get_base_layer()) in ends:
                raise NeedsError(
                    f"an adapter on {name}, which is tied to the other end of the model, cannot be merged for vLLM: "
                    "the two ends would need different weights",
                    where="model.peft.target_modules",
                    hint="leave the embeddings out of target_modules, or take rollouts.engine: transformers",
                )


@dataclass(frozen=True, slots=True)
class CanaryDifference:
    """Absolute differences of trainer and engine log-probs on the canary tokens, in nats."""

    mean: float
    max: float


class Canary:
    """A few fixed token sequences on which engine and trainer must agree after every sync.

    Args:
        prompts: of the run; the first ones serve.
        stop_id: put after each, so that a prompt of one token has a token to score too.
        limit: largest difference allowed, in nats.
        whole: take the prompts as they are, of whatever length: with the end of a picture nothing is seen.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], stop_id: int, limit: float, *, whole: bool = False) -> None:
        read = slice(None) if whole else slice(-(CANARY_TOKENS - 1), None)
        self.sequences = [[*prompt[read], stop_id] for prompt in prompts[:CANARY_PROMPTS]]
        self.limit = limit

    def check(
        self, trainer: Sequence[Sequence[float]], engine: Sequence[Sequence[float]], version: int
    ) -> CanaryDifference:
        """Compare log-probs of the sequences' tokens.

        Raises:
            EngineError: they differ by more than the limit, or one is not finite.
        """
        pairs = [pair for a, b in zip(trainer, engine, strict=True) for pair in zip(a, b, strict=True)]
        differences = [abs(a - b) for a, b in pairs]
        worst = math.inf if any(math.isnan(d) for d in differences) else max(differences)
        if not worst <= self.limit:
            raise EngineError(
                f"weight sync {version}: engine and trainer differ by up to {worst:.3g} nats on {len(pairs)} canary "
                f"tokens (limit {self.limit:g}), so it would not sample from the policy that is trained",
                where="rollouts.vllm",
                hint="another model or type is served, or the sync is wrong for this architecture; take "
                "rollouts.engine: transformers, or raise rollouts.vllm.canary_limit if rounding explains it "
                "(docs/vllm.md)",
            )
        return CanaryDifference(sum(differences) / len(differences), worst)


def engine_differences(engine: ScoringEngine, samples: Sequence[Sample]) -> list[float]:
    """Absolute differences, in nats, of trainer and engine log-probs at equal weights and temperature 1.

    On sampled tokens among the last `COMPARED_TOKENS` of up to `COMPARED_ROWS` samples, read without what stands before
    them, where that is text: engines hold (tokens, vocabulary) values for this. Collective like `PolicyWeights.logps`.
    """
    chosen = samples[:: max(1, len(samples) // COMPARED_ROWS)][:COMPARED_ROWS]
    read = slice(None) if hasattr(engine.weights.policy, EYES) else slice(-COMPARED_TOKENS, None)
    tails = [sample.ids[read] for sample in chosen]
    scored = zip(engine.weights.logps(tails), engine.logps(tails), chosen, strict=True)
    return [
        abs(a - b)
        for ours, theirs, sample in scored
        for a, b, sampled in zip(ours, theirs, sample.loss_mask[read][1:], strict=True)
        if sampled
    ]


def canary_limit(given: float | None, *, trainer_float32: bool, engine_dtype: str) -> float:
    """The recipe's limit, or the default for the types in which the two compute."""
    if given is not None:
        return given
    return EXACT if trainer_float32 and engine_dtype == "float32" else ROUNDED


def whole_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, copy of the whole tensor) of all that a module's state holds; collective, as `named_tensors`."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        with torch.no_grad(), gathered([tensor]):
            yield name, whole(tensor)


# ------------------------------------------------------------------------------------------------------------ helpers


def _adapter_parameters(layer: LoraLayer) -> list[Tensor]:
    return [p for n, p in layer.named_parameters() if n.startswith("lora_")]


def _merged(weight: Tensor, layer: LoraLayer) -> Tensor:
    """Weight plus adapter, computed beside the model: merging in place and back would round its weights."""
    merged = weight.float()
    for adapter in layer.active_adapters:
        merged = merged + whole(layer.get_delta_weight(adapter)).to(merged)  # FSDP2 leaves it sharded
        if adapter in layer.lora_magnitude_vector:  # DoRA: the length of each output's weights is of its own
            rows = merged.T if layer.fan_in_fan_out else merged
            lengths = whole(layer.lora_magnitude_vector[adapter].weight).to(merged)
            rows = rows * (lengths / rows.norm(dim=1)).unsqueeze(1)
            merged = rows.T if layer.fan_in_fan_out else rows
    return merged.to(weight.dtype)


def quantised(parameter: Tensor) -> bool:
    """Whether bitsandbytes has packed it."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def whole(parameter: Tensor) -> Tensor:
    """A copy of its own: the original is freed (ZeRO-3) before the engine reads the last of it."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().clone()


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager:
    """Whole tensors of ZeRO-3 parameters within the block; collective."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))
