"""A teacher whose weights a server has (`companions.ServedScorer`): which it is, and what it says of micro-batches.

The run begins with a row of fixed tokens, the canary, and asks about it again behind every batch of rows, and after
resuming: a server that has been started with other weights is noticed, and what it says is not used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from posttrain.config.keys import key_from
from posttrain.config.positions import config_json
from posttrain.config.relative_paths import named_by
from posttrain.config.schema import Recipe
from posttrain.data.rendering import Renderer
from posttrain.errors import EngineError
from posttrain.methods.companions import ServedScorer
from posttrain.models.collate import Tensors
from posttrain.models.full_divergence import ReferenceStates
from posttrain.models.size import size_of
from posttrain.models.start_files import load_config, unloadable
from posttrain.models.tokenizer import load_tokenizer
from posttrain.models.vocabulary import blamed_on, check_same_vocabulary
from posttrain.rollouts.teacher_client import GO_ON, ServedRow, TeacherClient
from posttrain.rollouts.vllm_client import in_parallel
from posttrain.rollouts.vllm_key import read_key
from posttrain.tracking.ledger import Role, Size
from posttrain.trainers.scoring import ScoringModel

CANARY = 64
"""Tokens of the row that tells one teacher from another; fewer where the vocabulary has fewer."""

REST = 1e-7
"""Probability that is left for the tokens beyond the likeliest where rounding leaves less: float32 knows no smaller
one beside 1."""


class ServedTeacher(ScoringModel):
    """Scores rows by asking a server.

    Args:
        client: of the server.
        canary: the row of fixed tokens.
        size: of the teacher.
        vocabulary: rows of its embeddings.

    Raises:
        EngineError: the server does not answer, has another model or another tokenizer.
    """

    role: Role = "scorer"

    def __init__(self, client: TeacherClient, canary: Sequence[int], size: Size, vocabulary: int) -> None:
        self.client, self.canary, self.size, self.vocabulary = client, list(canary), size, vocabulary
        client.check_model()
        self.at_start = client.score(self.canary).logps

    def token_logps(self, inputs: Tensors, device: torch.device) -> Tensor:
        found = torch.zeros(inputs["mask"].shape)
        for row, scored in enumerate(self._scored(inputs)):
            if scored is not None:
                found[row, 1 : 1 + len(scored.logps)] = torch.from_numpy(scored.logps).float()
        return (found * inputs["mask"].cpu()).to(device)

    def token_states(self, inputs: Tensors, device: torch.device) -> ReferenceStates:
        """In place of hidden states: ids and log-probs of the likeliest tokens, which `distribution` spreads out."""
        k = self.client.top_k
        found = torch.zeros(*inputs["mask"].shape, 2 * k, dtype=torch.float64)
        for row, scored in enumerate(self._scored(inputs)):
            if scored is not None:
                both = np.concatenate([scored.top_ids, scored.top_logps], axis=1)
                found[row, 1 : 1 + len(both)] = torch.from_numpy(both)
        spread = functools.partial(distribution, vocabulary=self.vocabulary)
        return ReferenceStates(found.to(device), spread)

    def close(self) -> None:
        self.client.close()

    def kept(self) -> tuple[Mapping[str, Tensor], Any]:
        return {"canary": torch.from_numpy(self.at_start)}, None

    def take(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        before = tensors["canary"].numpy()
        self._same(before, self.at_start, "when the checkpoint was written")
        self.at_start = before

    def _scored(self, inputs: Tensors) -> list[ServedRow | None]:
        """What the server says of the rows that have a token under the mask; up to the last such token."""
        rows, asked = [], []
        for ids, mask in zip(inputs["ids"].tolist(), inputs["mask"].cpu(), strict=True):
            places = mask.nonzero()
            rows.append(ids[: int(places[-1]) + 1] if len(places) else None)
        asked = [row for row in rows if row is not None]
        jobs = [functools.partial(self.client.score, row) for row in asked]
        answers = iter(in_parallel(jobs, self.client.server.requests) if jobs else ())
        self._same(self.at_start, self.client.score(self.canary).logps, "at the start")
        return [None if row is None else next(answers) for row in rows]

    def _same(self, before: np.ndarray, now: np.ndarray, when: str) -> None:
        limit, where = self.client.server.canary_limit, self.client.where
        if len(before) != len(now):
            raise EngineError(f"the canary had {len(before)} log-probs {when}, and has {len(now)}", where=where)
        apart = float(np.abs(before - now).mean())
        if apart > limit:
            raise EngineError(
                f"the server at {self.client.url} has another model than {when}: log-probs of fixed tokens differ by "
                f"{apart:.3g} nats on average, with a limit of {limit:g}",
                where=where,
                hint=f"start it with the teacher of this run, {GO_ON}",
            )


@torch.no_grad()
def distribution(states: Tensor, *, vocabulary: int) -> Tensor:
    """(n, 2k) ids and log-probs of the k likeliest tokens -> (n, V) log-probs: the rest of the mass is spread evenly
    over all others, so that `on_support` with this k, or a lower one, finds the same tokens and the same rest."""
    k = states.shape[1] // 2
    ids, logps = states[:, :k].long(), states[:, k:]
    if k >= vocabulary:
        return (
            torch.empty(len(states), vocabulary, dtype=states.dtype, device=states.device)
            .scatter(1, ids, logps)
            .float()
        )
    rest = (1 - logps.exp().sum(1, keepdim=True)).clamp(min=REST)
    even = (rest.log() - math.log(vocabulary - k)).minimum(logps[:, -1:])
    return even.expand(-1, vocabulary).scatter(1, ids, logps).float()


def reach_teacher(recipe: Recipe, wanted: ServedScorer, renderer: Renderer) -> ServedTeacher:
    """The teacher of a run, once its server has shown that it has it.

    Raises:
        ModelError: tokenizer or config.json of the teacher cannot be read, or the vocabulary is not the policy's.
        EngineError: no key, no answer, or another model or tokenizer on the server.
    """
    server, model = wanted.server, recipe.model.of_folder(wanted.path)
    where = named_by(recipe.method, wanted.path)
    with blamed_on(where):
        check_same_vocabulary(renderer, load_tokenizer(model), where)
        config_json(model)  # within bounds
        config = load_config(model)
        try:
            with torch.device("meta"):
                outline = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        except (ValueError, ImportError) as error:
            raise unloadable(model, error) from error
    key = read_key(server.url)
    if server.api_key_env is not None:
        key = key_from(server.api_key_env, where=f"{wanted.key}.api_key_env", error=EngineError)
    vocabulary = outline.get_input_embeddings().num_embeddings
    client = TeacherClient(
        server,
        model=server.served_as or wanted.path,
        decode=functools.cache(lambda number: renderer.tokenizer.decode([number])),
        vocabulary=vocabulary,
        top_k=min(wanted.top_k, vocabulary),
        api_key=key,
        where=wanted.key,
    )
    known = sorted(renderer.tokenizer.get_vocab().values())
    canary = known[:: max(1, len(known) // CANARY)][:CANARY]
    return ServedTeacher(client, canary, size_of(outline.requires_grad_(False)), vocabulary)
