"""The reference policy as an explicit object: a frozen copy, the policy with its adapter switched off, or its log-probs
from an earlier run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.models.full_divergence import ReferenceStates
from posttrain.models.modes import without_dropout
from posttrain.models.reference_cache import ReferenceCache
from posttrain.models.token_logps import token_logps, token_states


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the weights as they are now, in eval mode, without gradients. Never reloaded from a path."""
    reference = copy.deepcopy(model).eval()
    reference.requires_grad_(False)
    return reference


class Reference:
    """A frozen model that log-probs are compared with.

    Args:
        model: a model made ready by `token_logps.prepare`: a frozen copy, or the policy itself. None where all that
            will be asked for is `known`.
        without_adapter: for the policy itself, a context manager factory that switches its adapter off.
        cache: where the log-probs of the rows go.
        known: the log-probs of all sequences of all rows, as the cache had them.
        rows_only: nothing but these rows will be asked for, so that the model may go once they are known.
    """

    def __init__(
        self,
        model: torch.nn.Module | None,
        without_adapter: Callable[[], AbstractContextManager] | None = None,
        *,
        cache: ReferenceCache | None = None,
        known: list[Tensor] | None = None,
        rows_only: bool = False,
    ) -> None:
        self.model, self.without_adapter = model, without_adapter
        self.cache, self.known, self.rows_only = cache, known, rows_only

    def keep(self, logps: list[Tensor], *, write: bool) -> None:
        """Take the log-probs of all sequences of all rows as known, and write them to the cache if asked to.

        Raises:
            StateError: the cache cannot be written.
        """
        if write:
            assert self.cache is not None
            self.cache.write(logps)
        self.known = logps
        if self.rows_only:
            self.model = None

    @torch.no_grad()
    def token_logps(self, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """Log-probs (B, T) of the tokens under `mask`, aligned to tokens."""
        with self._frozen() as model:
            return token_logps(model, ids, attention_mask, mask)[0]

    @torch.no_grad()
    def token_states(self, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> ReferenceStates:
        """What a divergence over the whole vocabulary reads, of the tokens under `mask`."""
        with self._frozen() as model:
            return token_states(model, ids, attention_mask, mask)

    @contextmanager
    def _frozen(self) -> Iterator[torch.nn.Module]:
        """The model as the reference: without its adapter if it is the policy."""
        if self.model is None:
            raise RuntimeError("this reference is not in memory: it knows the log-probs of its rows only")
        if self.without_adapter is None:
            yield self.model
            return
        with without_dropout(self.model), self.without_adapter():
            yield self.model
