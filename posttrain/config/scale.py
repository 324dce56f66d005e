"""What training a model takes per GPU under each way of sharding: the arithmetic behind docs/scale.md.

`python -m posttrain.config.scale` prints the tables. Only what the sharding changes is counted here: weights, gradients
and optimizer state; `config.memory` has the terms of one rank in full.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.config.shapes import PUBLIC_SHAPES, ModelShape, _llama, _qwen2
from posttrain.terminal import say

SHAPES: dict[str, ModelShape] = {
    "0.5B (Qwen2.5)": PUBLIC_SHAPES["Qwen/Qwen2.5-0.5B"],
    "7B (Qwen2.5)": PUBLIC_SHAPES["Qwen/Qwen2.5-7B"],
    "32B (Qwen2.5)": _qwen2(5120, 27648, 64, 40, 8, vocab=152064, tied=False),
    "70B (Llama 3.1)": _llama(8192, 28672, 80, 64, 8, tied=False),
}
"""The sizes of the page."""

WEIGHT, GRADIENT, ADAM = 2, 2, 4
"""Bytes per parameter with `model.dtype: bfloat16`: weight, gradient, and Adam's two moments of the same type."""

ADAPTER_RANK = 16


@dataclass(frozen=True, slots=True)
class Strategy:
    """How the states of a model lie on the ranks.

    Attributes:
        name: as the page says it.
        config: file of launch/accelerate.
        weights, gradients, optimizer: whether each is divided over the ranks.
        offloaded: weights and optimizer lie in the host's memory instead of the GPU's.
        master: ZeRO keeps a float32 copy of the trained weights, and Adam's moments in float32.
        float32: trained weights, gradients and moments are in float32: accelerate raises them for FSDP2 with
            `training.bf16`, and a layer is rounded to bfloat16 when it is gathered.
    """

    name: str
    config: str
    weights: bool
    gradients: bool
    optimizer: bool
    offloaded: bool = False
    master: bool = False
    float32: bool = False


STRATEGIES = (
    Strategy("DDP", "ddp.yaml", False, False, False),
    Strategy("ZeRO-2", "zero2.yaml", False, True, True, master=True),
    Strategy("FSDP2", "fsdp2.yaml", True, True, True, float32=True),
    Strategy("ZeRO-3", "zero3.yaml", True, True, True, master=True),
    Strategy("ZeRO-3, offloaded", "zero3_offload.yaml", True, True, True, offloaded=True, master=True),
)


@dataclass(frozen=True, slots=True)
class States:
    """Bytes per rank: on the GPU, and in the host's memory."""

    gpu: float
    host: float


def states(shape: ModelShape, strategy: Strategy, gpus: int, *, lora: bool, reference: bool) -> States:
    """Weights, gradients and optimizer state on one of `gpus` ranks.

    With N parameters of which A are trained (all; with LoRA the adapters, in float32): weights 2 N, and 4 A for
    adapters; gradients 2 A, or 4 A for adapters; Adam 4 A, 8 A for adapters, or 12 A where ZeRO keeps float32 masters;
    a frozen reference 2 N, none with LoRA. FSDP2 without adapters: weights 4 N, gradients 4 N, Adam 8 N. What a
    strategy divides is divided by the number of ranks.

    Args:
        reference: a frozen copy is held (DPO, KL terms). It is divided as the weights are.
    """
    n = shape.parameters
    trained = shape.lora_parameters(ADAPTER_RANK, "all-linear") if lora else n
    wide = lora or strategy.float32
    gradient = (4 if wide else GRADIENT) * trained
    moments = (12 if strategy.master else 8 if wide else ADAM) * trained
    weights = WEIGHT * n + (4 * trained if lora else (4 - WEIGHT) * n if strategy.float32 else 0)
    weights += WEIGHT * n if reference and not lora else 0

    def share(size: float, divided: bool) -> float:
        return size / gpus if divided else size

    on_gpu, on_host = share(gradient, strategy.gradients), 0.0
    movable = share(weights, strategy.weights) + share(moments, strategy.optimizer)
    if strategy.offloaded:
        on_host += movable
    else:
        on_gpu += movable
    return States(on_gpu, on_host)


def smallest(shape: ModelShape, strategy: Strategy, memory: float, *, lora: bool, reference: bool) -> int | None:
    """Fewest ranks (1, 2, 4, ... 1024) whose states take at most `memory` bytes of each GPU; None if none does."""
    for gpus in (2**k for k in range(11)):
        if states(shape, strategy, gpus, lora=lora, reference=reference).gpu <= memory:
            return gpus
    return None


def tables() -> str:
    """Markdown: bytes per rank, and the fewest GPUs."""
    gigabyte = 1e9
    parts = []
    for lora, title in ((False, "Full fine-tuning"), (True, f"LoRA, rank {ADAPTER_RANK} on all linear layers")):
        header = ["model", "parameters", *(f"{s.name}, {g} GPUs" for s in STRATEGIES for g in (8, 32))]
        rows = []
        for name, shape in SHAPES.items():
            cells = [name, f"{shape.parameters / 1e9:.2f}e9"]
            for strategy in STRATEGIES:
                for gpus in (8, 32):
                    found = states(shape, strategy, gpus, lora=lora, reference=True)
                    host = f" + {found.host / gigabyte:.1f} host" if found.host else ""
                    cells.append(f"{found.gpu / gigabyte:.1f}{host}")
            rows.append(cells)
        parts.append(f"{title}, GB per GPU for weights, reference, gradients and Adam:\n\n" + _markdown(header, rows))
    header = ["model", "full: fewest 80 GB GPUs", "LoRA: fewest 80 GB GPUs"]
    rows = []
    for name, shape in SHAPES.items():
        cells = [name]
        for lora in (False, True):
            fits = [(smallest(shape, s, 80e9 * ROOM, lora=lora, reference=True), s.name) for s in STRATEGIES]
            cells.append("; ".join(f"{s} {gpus}" for gpus, s in fits if gpus is not None))
        rows.append(cells)
    rest = "the rest is for activations"
    parts.append(f"Fewest GPUs of which {ROOM:.0%} hold the states; {rest}:\n\n" + _markdown(header, rows))
    return "\n\n".join(parts)


ROOM = 0.6
"""Share of a GPU that the states may take."""


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__).parse_args()
    say(tables())
