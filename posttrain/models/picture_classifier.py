"""Sequence classifiers of models of text and pictures: reward models and value models that see what they judge.

transformers has a class of these for some types, Gemma 3 among them. For the others one is made here of the same parts:
the type's own model of text and pictures, and the head and the way to the last token of its classifiers of text.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from posttrain.errors import ModelError


def reads_pictures(config: PretrainedConfig) -> bool:
    """Whether models of this type read text and pictures."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def classifier_class(config: PretrainedConfig) -> Any:
    """The class of sequence classifiers of a type.

    Raises:
        ModelError: models of this type read no pictures.
    """
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    if not reads_pictures(config):
        raise ModelError(
            f"a model of type {config.model_type!r} reads no pictures",
            where="model.path",
            hint="take one of text and pictures (docs/pictures.md), or leave out `model.pictures` and `images`",
        )
    return _made(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])


@lru_cache
def _made(language_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The classifier beside a language model, as transformers writes its own."""
    base = next(each for each in language_model.__mro__[1:] if issubclass(each, PreTrainedModel))
    name = f"{base.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, base), {"__module__": __name__})
