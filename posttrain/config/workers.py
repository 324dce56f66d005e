"""Who samples for `posttrain sample` and `posttrain eval`: one process or several, transformers or vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.schema import (
    BenchmarkConfig,
    EvaluationConfig,
    RolloutConfig,
    Section,
    VllmConfig,
)
from posttrain.config.verifier import VerifierConfig

OF_A_SERVER = ("url", "api_key_env", "start_timeout", "timeout", "reconnect", "transfer_dir")
"""Keys of `VllmConfig` that belong to a server; sampling and evaluation without a trainer start their own engine."""

OF_A_TRAINER = ("mode", "importance_cap", "importance", "sync_every", "delay", "pipeline", "replay", "refill")
"""Keys of `RolloutConfig` that say how sampling and training go together."""


class WorkerSettings(Section):
    """How many processes sample and verify. Which samples there are does not depend on it."""

    workers: int = Field(
        1, ge=1, description="processes that sample and verify; above 1 on Ray (docs/workers.md); no effect on results"
    )
    address: str | None = Field(
        None,
        description="of a running Ray cluster, host:port or auto; default: RAY_ADDRESS, or else this machine alone",
    )

    @model_validator(mode="after")
    def _address_of_workers(self) -> WorkerSettings:
        if self.address is not None and self.workers == 1:
            raise ValueError("`address` has no effect with one worker, which is this process: set `workers`")
        return self


class EvaluationRun(EvaluationConfig, WorkerSettings):
    """An evaluation by itself, outside of a training run: `posttrain eval`, and stages of pipelines."""

    engine: Literal["transformers", "vllm"] = Field("transformers", description="the engine that samples")
    vllm: VllmConfig = Field(VllmConfig(), description="settings of the vllm engine")

    @model_validator(mode="after")
    def _engine_can(self) -> EvaluationRun:
        written = [benchmark for benchmark in self.benchmarks if isinstance(benchmark, BenchmarkConfig)]
        check_shared(self.workers, [verifier for benchmark in written for verifier in benchmark.verifier])
        if self.engine == "vllm":
            check_vllm(self.vllm, beams=self.beams, prefix="vllm")
        elif "vllm" in self.model_fields_set:
            raise ValueError(f"engine {self.engine} does not read `vllm`; engine vllm does")
        return self


def check_vllm(vllm: VllmConfig, *, beams: int | None, prefix: str) -> None:
    """Refuse what an engine of vLLM without a trainer does not do.

    Raises:
        ValueError: what an engine of vLLM without a trainer does not do, or keys that it does not read.
    """
    if beams is not None:
        raise ValueError("the vLLM engine does no beam search: leave out `beams`, or take engine transformers")
    idle = [f"{prefix}.{key}" for key in OF_A_SERVER if key in vllm.model_fields_set]
    if idle:
        raise ValueError(f"{', '.join(idle)} would have no effect: they belong to a server, and this starts its own")


def check_rollouts(rollouts: RolloutConfig, *, beams: int | None) -> None:
    """Refuse settings of rollouts that are about training.

    Raises:
        ValueError: settings of rollouts that `posttrain sample` cannot follow, or would not read.
    """
    idle = [f"rollouts.{key}" for key in OF_A_TRAINER if key in rollouts.model_fields_set]
    if idle:
        raise ValueError(f"{', '.join(idle)} would have no effect: they are about training on the samples")
    if rollouts.engine != "vllm":
        if "vllm" in rollouts.model_fields_set:
            raise ValueError(f"rollouts.engine {rollouts.engine} does not read `rollouts.vllm`; engine vllm does")
        return
    check_vllm(rollouts.vllm, beams=beams, prefix="rollouts.vllm")
    if rollouts.temperature != 1.0 and (rollouts.top_p < 1.0 or rollouts.top_k is not None):
        raise ValueError(
            "vLLM gives log-probs at a temperature other than 1 only where neither top_p nor top_k cut tokens off: "
            "set temperature 1.0, or leave out top_p and top_k, or take engine transformers"
        )


def check_shared(workers: int, verifiers: Sequence[VerifierConfig]) -> None:
    """Refuse limits that several workers would each have.

    Raises:
        ValueError: a limit on a judge's requests or tokens, of which every worker would have one of its own.
    """
    if workers > 1 and any(verifier.limited for verifier in verifiers):
        raise ValueError(
            "max_requests and max_total_tokens of a judge hold for one process, and several workers would each spend "
            "them: set workers to 1, or leave the limits out"
        )
