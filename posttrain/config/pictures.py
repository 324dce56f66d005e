"""Pictures: what a recipe says about a vision-language model. `config.pictured` has what does not go with one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.section import Section

Part = Literal["language", "projector", "tower"]


class TowerInit(Section):
    """The part of a small model that looks at pictures, which it scales to squares; only with `model.init`."""

    image_size: int = Field(32, ge=4, le=2048, description="pixels of a side, to which a picture is scaled")
    patch_size: int = Field(8, ge=1, le=256, description="pixels of a side of a patch; divides image_size")
    merge: int = Field(1, ge=1, le=16, description="patches along a side that become one token")
    hidden_size: int = Field(64, ge=8, le=100_000, description="width; a multiple of `heads`")
    layers: int = Field(1, ge=1, le=1_000, description="number of layers")
    heads: int = Field(2, ge=1, description="attention heads")

    @model_validator(mode="after")
    def _divides(self) -> TowerInit:
        if self.image_size % (self.patch_size * self.merge):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size * merge {self.patch_size * self.merge}"
            )
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return (self.image_size // (self.patch_size * self.merge)) ** 2


class PictureConfig(Section):
    """The model is one of text and pictures, which rows hold where their source names `images`."""

    train: list[Part] = Field(
        ["language"],
        min_length=1,
        description="parts that are trained, or get the adapter: the language model, the projector into it, the tower "
        "that looks at pictures",
    )
    init: TowerInit = Field(TowerInit(), description="with `model.init`: the tower that is made")
