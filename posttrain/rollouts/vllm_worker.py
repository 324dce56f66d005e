"""What posttrain adds to a vLLM server's workers (see launch/vllm_server.sh); imported by them, never by the trainer.

`SyncExtension` lets them take weights from a folder of safetensors files and say what they hold. Who may ask for that
is decided at the server's door, by `vllm_guard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from posttrain.rollouts.vllm_engine import forget_packed_experts, repack_heads


class SyncExtension:
    """Mixed into vLLM's workers by `--worker-extension-cls`; called over `/collective_rpc`."""

    vllm_config: Any  # of the worker that it is mixed into, as `model_runner`
    model_runner: Any
    posttrain_version: int | None = None
    posttrain_owner: str | None = None

    def posttrain_status(self) -> dict[str, Any]:
        """What is served: the shape of the model, how it computes, and whose weights it has."""
        model = self.vllm_config.model_config
        text = model.hf_text_config
        return {
            "architecture": (model.hf_config.architectures or ["unknown"])[0],
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": model.max_model_len,
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "version": self.posttrain_version,
            "owner": self.posttrain_owner,
            "adapter_rank": getattr(self.vllm_config.lora_config, "max_lora_rank", None),
        }

    def posttrain_hold(self, version: int, owner: str) -> dict[str, Any]:
        """Say from now on that the adapter that was loaded is `version` of `owner`."""
        self.posttrain_version, self.posttrain_owner = version, owner
        return {"version": version}

    @torch.no_grad()
    def posttrain_load(self, folder: str, version: int, owner: str) -> dict[str, Any]:
        """Load every safetensors file of a folder, in order of their names, as the weights `version` of `owner`.

        The version counts only once everything is in place: a worker that fails half-way has none.
        """
        from vllm.config import set_current_vllm_config

        self.posttrain_version = None
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            return {"error": f"the server sees no weights in {folder}"}
        with set_current_vllm_config(self.vllm_config):
            model = self.model_runner.get_model()
            forget_packed_experts(model)
            self.model_runner.reload_weights(weights_iterator=_tensors(files))
            repack_heads(model)
        self.posttrain_version, self.posttrain_owner = version, owner
        return {"version": version}


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)
