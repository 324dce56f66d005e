"""Heavy imports without the collector of cyclic garbage. Imports nothing heavy."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import much at once, in a process that is ours: what is there at the end of the first time stays for good.

    torch, transformers and TRL are a million objects. While they grow, the collector goes through all of them again and
    again, a fifth of the time of the import; and transformers asks for a collection before every training, 0.3 s of
    which are theirs. In a process of somebody else's, garbage of theirs would stay as well.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once: what runs between two times leaves garbage
            gc.freeze()
        gc.enable()
