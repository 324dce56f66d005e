"""Digit sum, level n = digits: a picture with 3, 8 and 5 drawn in it is answered by `3+8+5=;3+8=11;11+5=16;#16`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from posttrain.data.tasks.seen_sum import CELL, SeenSum

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 3, 5
"""Pixels of a digit."""

GLYPHS = {
    1: "010 110 010 010 111",
    2: "110 001 010 100 111",
    3: "110 001 010 001 110",
    4: "101 101 111 001 001",
    5: "111 100 110 001 110",
    6: "011 100 111 101 111",
    7: "111 001 010 010 010",
    8: "111 101 111 101 111",
    9: "111 101 111 001 110",
}
"""Rows of the digits, from above."""


class DigitSum(SeenSum):
    """Digits to read, each anywhere within its cell, some fainter than others."""

    name = "digit_sum"

    def draw(self, image: Image, corner: tuple[int, int], number: int, rng: random.Random) -> None:
        left, top = corner[0] + rng.randint(0, CELL - WIDTH), corner[1] + rng.randint(0, CELL - HEIGHT)
        shade = rng.randint(128, 255)
        for y, row in enumerate(GLYPHS[number].split()):
            for x, filled in enumerate(row):
                if filled == "1":
                    image.putpixel((left + x, top + y), shade)


TASK = DigitSum()
