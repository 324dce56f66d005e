"""Small copies of the pictures in a run's samples, beside these: `pictures/`, a file named by the hash of each.

A name is what a sample's text says of a picture (`picture_text.shown`), so that a copy is written once and holds for
every step. Only what Pillow has made of a picture is written, never its own bytes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.bounded_files import read_bytes
from posttrain.errors import DataError
from posttrain.safe_files import file_atomic

if TYPE_CHECKING:
    from posttrain.data.picture_text import PictureText

FOLDER = "pictures"

SIDE = 160
"""Most pixels of a side."""

MAX_BYTES, MAX_ALL = 64 * 2**10, 4 * 2**20
"""Of a copy, and of all copies in one report."""

NAMED = re.compile(r"\[picture ([0-9a-f]{8}), ")
"""How a text names a picture."""

HEAD = b"\xff\xd8\xff"
"""Of a JPEG."""


def keep_thumbnails(pictures: PictureText, ids: Sequence[int], run_dir: Path) -> None:
    """Write copies of the pictures of a sequence that are not there yet."""
    for seen in pictures.seen_among(ids):
        path = run_dir / FOLDER / f"{seen.picture.digest[:8]}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        image = seen.picture.load()
        image.thumbnail((SIDE, SIDE))
        with file_atomic(path) as beside:
            image.save(beside, "JPEG", quality=80)


def thumbnails(run_dir: Path, texts: Iterable[str]) -> dict[str, str]:
    """`data:` addresses of the copies that texts name, by name, as far as there is room for all of them."""
    found: dict[str, str] = {}
    room = MAX_ALL
    for name in dict.fromkeys(name for text in texts for name in NAMED.findall(text)):
        path = run_dir / FOLDER / f"{name}.jpg"
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            continue
        data = read_bytes(path, DataError, MAX_BYTES)
        room -= len(data)
        if room < 0:
            break
        if data.startswith(HEAD):
            found[name] = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    return found
