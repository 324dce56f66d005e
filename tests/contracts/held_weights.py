"""Trains recipes as `train_recipes` does. Each rank leaves `held-RANK.json` in the folder of a run: the most bytes that
it held from the loading of the first model until the policy was taken apart, what the policy's tensors take, and a hash
of all that it starts with, gathered.
"""

import hashlib
import json
import runpy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.rollouts.weight_sync import whole_tensors
from posttrain.trainers import run
from posttrain.trainers.shell import Shell

train_recipe = runpy.run_path(str(Path(__file__).with_name("train_recipes.py")))["train_recipe"]
SMALLEST = 4096


class Held(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.counts = {}, 0, True

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        made = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made) if self.counts else ():
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.note(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        return made

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST or storage.data_ptr() == 0:
            return
        self.alive = {ref.cdata: (ref, size) for ref, size in self.alive.values() if not ref.expired()}
        ref = StorageWeakRef(storage)
        self.alive.setdefault(ref.cdata, (ref, storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.alive.values()))


def digest_of(tensors):
    """Over names, types and all bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def train_and_count(path):
    held, sizes, found, build, prepare = Held(), [], {}, run.build, Accelerator.prepare

    def build_and_count(recipe, method, ranks):
        with held:
            built = build(recipe, method, ranks)
        sizes.extend(p.numel() * p.element_size() for p in built.shell.model.parameters())
        return built

    def take_apart_and_count(self, *arguments, **keywords):
        with held:
            prepared = super(Shell, self)._prepare_for_training(*arguments, **keywords)
        found["start"] = digest_of(whole_tensors(self.accelerator.unwrap_model(self.model)))
        return prepared

    def prepare_uncounted(self, *parts, **keywords):
        held.counts = not self.state.deepspeed_plugin  # DeepSpeed makes its optimizer's copies of the parts here
        try:
            return prepare(self, *parts, **keywords)
        finally:
            held.counts = True

    run.build, Accelerator.prepare, Shell._prepare_for_training = (
        build_and_count,
        prepare_uncounted,
        take_apart_and_count,
    )
    try:
        run_dir = train_recipe(path).run_dir
    finally:
        run.build, Accelerator.prepare = build, prepare
        del Shell._prepare_for_training
    found |= {"most": held.most, "policy": sum(sizes), "largest": max(sizes)}
    (run_dir / f"held-{PartialState().process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        train_and_count(path)
