"""Rollouts from a vLLM server of its own ("server"): other processes or machines sample, the trainer sends weights.

The weights of a sync lie as safetensors files in a folder that both sides see (shared memory on one machine), which the
server's workers load (`vllm_worker`). Before and after every batch of rollouts the server says whose weights of which
version it holds: a server that was restarted, or that another run took over, is noticed and its samples are not used.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor

from posttrain.errors import EngineError, PosttrainError
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.vllm_client import VllmClient, in_parallel
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

    Raises:
        EngineError: no server, or one that serves another model, or no folder for the weights.
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
        transfer_dir: str = "/dev/shm",
    ) -> None:
        self.weights, self.client, self.stop_ids = weights, client, list(stop_ids)
        self.max_batch, self.timeout, self.transfer_dir = max_batch, timeout, transfer_dir
        self.policy_version: int | None = None
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
        started, folder = time.perf_counter(), self._folder()
        metrics: dict[str, float] = {}
        error: PosttrainError | None = None
        try:
            for number, shard in enumerate(_shards(self.weights.named_tensors())):
                if folder is not None:
                    save_file(shard, folder / f"weights-{number:05d}.safetensors")
            trainer = self.weights.logps(self.canary.sequences)
            if folder is not None:
                try:
                    metrics = self._send(folder, version, trainer, started)
                except EngineError as raised:
                    error = raised
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        outcome = [error]
        if self.weights.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]
        self.policy_version = version
        return metrics

    def _folder(self) -> Path | None:
        """A private folder for the files, on the main rank."""
        return Path(tempfile.mkdtemp(prefix="posttrain-weights-", dir=self.transfer_dir)) if self.main else None

    def _send(self, folder: Path, version: int, trainer: list[list[float]], started: float) -> dict[str, float]:
        phase, deadline = f"weight sync {version}", time.monotonic() + self.timeout
        body = {"method": "posttrain_load", "kwargs": {"folder": str(folder), "version": version, "owner": self.owner}}
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
        difference = self.canary.check(trainer, self._canary_logps(deadline, phase), version)
        return {"sync_seconds": seconds, "canary_logp_diff_max": difference.max}

    def _canary_logps(self, deadline: float, phase: str) -> list[list[float]]:
        found = []
        for sequence in self.canary.sequences:
            body = {"prompt": sequence, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
            choice = self.client.post("/v1/completions", body, deadline=deadline, phase=phase)["choices"][0]
            places = zip(choice["prompt_logprobs"][1:], sequence[1:], strict=True)
            found.append([at[str(token)]["logprob"] for at, token in places])
        return found

    # ---------------------------------------------------------------------------------------------------- rollouts

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `Engine.generate`.

        Raises:
            EngineError: also when the server goes away, does not answer in time, or holds other weights than were sent.
        """
        if self.policy_version is None:
            raise RuntimeError("generate before the first sync: the server has no weights of this run yet")
        check_request(prompts, sampling, self.max_length)
        phase, deadline = f"sampling with weights {self.policy_version}", time.monotonic() + self.timeout
        self._check_held(deadline, phase)

        def ask(index: int) -> list[Completion]:
            body = request(sampling, index, self.stop_ids) | {"prompt": list(prompts[index]), "return_token_ids": True}
            answer = self.client.post("/v1/completions", body, deadline=deadline, phase=phase)
            return self._completions(answer["choices"], sampling)

        jobs = [lambda index=index: ask(index) for index in range(len(prompts))]
        found = in_parallel(jobs, workers=max(1, self.max_batch // sampling.n))
        self._check_held(deadline, phase)
        return found

    def _completions(self, choices: list[dict[str, Any]], sampling: Sampling) -> list[Completion]:
        completions = []
        for choice in sorted(choices, key=lambda choice: choice["index"]):
            logps = choice["logprobs"]["token_logprobs"]
            ids = choice["token_ids"]
            completions.append(completion(ids, logps, self.stop_ids, sampling, self.mode, self.policy_version))
        return completions * sampling.n if sampling.greedy else completions

    @property
    def positions(self) -> int:
        """See `Engine.positions`."""
        return self.max_length

    def together(self) -> AbstractContextManager:
        """Nothing: the engine has its own copy of the weights."""
        return nullcontext()

    def close(self) -> None:
        """The server belongs to whoever started it."""

    # ------------------------------------------------------------------------------------------------------ status

    def _status(self, deadline: float, phase: str) -> dict[str, Any]:
        body = {"method": "posttrain_status"}
        return self.client.post("/collective_rpc", body, deadline=deadline, phase=phase)["results"][0]

    def _check_held(self, deadline: float, phase: str) -> None:
        status = self._status(deadline, phase)
        held = (status["owner"], status["version"])
        if held == (self.owner, self.policy_version):
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
