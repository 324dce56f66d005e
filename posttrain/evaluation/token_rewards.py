"""Which tokens a DPO policy rewards: beta (log pi - log pi_ref) of each one.

In the token-level view of DPO (From r to Q*, arXiv 2404.12358) the policy is an optimal one of a token MDP, and this is
the advantage of the token. It sums to the implicit reward of the whole response. Single values are defined up to a
potential of the state, and noisy: read them as credit, not as the reward of a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.config.schema import FileSource, ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Origin, Sample
from posttrain.data.sources import preferences
from posttrain.data.traces import Trace, manifest_path, read_traces
from posttrain.errors import DataError, ModelError
from posttrain.models.collate import collate
from posttrain.models.loading import load_policy
from posttrain.models.token_logps import prepare, token_logps
from posttrain.objectives.preference import token_rewards as objective
from posttrain.safe_files import write_text_atomic

BATCH = 16
"""Sequences per forward pass."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response to be looked at: whose it is, what it is there, and its tokens."""

    id: str
    role: str
    sample: Sample


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """Rewards of the tokens of one response.

    Attributes:
        id: of the problem.
        role: `chosen`, `rejected`, or the verdict of a trace.
        prompt: text of the prompt.
        ids: tokens of the response, T of them; the end token included.
        pieces: their texts, which join to the response; special tokens by name.
        logps, ref_logps: log-probs under policy and reference.
        rewards: beta times their difference.
        reward: the sum.
        beta: of the training.
    """

    id: str
    role: str
    prompt: str
    ids: list[int]
    pieces: list[str]
    logps: list[float]
    ref_logps: list[float]
    rewards: list[float]
    reward: float
    beta: float


def read_responses(path: Path, renderer: Renderer, source: FileSource) -> list[Response]:
    """The responses of a trace file, or both responses of each row of a file of pairs.

    Args:
        path: a file with a manifest beside it is one of traces, any other one of pairs.
        renderer: of the policy; traces with token ids keep their own.
        source: how pairs are read, with `path` as its path.

    Raises:
        DataError: as `read_traces` and `preferences`.
    """
    if manifest_path(path).is_file():
        return [Response(trace.problem_id, trace.verdict or "trace", _of(trace, renderer)) for trace in _traces(path)]
    rows = preferences(source, str(path))
    return [
        Response(row.problem.id, role, renderer.sample(Example(row.problem, text)))
        for row in rows
        for role, text in (("chosen", row.chosen), ("rejected", row.rejected))
    ]


@torch.no_grad()
def token_rewards(
    policy: str, reference: str, beta: float, responses: Sequence[Response], renderer: Renderer, dtype: str
) -> list[TokenRewards]:
    """The rewards of all tokens; one model is in memory at a time, both in the same precision.

    Args:
        policy: folder or Hub id of the trained policy.
        reference: of the model that it was trained from.
        beta: of the training.
        responses: with their prompts.
        renderer: of the policy.
        dtype: of the weights.

    Raises:
        ModelError: a model cannot be loaded, or the two have different vocabularies.
    """
    samples = [response.sample for response in responses]
    logps = _scored(policy, samples, renderer.tokenizer, dtype)
    ref_logps = _scored(reference, samples, renderer.tokenizer, dtype)
    found = []
    for response, own, ref in zip(responses, logps, ref_logps, strict=True):
        start = response.sample.loss_mask.index(1)
        ids = response.sample.ids[start:]
        rewards = objective(own[start:].double(), ref[start:].double(), beta).tolist()
        found.append(
            TokenRewards(
                id=response.id,
                role=response.role,
                prompt=renderer.tokenizer.decode(response.sample.ids[:start]),
                ids=ids,
                pieces=text_pieces(renderer.tokenizer, ids),
                logps=[round(value, 6) for value in own[start:].tolist()],
                ref_logps=[round(value, 6) for value in ref[start:].tolist()],
                rewards=rewards,
                reward=sum(rewards),
                beta=beta,
            )
        )
    return found


def write_token_rewards(path: Path, rewards: Iterable[TokenRewards]) -> None:
    """One JSON object per response and line."""
    write_text_atomic(path, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in rewards))


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. Of a character that several tokens make, the last one gets all of it."""
    pieces: list[str] = []
    before, pending = "", []
    for place, token in enumerate(ids):
        pending.append(token)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and place + 1 < len(ids):
            pieces.append("")  # the rest of the character is still to come
            continue
        pieces.append(text.removeprefix(before))
        # The next token is decoded behind this one: at the start of a text some tokenizers drop a space.
        pending = [token]
        before = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
    return pieces


def _traces(path: Path) -> Iterator[Trace]:
    for trace in read_traces([path]).traces:
        if trace.text or trace.ids:
            yield trace


def _of(trace: Trace, renderer: Renderer) -> Sample:
    if trace.prompt_ids is None or trace.ids is None:
        return renderer.sample(Example(trace.problem, trace.text))
    mask = [0] * len(trace.prompt_ids) + [1] * len(trace.ids)
    return Sample(trace.prompt_ids + trace.ids, mask, Origin.POLICY, trace.problem_id)


def _scored(path: str, samples: Sequence[Sample], own: PreTrainedTokenizerBase, dtype: str) -> list[Tensor]:
    """Log-probs (T,) of every sample under a model."""
    model, tokenizer = load_policy(ModelConfig(path=path, dtype=dtype), seed=0)
    if tokenizer.get_vocab() != own.get_vocab():
        raise ModelError("its vocabulary is not that of the policy, so tokens cannot be compared", where=path)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    limit = getattr(model.config, "max_position_embeddings", None)
    for sample in samples:
        if limit is not None and len(sample.ids) > limit:
            raise DataError(
                f"{len(sample.ids)} tokens, and the model has {limit} positions", where=sample.problem_id or path
            )
    prepare(model)
    found: dict[int, Tensor] = {}
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    for batch in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
        tensors = collate([samples[i] for i in batch], own.pad_token_id)
        inputs = [tensors[name].to(model.device) for name in ("ids", "attention_mask", "mask")]
        scored = token_logps(model, *inputs)[0].float().cpu()
        found |= {i: row[: len(samples[i].ids)] for i, row in zip(batch, scored, strict=True)}
    return [found[i] for i in range(len(samples))]
