"""What both vLLM engines ask for and make of the answer, without importing vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from posttrain.errors import EngineError
from posttrain.rollouts.engine import Completion, Sampling


def prompt_seed(sampling: Sampling, prompt: int) -> int:
    """Seed of a prompt's first completion; vLLM adds the number of the completion within the request to it.

    So completion k of prompt p is drawn with a seed that follows from (seed, p, k): `first_sample` moves the start.
    """
    number, sample = sampling.draw(prompt, 0)
    mixed = np.random.SeedSequence([sampling.seed, number]).generate_state(1, np.uint64)[0]
    return int(mixed >> np.uint64(2)) + sample  # 62 bits, so that sums stay below 2**63


def request(sampling: Sampling, prompt: int, stop_ids: Sequence[int], limit: int) -> dict[str, Any]:
    """Parameters of one prompt's request; the names are those of `SamplingParams` and of the HTTP interface.

    Only `stop_ids` end a completion: the model's own end token counts if it is among them.

    Args:
        prompt: its place within the call.
        limit: of its new tokens, from `engine.token_limits`.
    """
    common = {
        "max_tokens": limit,
        "logprobs": 0,  # of the sampled token
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
    }
    if sampling.greedy:
        return common | {"temperature": 0.0, "n": 1}  # vLLM refuses n > 1 here; all copies are equal
    return common | {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
        "seed": prompt_seed(sampling, prompt),
        "n": sampling.n,
    }


def logprobs_mode(*, restricted: bool) -> Literal["processed_logprobs", "raw_logprobs"]:
    """Which log-probs vLLM shall give: after the temperature, but not after top-p and top-k.

    `processed_logprobs` are after all three, `raw_logprobs` before all three, so with top-p or top-k the temperature
    must be 1 (`config.preflight`).
    """
    return "raw_logprobs" if restricted else "processed_logprobs"


def logps_hold(sampling: Sampling, mode: str) -> bool:
    """Whether log-probs of that mode are those that `Completion` promises."""
    if sampling.greedy:
        return True
    restricted = sampling.top_p < 1.0 or sampling.top_k is not None
    return not restricted if mode == "processed_logprobs" else sampling.temperature == 1.0


def check_request(prompts: Sequence[Sequence[int]], sampling: Sampling, max_length: int, limits: Sequence[int]) -> None:
    """Refuse a request that vLLM would not follow.

    Args:
        limits: of the new tokens of each prompt, from `engine.token_limits`.

    Raises:
        EngineError: a prompt is empty or too long, or a beam search is asked for.
    """
    if sampling.beams > 1:
        raise EngineError(
            "the vLLM engine does no beam search", where="rollouts.engine", hint="take rollouts.engine: transformers"
        )
    for index, (prompt, new) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise EngineError(f"prompt {index} is empty", hint="give it at least a BOS token")
        if len(prompt) + new > max_length:
            raise EngineError(
                f"prompt {index} has {len(prompt)} tokens; with {new} new ones it exceeds the "
                f"engine's {max_length} positions",
                hint="lower max_new_tokens, or leave out longer prompts (data.max_prompt_length), or start the server "
                "with a larger --max-model-len",
            )


def completion(
    ids: Sequence[int], logps: Sequence[float], stop_ids: Sequence[int], sampling: Sampling, mode: str, version: int
) -> Completion:
    """One completion; `finish` follows from its last token, whatever the engine calls it."""
    stopped = bool(ids) and ids[-1] in stop_ids
    kept = list(map(float, logps)) if logps_hold(sampling, mode) else []
    return Completion(list(map(int, ids)), kept, "stop" if stopped else "length", version)
