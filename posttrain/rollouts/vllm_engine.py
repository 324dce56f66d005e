"""Rollouts with vLLM in the trainer's process ("colocate"): every rank has an engine of its own for its share.

vLLM starts without weights and gets them from the trainer before the first completion, the same way as after every
update. What it needs to run in one process with a trainer, on a CPU too, is kept together here; docs/vllm.md says why.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from posttrain.config.stack import require
from posttrain.errors import EngineError
from posttrain.models.sharing import EYES
from posttrain.rollouts.adapter_sync import AdapterWeights
from posttrain.rollouts.engine import Completion, Sampling, token_limits
from posttrain.rollouts.vllm_requests import check_request, completion, logprobs_mode, request
from posttrain.rollouts.weight_sync import Canary, PolicyWeights

MOST_KV_CACHE = 4 << 30
"""Bytes that the cache takes on a CPU unless the recipe says more."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def load_vllm() -> ModuleType:
    """Import vLLM, quiet and without telemetry unless the environment says otherwise.

    Raises:
        StackError: it is not installed.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with _undisturbed():
        return require("vllm", "vllm")


class ColocatedVllm:
    """An `Engine` whose weights are a copy of the trainer's.

    Args:
        weights: the policy's weights.
        canary: checked after every sync.
        stop_ids: token ids that end a completion.
        dtype: type of the engine's weights and arithmetic.
        max_length: most tokens of a prompt and its completion.
        max_batch: sequences that run at once.
        restricted: whether top-p or top-k will be used in training; decides which log-probs vLLM gives.
        kv_cache_bytes: for keys and values; None for the default (see `VllmConfig`).
        gpu_memory_utilization: share of a GPU, weights included.
        enforce_eager: None: on a CPU only.
        trust_remote_code: as for the policy.
        adapter: sent in place of merged weights, over base weights that are sent once.
        sleep: after sampling move the engine's weights off the GPU and drop its cache, until it is used again.

    Raises:
        StackError: vLLM is not installed.
        EngineError: vLLM cannot run this model.
    """

    def __init__(
        self,
        weights: PolicyWeights,
        canary: Canary,
        *,
        stop_ids: Sequence[int],
        dtype: str,
        max_length: int,
        max_batch: int,
        restricted: bool = False,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.3,
        enforce_eager: bool | None = None,
        trust_remote_code: bool = False,
        adapter: AdapterWeights | None = None,
        sleep: bool = False,
    ) -> None:
        self.weights, self.canary, self.stop_ids = weights, canary, list(stop_ids)
        self.sleeps, self._asleep = sleep, False
        self.adapter, self._lora, self._loads = adapter, None, 0
        self.max_length, self.mode = max_length, logprobs_mode(restricted=restricted)
        self.policy_version: int | None = None
        on_cpu = not torch.cuda.is_available()
        if on_cpu and kv_cache_bytes is None:
            kv_cache_bytes = default_kv_cache(weights.config.get_text_config(), dtype, max_length, max_batch)
        eyes = getattr(weights.policy, EYES, None)
        self._pictures = None if eyes is None else eyes.pictures
        self._llm = self._start(
            dtype=dtype,
            enforce_eager=on_cpu if enforce_eager is None else enforce_eager,
            max_model_len=max_length,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max(4096, max_length),
            # A prompt that is read in parts draws tokens in vain, and vLLM winds the request's generator back for it,
            # which torch does for generators on GPUs alone. So on a CPU every prompt is read as a whole.
            enable_chunked_prefill=not on_cpu,
            kv_cache_memory_bytes=kv_cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            logprobs_mode=self.mode,
            trust_remote_code=trust_remote_code,
            seed=0,  # never drawn from: every request has a seed of its own
            **({} if adapter is None else adapter.settings),
            **({"enable_sleep_mode": True} if sleep else {}),
        )
        self._pictured = None
        if eyes is not None:
            from posttrain.rollouts.vllm_pictures import PicturedRequests

            self._pictured = PicturedRequests(self._llm, eyes.pictures, eyes.filler)

    def _start(self, **settings: Any) -> Any:
        self._owns_process_group = not torch.distributed.is_initialized()
        folder = tempfile.mkdtemp(prefix="posttrain-vllm-")
        try:
            with _undisturbed(), _launcher_environment():
                config, own = self.weights.config, {"skip_tokenizer_init": True}
                if self._pictures is not None:
                    from posttrain.rollouts.vllm_pictures import SETTINGS

                    self._pictures.processor.save_pretrained(folder)
                    # A model that was never saved does not say what it is, and vLLM would take it for one of text.
                    config, own = copy.deepcopy(config), SETTINGS
                    config.architectures = [type(self.weights.policy).__name__]
                config.save_pretrained(folder)
                return load_vllm().LLM(
                    model=folder,
                    load_format="dummy",
                    generation_config="vllm",
                    distributed_executor_backend="external_launcher",  # the worker runs in this process
                    enable_prefix_caching=True,
                    disable_log_stats=True,
                    **own,
                    **settings,
                )
        except (ValueError, RuntimeError, NotImplementedError, OSError, ImportError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EngineError(
                f"vLLM cannot start with this model: {reason}",
                where="rollouts.engine",
                hint="take rollouts.engine: transformers, or set VLLM_LOGGING_LEVEL=INFO to see more",
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sync(self, version: int) -> dict[str, float]:
        """Copy the trainer's weights, forget cached prefixes, check the canary. With several ranks all of them call it.

        Returns:
            Metrics: the seconds it took and the difference on the canary tokens.

        Raises:
            EngineError: the copy is wrong.
        """
        started = time.perf_counter()
        self._wake()
        with _undisturbed():
            if self.adapter is None or self.policy_version is None:
                tensors = self.weights.tensors_of_files(merged=self.adapter is None)
                self._llm.apply_model(forget_packed_experts)
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
                self._llm.apply_model(repack_heads)
            if self.adapter is not None:
                self._load(self.adapter)
        if not self._llm.reset_prefix_cache():
            raise EngineError(f"vLLM kept prefixes of older weights at weight sync {version}", where="rollouts.vllm")
        if self._pictured is not None:
            self._pictured.forget()
        seconds = time.perf_counter() - started
        engine = self.logps(self.canary.sequences)
        difference = self.canary.check(self.weights.logps(self.canary.sequences), engine, version)
        self.policy_version = version
        return {"sync_seconds": seconds, "canary_logp_diff_max": difference.max}

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _sleep(self) -> None:
        self._llm.sleep(level=1)  # level 2 would drop the weights, and evaluation samples more than once per sync
        self._asleep = True

    def _load(self, adapter: AdapterWeights) -> None:
        """Give vLLM the adapter under a new number: it reads one that it has got no second time."""
        from vllm.lora.request import LoRARequest

        self._loads += 1
        with tempfile.TemporaryDirectory(prefix="posttrain-adapter-") as folder:
            adapter.save(adapter.tensors(), Path(folder))
            self._lora = LoRARequest(f"policy-{self._loads}", self._loads, folder)
            self._llm.llm_engine.add_lora(self._lora)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        from vllm import SamplingParams

        if self.policy_version is None:
            raise RuntimeError("generate before the first sync: the engine has no weights yet")
        limits = token_limits(prompts, sampling, limits)
        check_request(prompts, sampling, self.max_length, limits)
        parameters = [
            SamplingParams(**request(sampling, index, self.stop_ids, limit), detokenize=False)
            for index, limit in enumerate(limits)
        ]
        self._wake()
        with _undisturbed():
            found = self._run(prompts, parameters)
        if self.sleeps:
            self._sleep()
        return [self._completions(output, sampling) for output in found]

    def read_tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """See `Engine.read_tokens`. Every prompt whole: what vLLM finds in its prefix cache depends on the moment."""
        return sum(map(len, prompts))

    def _completions(self, output: Any, sampling: Sampling) -> list[Completion]:
        completions = []
        for part in sorted(output.outputs, key=lambda part: part.index):
            ids = list(part.token_ids)
            logps = [at[token].logprob for at, token in zip(part.logprobs, ids, strict=True)]
            completions.append(completion(ids, logps, self.stop_ids, sampling, self.mode, self.policy_version))
        return completions * sampling.n if sampling.greedy else completions

    def logps(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `ScoringEngine.logps`."""
        from vllm import SamplingParams

        wanted = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        parameters = [SamplingParams(**wanted) for _ in sequences]
        asleep = self._asleep
        self._wake()
        with _undisturbed():
            found = self._run(sequences, parameters)
        if asleep:  # rollouts are compared with the trainer between sampling and training
            self._sleep()
        return [
            [
                at[token].logprob
                for at, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            ]
            for output in found
        ]

    def _run(self, sequences: Sequence[Sequence[int]], parameters: list[Any]) -> list[Any]:
        if self._pictured is not None:
            return self._pictured(sequences, parameters, self._lora)
        return self._llm.generate(_token_prompts(sequences), parameters, use_tqdm=False, lora_request=self._lora)

    @property
    def positions(self) -> int:
        """See `Engine.positions`."""
        return self.max_length

    def together(self) -> AbstractContextManager:
        """Nothing: the engine has its own copy of the weights."""
        return nullcontext()

    def close(self) -> None:
        """End the engine and free its memory."""
        client = self._llm.llm_engine.engine_core
        self._llm = None
        if self._owns_process_group:
            client.shutdown()
            return
        # The engine's own shutdown, also the one at its end of life, would take the trainer's process group with it.
        from vllm.distributed import parallel_state

        client._finalizer.detach()
        client.engine_core.model_executor.shutdown()
        client.engine_core.scheduler.shutdown()
        gc.unfreeze()
        parallel_state.destroy_model_parallel()


