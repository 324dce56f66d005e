"""An adapter for an engine that holds the base weights: what of a PEFT model is sent, and what vLLM must be told.

A merged copy costs a transfer of all weights for every update; an adapter is a few megabytes, and is not rounded into
16-bit weights. In return vLLM computes it beside every layer while it samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor

from posttrain.errors import NeedsError
from posttrain.models.value import NAME as CRITIC
from posttrain.rollouts.weight_sync import PolicyWeights, gathered, whole

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""


class AdapterWeights:
    """The adapter of a policy.

    Args:
        weights: of a PEFT model with one LoRA adapter.

    Raises:
        NeedsError: it is larger than vLLM's largest, or on the embeddings, the head, or experts.
    """

    def __init__(self, weights: PolicyWeights) -> None:
        self.weights = weights
        self.name = weights.model.active_adapter
        self.config = weights.model.peft_config[self.name]
        self._refuse()
        self.modules = sorted({name.split(".")[-2] for name in weights.adapted})
        self.rank = next(rank for rank in RANKS if rank >= self.config.r)

    def _refuse(self) -> None:
        if self.config.r > RANKS[-1]:
            raise NeedsError(
                f"vLLM takes adapters up to rank {RANKS[-1]}, not {self.config.r}",
                where="model.peft.r",
                hint="take rollouts.vllm.sync: merged, or a smaller rank",
            )
        policy = self.weights.policy
        ends = {id(policy.get_input_embeddings()), id(policy.get_output_embeddings())}
        for name, module in self.weights.adapted.items():
            # With an adapter on the head vLLM gives no log-probs of prompts on a CPU, and so no canary. Experts have
            # one tensor in memory, and vLLM knows adapters of each of them.
            if id(module) in ends or isinstance(module, ParamWrapper):
                raise NeedsError(
                    f"an adapter on {name} is not sent by itself, only those on linear layers between embeddings and "
                    "head are",
                    where="model.peft.target_modules",
                    hint="take rollouts.vllm.sync: merged, or name layers of attention in target_modules",
                )

    @property
    def settings(self) -> dict[str, Any]:
        """For vLLM, by the names of its arguments."""
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": self.rank, "lora_target_modules": self.modules}

    @property
    def options(self) -> str:
        """The same on the command line of a server."""
        return f"--enable-lora --max-lora-rank {self.rank} --lora-target-modules {' '.join(self.modules)}"

    def tensors(self) -> dict[str, Tensor]:
        """Copies by the names in PEFT's files, on the CPU. Collective where weights are sharded."""
        found = {}
        for name, parameter in self.weights.policy.named_parameters():
            if ".lora_" not in name or name.startswith(f"{CRITIC}."):
                continue
            with torch.no_grad(), gathered([parameter]):
                plain = name.replace(f".{self.name}.", ".")
                found[f"base_model.model.{plain}"] = whole(parameter).cpu().contiguous()
        return found

    def save(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write what `tensors` gave as PEFT does."""
        save_file(tensors, folder / "adapter_model.safetensors")
        self.config.save_pretrained(str(folder))
