"""The reference of a run: which model it is, whether it must stay in memory, and what an earlier run left of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.config.schema import Recipe
from posttrain.data.fitted import PreferenceRow
from posttrain.data.offline_rows import OfflineRow
from posttrain.errors import ModelError
from posttrain.methods.base import Method, OfflineMethod, OnlineMethod, PointwiseMethod, PreferenceMethod
from posttrain.models.adapters import continued
from posttrain.models.loading import load_policy
from posttrain.models.reference import Reference, frozen_copy
from posttrain.models.reference_cache import ReferenceCache, samples_hash, weights_hash
from posttrain.models.size import non_embedding_parameters
from posttrain.trainers.shell import Shell


class ReferencePlan:
    """What is decided before the policy is wrapped. Call on all ranks.

    Attributes:
        copy: a frozen copy of the start; None where the adapter is switched off instead, or where the log-probs of an
            earlier run are all that the method asks for.
        cache: where the log-probs of the rows are kept; None without `reference.cache`.
        known: what it had; None if nothing.
        continued: whether the reference keeps the adapter that the policy goes on with.
        parameters: of the reference, as compute is counted, without an adapter's.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        items: Sequence[PreferenceRow | OfflineRow],
        model: PreTrainedModel,
        template_hash: str,
        ranks: PartialState,
    ) -> None:
        other = None if recipe.reference is None else recipe.reference.path
        self.adapted = recipe.model.adapted and other is None
        self.continued = self.adapted and continued(recipe.model) is not None
        if other is not None:
            model = other_model(recipe, other, model)
        self.parameters = non_embedding_parameters(model)
        self.other_hash = None if other is None else weights_hash(model)
        self.rows_only = not self.adapted and _rows_only(recipe, method)
        self.cache: ReferenceCache | None = None
        self.known: list[Tensor] | None = None
        if recipe.reference is not None and recipe.reference.cache is not None:
            made_from = {
                "weights": weights_hash(model),
                "rows": samples_hash(sample for item in items for sample in item.responses.values()),
                "template": template_hash,
                "precision": f"{model.dtype}, autocast {recipe.training.bf16}, {ranks.device.type}",
            }
            self.cache = ReferenceCache(Path(recipe.reference.cache), made_from)
            self.known = _read_once(self.cache, ranks)
        kept = not self.adapted and (self.known is None or not self.rows_only)
        self.copy = frozen_copy(model) if kept else None

    def content(self) -> dict[str, str]:
        """What `state.identity` compares beside the run's own weights: the hash of another model, if it is one."""
        return {} if self.other_hash is None else {"reference": self.other_hash}

    def build(self, shell: Shell) -> Reference:
        """The reference itself."""
        if self.copy is not None:
            model, without_adapter = shell.prepare_frozen(self.copy), None
        elif self.continued:  # without its adapter it would be the base, which is not the start
            model, without_adapter = shell.start_of_adapter().model, None
        elif self.adapted:
            model = shell.accelerator.unwrap_model(shell.model)
            without_adapter = model.disable_adapter
        else:
            model, without_adapter = None, None
        return Reference(model, without_adapter, cache=self.cache, known=self.known, rows_only=self.rows_only)


def load_guide(recipe: Recipe, method: Method, shell: Shell, policy: PreTrainedModel) -> Reference | None:
    """The further frozen model whose log-probs an online method reads, if it names one.

    Raises:
        ModelError: it cannot be loaded, or has another vocabulary than the policy.
    """
    path = method.guide if isinstance(method, OnlineMethod) else None
    if path is None:
        return None
    return Reference(shell.prepare_frozen(frozen_copy(other_model(recipe, path, policy, "the guide", "method"))))


def other_model(
    recipe: Recipe, path: str, policy: PreTrainedModel, what: str = "the reference", where: str = "reference.path"
) -> PreTrainedModel:
    """A model that the recipe names, as the reference or beside it.

    Raises:
        ModelError: it cannot be loaded, or has another vocabulary than the policy.
    """
    model, _ = load_policy(recipe.model.of_folder(path), seed=recipe.seed)
    sizes = [each.get_input_embeddings().num_embeddings for each in (model, policy)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{what} has a vocabulary of {sizes[0]:,} tokens, the policy one of {sizes[1]:,}",
            where=where,
            hint="take a model that was made from the same one as the policy",
        )
    return model


def _rows_only(recipe: Recipe, method: Method) -> bool:
    """Whether nothing but the rows of the data is scored by the reference, and it stays the same."""
    held_out = recipe.evaluation is not None and recipe.evaluation.preferences is not None
    if isinstance(method, OfflineMethod):
        return not method.reads_full_kl
    if isinstance(method, PointwiseMethod) and method.scores == "mismatched":
        return False
    return isinstance(method, PreferenceMethod) and not (
        method.samples_per_prompt or method.refresh_reference or held_out
    )


def _read_once(cache: ReferenceCache, ranks: PartialState) -> list[Tensor] | None:
    """What the main rank finds, on all ranks: they must agree on whether the rows are scored."""
    found: list[Any] = [(cache.read(), cache.damaged) if ranks.is_main_process else None]
    if ranks.num_processes > 1:
        broadcast_object_list(found)
    known, cache.damaged = found[0]
    return known
