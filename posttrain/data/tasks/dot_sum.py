"""Dot sum, level n = cells with dots: a picture of 3, 8 and 5 dots is answered by `3+8+5=;3+8=11;11+5=16;#16`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from posttrain.data.tasks.seen_sum import SeenSum

if TYPE_CHECKING:
    from PIL.Image import Image

DOT = 2
"""Pixels of a dot, which stands at one of nine places of its cell."""


class DotSum(SeenSum):
    """Dots to count."""

    name = "dot_sum"

    def draw(self, image: Image, corner: tuple[int, int], number: int, rng: random.Random) -> None:
        left, top = corner
        for place in rng.sample(range(9), number):
            x, y = left + 1 + DOT * (place % 3), top + 1 + DOT * (place // 3)
            image.paste(255, (x, y, x + DOT, y + DOT))


TASK = DotSum()
