"""Rollouts from a vLLM server of its own ("server"): other processes or machines sample, the trainer sends weights.

The weights of a sync lie as safetensors files in a folder that both sides see (shared memory on one machine), which the
server's workers load (`vllm_worker`). Before and after every batch of rollouts the server says whose weights of which
version it holds: a server that was restarted, or that another run took over, is noticed and its samples are not used.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from posttrain.errors import EngineError, PosttrainError
from posttrain.rollouts.adapter_sync import AdapterWeights
from posttrain.rollouts.engine import Completion, Sampling, token_limits
from posttrain.rollouts.transfer_folder import remove_left_behind, transfer_folder
from posttrain.rollouts.vllm_client import GO_ON, VllmClient, in_parallel
from posttrain.rollouts.vllm_requests import check_request, completion, logprobs_mode, request
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit

SHARD = 1 << 30
"""Bytes of weights per file: what the trainer holds of a sync at once."""


class ServedVllm:
    """An `Engine` on a server. With several ranks every rank asks for its own share; the main one sends the weights.

    Args:
        weights: the policy's weights.
        canary_prompts: of the run.
        limit: for the canary; None for the default of the types in use.
        client: of the server.
        stop_ids: token ids that end a completion.
        max_batch: sequences asked for at once, by this rank.
        restricted: whether top-p or top-k will be used in training.
        start_timeout, timeout: seconds to wait for the server, and for one batch of rollouts or one sync.
        transfer_dir: folder that both sides see.
        adapter: sent in place of merged weights; the server has the base weights from the folder it started with.

    Raises:
        EngineError: no server, or one that serves another model, or no folder for the weights or no room in it.
    """

    def __init__(
        self,
        weights: PolicyWeights,
        canary_prompts: Sequence[Sequence[int]],
        *,
        client: VllmClient,
        stop_ids: Sequence[int],
        max_batch: int,
        limit: float | None = None,
        restricted: bool = False,
        start_timeout: float = 600.0,
        timeout: float = 1800.0,
        transfer_dir: str = "/dev/shm",  # nosec B108 # a private folder is made in it
        adapter: AdapterWeights | None = None,
    ) -> None:
        self.weights, self.client, self.stop_ids = weights, client, list(stop_ids)
        self.max_batch, self.timeout, self.transfer_dir = max_batch, timeout, transfer_dir
        self.policy_version: int | None = None
        self.adapter, self._syncs = adapter, 0
        self.main = weights.accelerator.is_main_process
        owner = [secrets.token_hex(8)]
        if weights.accelerator.num_processes > 1:
            broadcast_object_list(owner)
        self.owner = owner[0]
        if not Path(transfer_dir).is_dir():
            raise EngineError(
                f"start: no folder {transfer_dir!r} for the weights on their way to the server",
                where="rollouts.vllm.transfer_dir",
                hint="name a folder that the trainer and the server both see",
            )
        if self.main:
            remove_left_behind(transfer_dir)
        self._check_room(sum(weights.sizes()) if adapter is None else 0)
        client.wait_until_up(start_timeout)
        status = self._status(time.monotonic() + timeout, "start")
        self._check_model(status, restricted)
        self.mode, self.max_length = status["logprobs_mode"], status["max_length"]
        limit = canary_limit(limit, trainer_float32=weights.computes_in_float32, engine_dtype=status["dtype"])
        self.canary = Canary(canary_prompts, self.stop_ids[0], limit)

    # ----------------------------------------------------------------------------------------------------- weights

    def sync(self, version: int) -> dict[str, float]:
        """Send the trainer's weights, have cached prefixes forgotten, check the canary. All ranks call it.

        Returns:
            Metrics: on the main rank, the seconds it took and the difference on the canary tokens.

        Raises:
            EngineError: on all ranks: the server went away or did not answer in time, or its copy is wrong.
        """
        started = time.perf_counter()
        self._syncs += 1
        metrics: dict[str, float] = {}
        with transfer_folder(self.transfer_dir) if self.main else nullcontext() as folder:
            error: PosttrainError | None = self._write(folder, version)
            trainer = self.weights.logps(self.canary.sequences)
            if folder is not None and error is None:
                try:
                    metrics = self._send(folder, version, trainer, started)
                except EngineError as raised:
                    error = raised
        outcome = [error]
        if self.weights.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]
        self.policy_version = version
        return metrics

    def _write(self, folder: Path | None, version: int) -> EngineError | None:
        """The files of a sync, on the main rank. A failure is kept until every rank has given its part of the weights:
        the others would wait for this one for ever."""
        failed: EngineError | None = None
        for number, shard in enumerate(self._parts()):
            if folder is None or failed is not None:
                continue
            try:
                if self.adapter is None:
                    save_file(shard, folder / f"weights-{number:05d}.safetensors")
                else:
                    self.adapter.save(shard, folder)
            except (OSError, SafetensorError) as error:
                failed = EngineError(
                    f"weight sync {version}: cannot write the weights into {self.transfer_dir} ({error})",
                    where="rollouts.vllm.transfer_dir",
                    hint=f"make room there, or name another folder that the trainer and the server both see; {GO_ON}",
                )
        return failed

    def _parts(self) -> Iterable[dict[str, Tensor]]:
        """What is sent, file by file. Collective where weights are sharded."""
        return _shards(self.weights.tensors_of_files()) if self.adapter is None else [self.adapter.tensors()]

    def _check_room(self, needed: int) -> None:
        """Raises:
        EngineError: the weights do not fit into the folder.
        """
        free = shutil.disk_usage(self.transfer_dir).free
        if self.main and free < needed:
            found = f"{free / 1e6:,.0f} MB free, and a weight sync takes {needed / 1e6:,.0f} MB"
            raise EngineError(
                f"start: {self.transfer_dir} has {found}",
                where="rollouts.vllm.transfer_dir",
                hint="name a larger folder that the trainer and the server both see; /dev/shm of a container is as "
                "large as its --shm-size says",
            )

    def _load_adapter(self, folder: Path, deadline: float, phase: str) -> None:
        """Have it served under a name of its own: the server reads one that it has got no second time."""
        how: dict[str, Any] = {"deadline": deadline, "phase": phase, "json_answer": False}
        # Not with load_inplace: vLLM would read the folder again for every batch, and it does not stay.
        body = {"lora_name": self._adapter_name(self._syncs), "lora_path": str(folder)}
        self.client.post("/v1/load_lora_adapter", body, **how, carried_out="already been loaded")
        if self._syncs > 1:
            body = {"lora_name": self._adapter_name(self._syncs - 1)}
            self.client.post("/v1/unload_lora_adapter", body, **how, carried_out="cannot be found")

    def _adapter_name(self, sync: int) -> str:
        return f"{self.owner}-{sync}"

    @property
    def _model(self) -> dict[str, str]:
        """The part of a request that names the adapter."""
        return {} if self.adapter is None else {"model": self._adapter_name(self._syncs)}

    def _send(self, folder: Path, version: int, trainer: list[list[float]], started: float) -> dict[str, float]:
        phase, deadline = f"weight sync {version}", time.monotonic() + self.timeout
        held = {"version": version, "owner": self.owner}
        body = {"method": "posttrain_load", "kwargs": {"folder": str(folder), **held}}
        if self.adapter is not None:
            self._load_adapter(folder, deadline, phase)
            body = {"method": "posttrain_hold", "kwargs": held}
        for answer in self.client.post("/collective_rpc", body, deadline=deadline, phase=phase)["results"]:
            if answer.get("version") != version:
                raise EngineError(
                    f"{phase}: {answer.get('error', answer)}",
                    where="rollouts.vllm.transfer_dir",
                    hint="name a folder that the trainer and the server both see",
                )
        if not self.client.post("/reset_prefix_cache", None, deadline=deadline, phase=phase)["success"]:
            raise EngineError(f"{phase}: the server kept prefixes of older weights", where="rollouts.vllm")
        seconds = time.perf_counter() - started
        difference = self.canary.check(trainer, self._logps(self.canary.sequences, deadline, phase), version)
        return {"sync_seconds": seconds, "canary_logp_diff_max": difference.max}

    def logps(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `ScoringEngine.logps`."""
        return self._logps(
            sequences, time.monotonic() + self.timeout, f"comparing log-probs with weights {self.policy_version}"
        )

    def _logps(self, sequences: Sequence[Sequence[int]], deadline: float, phase: str) -> list[list[float]]:
        found = []
        for sequence in sequences:
            body = {"prompt": sequence, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, **self._model}
            choice = self.client.post("/v1/completions", body, deadline=deadline, phase=phase)["choices"][0]
            places = zip(choice["prompt_logprobs"][1:], sequence[1:], strict=True)
            found.append([at[str(token)]["logprob"] for at, token in places])
        return found

    # ---------------------------------------------------------------------------------------------------- rollouts

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """See `Engine.generate`.

        Raises:
            EngineError: also when the server goes away, does not answer in time, or holds other weights than were sent.
        """
        if self.policy_version is None:
            raise RuntimeError("generate before the first sync: the server has no weights of this run yet")
        limits = token_limits(prompts, sampling, limits)
        check_request(prompts, sampling, self.max_length, limits)
        version = self.policy_version  # a sync from another thread before the end is noticed below
        phase, deadline = f"sampling with weights {version}", time.monotonic() + self.timeout
        self._check_held(version, deadline, phase)

        def ask(index: int) -> list[Completion]:
            asked = {"prompt": list(prompts[index]), "return_token_ids": True, **self._model}
            body = request(sampling, index, self.stop_ids, limits[index]) | asked
            answer = self.client.post("/v1/completions", body, deadline=deadline, phase=phase)
            return self._completions(answer["choices"], sampling, version)

        jobs = [lambda index=index: ask(index) for index in range(len(prompts))]
        found = in_parallel(jobs, workers=max(1, self.max_batch // sampling.n))
        self._check_held(version, deadline, phase)
        return found

    def read_tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """See `Engine.read_tokens`. Every prompt whole: what vLLM finds in its prefix cache depends on the moment."""
        return sum(map(len, prompts))

    def _completions(self, choices: list[dict[str, Any]], sampling: Sampling, version: int) -> list[Completion]:
        completions = []
        for choice in sorted(choices, key=lambda choice: choice["index"]):
            logps = choice["logprobs"]["token_logprobs"]
            ids = choice["token_ids"]
            completions.append(completion(ids, logps, self.stop_ids, sampling, self.mode, version))
        return completions * sampling.n if sampling.greedy else completions

    @property
    def positions(self) -> int:
        """See `Engine.positions`."""
        return self.max_length

    def together(self) -> AbstractContextManager:
        """Nothing: the engine has its own copy of the weights."""
        return nullcontext()

    def close(self) -> None:
        """Give up what is under way; the server belongs to whoever started it."""
        self.client.give_up()

    # ------------------------------------------------------------------------------------------------------ status

    def _status(self, deadline: float, phase: str) -> dict[str, Any]:
        body = {"method": "posttrain_status"}
        return self.client.post("/collective_rpc", body, deadline=deadline, phase=phase)["results"][0]

    def _check_held(self, version: int, deadline: float, phase: str) -> None:
        status = self._status(deadline, phase)
        held = (status["owner"], status["version"])
        if held == (self.owner, version):
            return
        what = "was restarted" if status["owner"] is None else "holds weights of another run or version"
        raise EngineError(
            f"{phase}: the server at {self.client.url} {what}, so its samples are not this policy's",
            where="rollouts.vllm.url",
            hint="give every run a server of its own, and go on with --resume auto",
        )

    def _check_model(self, status: dict[str, Any], restricted: bool) -> None:
        text = self.weights.config.get_text_config()
        wanted = {
            "architecture": (self.weights.config.architectures or [type(self.weights.policy).__name__])[0],
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
        }
        different = [
            f"{key} {status[key]} there, {value} here" for key, value in wanted.items() if status[key] != value
        ]
        if different:
            raise EngineError(
                f"start: the server at {self.client.url} serves another model: {'; '.join(different)}",
                where="rollouts.vllm.url",
                hint="start it with the recipe's model.path: launch/vllm_server.sh MODEL",
            )
        if self.adapter is not None and (status["adapter_rank"] or 0) < self.adapter.rank:
            raise EngineError(
                f"start: the server at {self.client.url} takes no adapters of rank {self.adapter.config.r}",
                where="rollouts.vllm.sync",
                hint=f"start it with {self.adapter.options}, or take sync: merged",
            )
        mode = logprobs_mode(restricted=restricted)
        if status["logprobs_mode"] != mode:
            raise EngineError(
                f"start: the server gives {status['logprobs_mode']}, and this recipe's top_p and top_k need {mode}",
                where="rollouts.vllm.url",
                hint=f"start it with --logprobs-mode {mode}",
            )


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    """Named tensors on the CPU in groups of about `SHARD` bytes."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        shard[name] = tensor.cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard
