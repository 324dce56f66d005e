"""The rollout engine that a recipe asks for, on the shell's policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.keys import key_from
from posttrain.config.needs import Needs
from posttrain.config.schema import Recipe, RolloutConfig
from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.errors import EngineError, NeedsError
from posttrain.methods.base import Method
from posttrain.methods.companions import Reasoner, Writer
from posttrain.models.adapters import continued
from posttrain.models.reasoned import asks
from posttrain.models.reference import frozen_copy
from posttrain.rollouts.adapter_sync import AdapterWeights
from posttrain.rollouts.engine import Engine
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_client import VllmClient
from posttrain.rollouts.vllm_engine import ColocatedVllm, load_vllm
from posttrain.rollouts.vllm_key import read_key
from posttrain.rollouts.vllm_server import ServedVllm
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit
from posttrain.trainers.reasoner import ReasoningModel, load_reasoner
from posttrain.trainers.reference import beside_the_policy
from posttrain.trainers.sharded_start import fill, loaded, shares_out
from posttrain.trainers.shell import Shell
from posttrain.trainers.writer import WritingModel


def check_engine(recipe: Recipe, needs: Needs) -> None:
    """Refuse an engine that cannot run here.

    Raises:
        StackError: the recipe needs vLLM in this process, and it is not installed.
        EngineError: the variable with the server's key is not set, or an engine shall sleep where there is no GPU.
    """
    rollouts = recipe.rollouts
    if not _uses_vllm(rollouts, needs):
        return
    if rollouts.mode == "colocate":
        if rollouts.vllm.sleep and not torch.cuda.is_available():
            raise EngineError(
                "vLLM's sleep mode moves memory of a GPU, and there is none here",
                where="rollouts.vllm.sleep",
                hint="leave it out; on a CPU rollouts.vllm.kv_cache_mb bounds what the engine takes",
            )
        load_vllm()
    else:
        _api_key(rollouts)


def build_engine(
    recipe: Recipe,
    needs: Needs,
    shell: Shell,
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Any],
    traces: Sequence[KnownTrace],
) -> Engine:
    """Called on all ranks.

    Args:
        recipe, needs: choose and size it.
        shell: holds the policy; not yet bound.
        renderer, tokenizer: for the ids that end and pad completions.
        items: the fitted rows.
        traces: those that prefixes may be cut from.

    Raises:
        EngineError: vLLM does not run this model, or there is no server for it.
        NeedsError: an adapter that cannot be merged for vLLM.
    """
    rollouts = recipe.rollouts
    if not _uses_vllm(rollouts, needs):
        settings = rollouts or recipe.evaluation
        return TransformersEngine(
            shell.model,
            stop_ids=renderer.stop_ids,
            pad_id=tokenizer.pad_token_id,
            max_batch=256 if settings is None else settings.max_batch,
            gathered=shell.whole_model,
        )
    weights, vllm = PolicyWeights(shell.model, shell.accelerator), rollouts.vllm
    adapter = AdapterWeights(weights) if vllm.sync == "adapter" else None
    weights.refuse_tied_adapters()
    prompts = [item.prompt_ids for item in items]
    restricted = rollouts.top_p < 1.0 or rollouts.top_k is not None
    if rollouts.mode == "server":
        return ServedVllm(
            weights,
            prompts,
            client=VllmClient(vllm.url, api_key=_api_key(rollouts), reconnect=vllm.reconnect),
            stop_ids=renderer.stop_ids,
            max_batch=rollouts.max_batch,
            limit=vllm.canary_limit,
            restricted=restricted,
            start_timeout=vllm.start_timeout,
            timeout=vllm.timeout,
            transfer_dir=vllm.transfer_dir,
            adapter=adapter,
        )
    dtype = vllm.dtype or ("bfloat16" if recipe.training.bf16 else recipe.model.dtype)
    limit = canary_limit(vllm.canary_limit, trainer_float32=weights.computes_in_float32, engine_dtype=dtype)
    return ColocatedVllm(
        weights,
        Canary(prompts, renderer.stop_ids[0], limit, whole=renderer.pictures is not None),
        stop_ids=renderer.stop_ids,
        dtype=dtype,
        max_length=_max_length(recipe, needs, weights, prompts, traces),
        max_batch=rollouts.max_batch,
        restricted=restricted,
        kv_cache_bytes=None if vllm.kv_cache_mb is None else vllm.kv_cache_mb << 20,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        enforce_eager=vllm.enforce_eager,
        trust_remote_code=recipe.model.trust_remote_code,
        adapter=adapter,
        sleep=vllm.sleep,
    )


def build_writer(
    recipe: Recipe,
    method: Method,
    policy: PreTrainedModel,
    renderer: Renderer,
    items: Sequence[Any],
    pad_id: int,
    device: torch.device,
) -> WritingModel | None:
    """The writer or reasoner of a method, if it names one. Call before the shell is there: from then on ZeRO-3 takes
    apart every model that is loaded.

    Args:
        items: the fitted rows.

    Raises:
        ModelError: it cannot be loaded, or is a writer with another vocabulary than the policy.
        NeedsError: it is to be the start of the run, and that has an adapter already.
        DataError: the reasoner cannot be asked about the rows.
    """
    wanted = method.needs.companion(Writer) or method.needs.companion(Reasoner)
    if wanted is None:
        return None
    if wanted.path is None and continued(recipe.model) is not None:
        raise NeedsError(
            f"method {recipe.method.name} samples from the start of the run, and that is a base with an adapter",
            where="model.adapter",
            hint="merge it: posttrain export --merge",
        )
    ranks, path, own = PartialState(), wanted.path, renderer
    if isinstance(wanted, Reasoner):
        writes, tokenizer = loaded(ranks, lambda: load_reasoner(recipe, wanted))
        own, pad_id = asks(wanted, tokenizer, items[0][0], writes.generation_config), tokenizer.pad_token_id
    else:
        writes = policy if path is None else loaded(ranks, lambda: beside_the_policy(recipe, path, renderer))
    model = frozen_copy(writes)
    if shares_out(ranks) is None:
        model = model.to(device)
    else:
        fill(model, device)
    engine = TransformersEngine(model, stop_ids=own.stop_ids, pad_id=pad_id, max_batch=recipe.rollouts.max_batch)
    if isinstance(wanted, Reasoner):
        return ReasoningModel(engine, wanted, renderer, own, recipe.seed)
    return WritingModel(engine, wanted, recipe.seed)


def _uses_vllm(rollouts: RolloutConfig | None, needs: Needs) -> bool:
    return rollouts is not None and rollouts.engine == "vllm" and needs.generates


def _api_key(rollouts: RolloutConfig) -> str | None:
    name = rollouts.vllm.api_key_env
    if name is None:
        return read_key(rollouts.vllm.url)
    return key_from(name, where="rollouts.vllm.api_key_env", error=EngineError)


def _max_length(
    recipe: Recipe,
    needs: Needs,
    weights: PolicyWeights,
    prompts: Sequence[Sequence[int]],
    traces: Sequence[KnownTrace],
) -> int:
    """Tokens of the longest sequence that the engine may hold: with evaluations all that the model takes."""
    positions = getattr(weights.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if traces:  # a prefix is a part of a trace
        longest = max(longest, max(trace.length for trace in traces))
    if needs.companion(Writer) is not None:  # likewise of what it has written
        longest = max(longest, max(map(len, prompts)) + recipe.rollouts.max_new_tokens)
    needed = longest + recipe.rollouts.max_new_tokens
    if recipe.environment is not None:
        needed = max(needed, recipe.environment.episode_tokens)
    if positions is None:
        return needed
    return positions if recipe.evaluation is not None else min(needed, positions)
