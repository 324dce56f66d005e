"""Which pairs both kinds of reward can read, and their tokens for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from posttrain.config.rewards import RewardsConfig
from posttrain.config.schema import ModelConfig
from posttrain.data.preferences import usable
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Preference, Sample
from posttrain.data.truncation import Ledger, fit_groups
from posttrain.errors import ModelError
from posttrain.models.start_files import load_config
from posttrain.models.tokenizer import load_tokenizer

Loaded = TypeVar("Loaded")

ROLES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class RewardRows:
    """P pairs as both kinds of model read them.

    Attributes:
        prompts: of each pair.
        lengths: tokens of chosen minus rejected.
        language, classifier: 2P sequences, chosen then rejected; empty without such a model.
        ledger: what became of the rows.
    """

    prompts: list[str]
    lengths: list[int]
    language: list[Sample]
    classifier: list[Sample]
    ledger: Ledger


def fit_rewards(config: RewardsConfig, pairs: dict[str, list[Preference]]) -> dict[str, RewardRows]:
    """Tokens of the pairs that both kinds of model can read within the limits."""
    readers: dict[str, Callable[[Example], Sample]] = {}
    positions: list[int] = []
    head_ids: list[int] = []
    if config.implicit is not None:
        tokenizer, longest = _reader("implicit.policy", config.implicit.policy)
        renderer = Renderer(tokenizer)
        _check_same_tokenizer(config, tokenizer)
        readers["language"], head_ids = renderer.sample, renderer.head_ids
        positions.append(longest)
    if config.explicit is not None:
        tokenizer, longest = _reader("explicit.path", config.explicit.path)
        readers["classifier"] = Renderer(tokenizer).conversation
        positions.append(longest)
    limit = config.max_length or min(positions)
    return {name: _fit_one(config, rows, readers, limit, head_ids) for name, rows in pairs.items()}


def _fit_one(
    config: RewardsConfig,
    rows: Sequence[Preference],
    readers: dict[str, Callable[[Example], Sample]],
    limit: int,
    head_ids: Sequence[int],
) -> RewardRows:
    kept, unusable = usable(rows)
    dropped = unusable.identical + unusable.empty
    groups = [
        {
            f"{kind} {role}": read(Example(row.problem, getattr(row, role)))
            for kind, read in readers.items()
            for role in ROLES
        }
        for row in kept
    ]
    fitted, ledger = fit_groups(
        groups,
        config.max_prompt_length,
        limit,
        config.too_long,
        config.max_lost_share,
        head_ids=head_ids,
        ledger=Ledger(dropped=dropped, identical=unusable.identical, empty=unusable.empty),
    )
    by_id = {row.problem.id: row for row in kept}
    first = next(iter(readers))
    prompts = [by_id[group[f"{first} chosen"].problem_id].problem.prompt for group in fitted]
    tokens = [[sum(group[f"{first} {role}"].loss_mask) for role in ROLES] for group in fitted]
    sequences = {
        kind: [group[f"{kind} {role}"] for role in ROLES for group in fitted] if kind in readers else []
        for kind in ("language", "classifier")
    }
    return RewardRows(
        prompts=[prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts],
        lengths=[chosen - rejected for chosen, rejected in tokens],
        ledger=ledger,
        **sequences,
    )


def _reader(key: str, path: str) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer of a model, and how many positions it has."""
    model = ModelConfig(path=path)
    tokenizer = loaded(key, lambda: load_tokenizer(model))
    return tokenizer, load_config(model).get_text_config().max_position_embeddings


def _check_same_tokenizer(config: RewardsConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    other = loaded("implicit.reference", lambda: load_tokenizer(ModelConfig(path=config.implicit.reference)))
    if other.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{config.implicit.policy!r} and {config.implicit.reference!r} have different tokenizers",
            where="implicit.reference",
            hint="give the model that the policy was trained from",
        )


def loaded(key: str, load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives; its errors name the key."""
    try:
        return load()
    except ModelError as error:
        raise ModelError(error.what, where=key, hint=error.hint) from error
