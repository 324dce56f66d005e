"""Log-probs under a reference, kept on disk under a hash of all that they follow from.

One file per key, `<key>.safetensors`, whole or absent. The key is a hash over the bytes of the reference's weights, the
token ids and masks of all rows, the chat template and the precision, so another model, other data, another template or
another precision is another file. Paths, names and times are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.data.sample import Sample
from posttrain.errors import StateError
from posttrain.safe_files import file_atomic

FORMAT = "1"
"""Version of the files; another one is another key."""

_CHUNK = 1 << 24


class ReferenceCache:
    """The log-probs of one reference for one set of rows.

    Attributes:
        made_from: what the key is made of; stands in the file too, for people.
        path: the file, which may not be there.
        damaged: why `read` passed over a file that is there; None if it did not.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, str]) -> None:
        self.made_from = {"format": FORMAT, **made_from}
        key = hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{key}.safetensors"
        self.damaged: str | None = None

    def read(self) -> list[Tensor] | None:
        """The log-probs (T,) of each sequence, in the order of `write`; None if there is no undamaged file."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                logps, lengths = file.get_tensor("logps"), file.get_tensor("lengths")
                checksum = (file.metadata() or {}).get("checksum")
        except (SafetensorError, OSError) as error:
            self.damaged = f"{self.path} cannot be read: {error}"
            return None
        if checksum != _checksum(logps, lengths):
            self.damaged = f"{self.path} is damaged: its checksum is another"
            return None
        return [part.clone() for part in logps.split(lengths.tolist())]

    def write(self, logps: Sequence[Tensor]) -> None:
        """Keep the log-probs of all sequences; a file that is there is replaced.

        Raises:
            StateError: the folder cannot be written to.
        """
        tensors = {"logps": torch.cat(list(logps)), "lengths": torch.tensor([len(part) for part in logps])}
        metadata = {**self.made_from, "checksum": _checksum(tensors["logps"], tensors["lengths"])}
        try:
            with file_atomic(self.path) as beside:
                save_file(tensors, beside, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise StateError(
                f"cannot keep the reference's log-probs: {error}",
                where=str(self.path.parent),
                hint="give a folder that can be written to as reference.cache, or leave the key out",
            ) from error


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, types and all bytes of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in tensor.detach().reshape(-1).split(_CHUNK):
            digest.update(part.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def samples_hash(samples: Iterable[Sample]) -> str:
    """SHA-256 over token ids and loss masks, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.ids} {sample.loss_mask}\n".encode())
    return digest.hexdigest()


def _checksum(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
