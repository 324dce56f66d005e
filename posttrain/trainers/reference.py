"""The reference of a run: which model it is, whether it must stay in memory, and what an earlier run left of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.config.relative_paths import named_by
from posttrain.config.schema import Recipe
from posttrain.data.fitted import PreferenceRow
from posttrain.data.offline_rows import OfflineRow
from posttrain.data.rendering import Renderer
from posttrain.methods.base import Method, OfflineMethod, PointwiseMethod, PreferenceMethod
from posttrain.methods.companions import Divergence, Scorer, ServedScorer
from posttrain.models.adapters import continued
from posttrain.models.loading import load_policy
from posttrain.models.reference import Reference, frozen_copy
from posttrain.models.reference_cache import ReferenceCache, samples_hash, weights_hash
from posttrain.models.size import non_embedding_parameters, size_of
from posttrain.models.vocabulary import blamed_on, check_same_vocabulary
from posttrain.tracking.ledger import Size
from posttrain.trainers.ranks import with_main_rank
from posttrain.trainers.scoring import ScoringModel
from posttrain.trainers.served_teacher import reach_teacher
from posttrain.trainers.sharded_start import loaded, never_taken_apart, of_the_weights, shares_out
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
        renderer: Renderer,
        ranks: PartialState,
    ) -> None:
        other = None if recipe.reference is None else recipe.reference.path
        self.adapted = recipe.model.adapted and other is None
        self.continued = self.adapted and continued(recipe.model) is not None
        if other is not None:
            model = loaded(ranks, lambda: other_model(recipe, other, renderer, "reference.path"))
        self.parameters = non_embedding_parameters(model)
        self.other_hash = None if other is None else of_the_weights(ranks, lambda: weights_hash(model))
        self.rows_only = not self.adapted and _rows_only(recipe, method)
        self.cache: ReferenceCache | None = None
        self.known: list[Tensor] | None = None
        if recipe.reference is not None and recipe.reference.cache is not None:
            made_from = {
                "weights": of_the_weights(ranks, lambda: weights_hash(model)),
                "rows": samples_hash(sample for item in items for sample in item.responses.values()),
                "template": renderer.template_hash,
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


def load_scorer(recipe: Recipe, method: Method, shell: Shell, renderer: Renderer) -> tuple[ScoringModel, Size] | None:
    """The frozen model that scores rollouts and its size, if the method names one.

    Raises:
        ModelError: it cannot be loaded, or has another vocabulary than the policy.
        EngineError: its server does not answer, or has another model.
    """
    ranks = PartialState()
    served = method.needs.companion(ServedScorer)
    if served is not None:
        teacher = with_main_rank(ranks, lambda: reach_teacher(recipe, served, renderer))
        return teacher, teacher.size
    scorer = method.needs.companion(Scorer)
    if scorer is None:
        return None
    with never_taken_apart(shell.args) if shares_out(ranks) else nullcontext():
        model = loaded(ranks, lambda: beside_the_policy(recipe, scorer.path, renderer))
    frozen = frozen_copy(model)
    size = size_of(frozen)
    return ScoringModel(Reference(shell.prepare_frozen(frozen)), "scorer"), size


def beside_the_policy(recipe: Recipe, path: str, renderer: Renderer) -> PreTrainedModel:
    """A model that the method's section names. Errors as for `other_model`."""
    return other_model(recipe, path, renderer, named_by(recipe.method, path))


def other_model(recipe: Recipe, path: str, renderer: Renderer, where: str) -> PreTrainedModel:
    """A model that the recipe names, as the reference or beside it.

    Args:
        recipe: of the run.
        path: folder or Hub id.
        renderer: with the policy's tokenizer.
        where: the key that names the model.

    Raises:
        ModelError: it cannot be loaded, or has another vocabulary than the policy.
    """
    with blamed_on(where):
        model, tokenizer = load_policy(recipe.model.of_folder(path), seed=recipe.seed)
    check_same_vocabulary(renderer, tokenizer, where)
    return model


def _rows_only(recipe: Recipe, method: Method) -> bool:
    """Whether nothing but the rows of the data is scored by the reference, and it stays the same."""
    held_out = recipe.evaluation is not None and recipe.evaluation.preferences is not None
    if isinstance(method, OfflineMethod):
        return method.needs.companion(Divergence) is None
    if isinstance(method, PointwiseMethod) and method.scores == "mismatched":
        return False
    return isinstance(method, PreferenceMethod) and not (method.needs.samples or method.refresh_reference or held_out)


def _read_once(cache: ReferenceCache, ranks: PartialState) -> list[Tensor] | None:
    """What the main rank finds, on all ranks: they must agree on whether the rows are scored."""
    found: list[Any] = [(cache.read(), cache.damaged) if ranks.is_main_process else None]
    if ranks.num_processes > 1:
        broadcast_object_list(found)
    known, cache.damaged = found[0]
    return known