def repack_heads(model: torch.nn.Module) -> None:
    """Renew what CPU kernels keep of the head. A tied one has no weight of its own that a reload would touch."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Have CPU kernels pack the experts of a reload as they did those of the start.

    vLLM 0.32 packs them when a layer's kernel is made, and keeps the kernel. So a reload would be laid into packed
    tensors as it is: other experts where the sizes are alike, an error where packing pads them.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def default_kv_cache(config: Any, dtype: str, max_length: int, max_batch: int) -> int:
    """Bytes for `max_batch` sequences of full length, at most `MOST_KV_CACHE`, but for one sequence at least.

    Per token: layers x 2 x key-value heads x head size x bytes. Blocks of 128 tokens are given out whole.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = -(-max_length // 128) * 128 + 128
    sequence = tokens * config.num_hidden_layers * 2 * heads * size * BYTES[dtype]
    return max(sequence * 2, min(sequence * max_batch, MOST_KV_CACHE))


def _token_prompts(prompts: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The trainer's random numbers and threads as they were.

    vLLM seeds every generator of the process when it starts, draws from torch's while it samples, and takes
    `torch.set_num_threads` away on a CPU.
    """
    states, cuda = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.cuda.is_available()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def _launcher_environment() -> Iterator[None]:
    """What torchrun would have set, for a trainer that was started without a launcher."""
    if "RANK" in os.environ:
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
