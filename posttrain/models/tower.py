"""Small models of text and pictures with random weights: the text model of `model.init` behind a tower of its own.

Of the type Idefics3, whose tower and projector are plain: patches, a SigLIP encoder, and one linear layer that makes a
token of neighbouring patches.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText, Idefics3Config, PreTrainedModel, PreTrainedTokenizerFast

from posttrain.config.pictures import TowerInit
from posttrain.config.schema import ModelInit
from posttrain.models.initial import text_config
from posttrain.models.picture_classifier import classifier_class


def build_with_tower(
    config: ModelInit,
    tower: TowerInit,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    dtype: torch.dtype,
    classifier: bool = False,
) -> PreTrainedModel:
    """A model with random weights, of texts or with one output for each; the same weights for the same seed, whatever
    ran before."""
    text = text_config(config, tokenizer)
    made = Idefics3Config(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": tower.hidden_size,
            "intermediate_size": 3 * tower.hidden_size,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
        },
        scale_factor=tower.merge,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )
    if classifier:
        made.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = classifier_class(made)._from_config if classifier else AutoModelForImageTextToText.from_config
        return kind(made, dtype=dtype)
