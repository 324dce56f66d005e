"""Texts that are being written, a token per row at a time, by a model and whatever state it keeps of them.

Three ways, the fastest that is right for a model (`sampling_way`):

- `padded`: a cache; prompts of any length beside each other, padded on the left.
- `equal`: a cache; only prompts of equal length beside each other. A recurrent state, or positions that count from the
  first column, would take in the padding.
- `whole`: no cache; every row is read again for each token.

Caches are changed through transformers' own interface, which all kinds of layers have.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.proof import FAILURES, MARGIN, rms, rounded_layers, rounding, trial_rows, undisturbed
from posttrain.models.sharing import EYES
from posttrain.rollouts.shared_prompts import Prompts, go_on, read

Way = Literal["padded", "equal", "whole"]

_log = logging.getLogger(__name__)
_known: dict[tuple[object, ...], Way] = {}


class Texts(Protocol):
    """Texts that a model has read and goes on from.

    Attributes:
        logits: (rows, V) of what follows each text.
    """

    logits: Tensor

    def repeat(self, copies: int) -> None:
        """Every row so many times, copies beside each other."""

    def select(self, rows: Tensor) -> None:
        """These rows, in order and possibly several times."""

    def advance(self, tokens: Tensor) -> None:
        """A token more per row."""


@dataclass(slots=True)
class CachedTexts:
    """With a cache, and an attention mask (rows, columns) with zeros for padding on the left."""

    model: PreTrainedModel
    logits: Tensor
    cache: Cache
    attention: Tensor

    def repeat(self, copies: int) -> None:
        if copies > 1:
            self.select(torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(copies))

    def select(self, rows: Tensor) -> None:
        self.logits, self.attention = self.logits[rows], self.attention[rows]
        self.cache.reorder_cache(rows)

    def advance(self, tokens: Tensor) -> None:
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(self.attention), 1)], dim=1)
        # Only rows that have ended already can come to the end of the model's positions.
        last = (positions(self.model) or self.attention.size(1)) - 1
        place = (self.attention.sum(1, keepdim=True) - 1).clamp(max=last)
        self.logits = go_on(self.model, tokens.unsqueeze(1), self.attention, place, self.cache)


class WholeTexts:
    """Without a cache."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts) -> None:
        self.model, self.rows = model, [list(prompt) for prompt in prompts]
        self.logits = self._read()

    def repeat(self, copies: int) -> None:
        self.select(torch.arange(len(self.rows)).repeat_interleave(copies))

    def select(self, rows: Tensor) -> None:
        self.logits = self.logits[rows.to(self.logits.device)]
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def advance(self, tokens: Tensor) -> None:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        self.logits = self._read()

    def _read(self) -> Tensor:
        """Padded on the right, which no token before it sees."""
        limit = positions(self.model)
        rows = [row[:limit] for row in self.rows]  # only those that have ended already can be longer
        width, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        attention = (torch.arange(width, device=device) < lengths[:, None]).long()
        logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        return logits[torch.arange(len(rows), device=device), lengths - 1]


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model takes; None for any number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def read_texts(model: PreTrainedModel, prompts: Prompts, pad_id: int, way: Way) -> Texts:
    """Read prompts, of equal length with way `equal`. Call without gradients."""
    if way == "whole":
        return WholeTexts(model, prompts)
    return CachedTexts(model, *read(model, prompts, pad_id))


# ------------------------------------------------------------------------------------------------------------ the way


def sampling_way(model: PreTrainedModel, pad_id: int) -> Way:
    """The fastest way in which a model's logits, text by text, are those of its own forward without a cache.

    A few steps of each way are tried, in a process once for all models of one config, dtype and device; says so once
    where it is not the fastest. Draws nothing. The weights must be whole.

    Raises:
        ModelError: none of them is right.
    """
    seen = hasattr(model, EYES) and getattr(model, EYES).has_seen
    key = (type(model), model.config.to_json_string(use_diff=False), model.dtype, model.device.type, seen)
    if key not in _known:
        _known[key] = _found_out(model, pad_id)
    return _known[key]


def _found_out(model: PreTrainedModel, pad_id: int) -> Way:
    first, second, third = trial_rows(model, None)
    starts: dict[Way, list[list[int]]] = {
        "padded": [first[:-2], third],
        "equal": [first[:-2], second[:-2]],
        "whole": [first[:-2], third],
    }
    why = ""
    with undisturbed(model), torch.no_grad():
        for way, prompts in starts.items():
            try:
                why = _difference(model, partial(read_texts, model, prompts, pad_id, way), prompts)
            except FAILURES as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why = f"it cannot be computed ({type(error).__name__})"
            if why is None:
                _say(model.config.model_type, way)
                return way
    raise ModelError(
        f"models of type {model.config.model_type!r} cannot be sampled from: row by row, {why}",
        where="model.path",
        hint="take a causal language model",
    )


@functools.cache
def _say(model_type: str, way: Way) -> None:
    if way == "equal":
        _log.warning(f"sampling from models of type {model_type!r} reads only prompts of equal length at once")
    elif way == "whole":
        _log.warning(f"sampling from models of type {model_type!r} reads every row again for each token: no cache fits")


def _difference(model: PreTrainedModel, start: Callable[[], Texts], prompts: Prompts) -> str | None:
    """What differs beyond rounding when two prompts are copied, chosen from and continued; None if nothing does."""
    texts, own = start(), [list(prompt) for prompt in prompts]
    found, wanted = [texts.logits], list(own)
    texts.repeat(2)
    own = [own[0], own[0], own[1], own[1]]
    vocabulary = min(model.get_input_embeddings().num_embeddings, model.config.get_text_config().vocab_size)
    for rows, tokens in (([3, 0, 2], [5, 6, 7]), ([1, 2], [8, 9])):
        tokens = [token % vocabulary for token in tokens]
        texts.select(torch.tensor(rows, device=model.device))
        texts.advance(torch.tensor(tokens, device=model.device))
        own = [[*own[row], token] for row, token in zip(rows, tokens, strict=True)]
        found.append(texts.logits)
        wanted += own
    exact = _alone(model, wanted)
    with rounded_layers(model):
        allowed = _alone(model, wanted) - exact
    limit = MARGIN * max(rms(allowed), rounding(exact.dtype) * rms(exact))
    off = rms(torch.cat(found).float().log_softmax(-1) - exact)
    return None if off <= limit else f"log-probs differ by {off:.2g} nats, where rounding makes {limit:.2g}"


def _alone(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    found = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1])
    return torch.stack(found).float().log_softmax(-1)
