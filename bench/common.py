"""What the speed benchmarks share: random models, rows, interleaved timing, peak memory."""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.schema import TokenizerInit
from posttrain.data.sample import Origin, Sample
from posttrain.models.tokenizer import build_tokenizer

PAD, FIRST = 0, 4
"""Id of padding, and the first id that is no special token."""

SMOLLM2 = Path(__file__).resolve().parents[1] / "build" / "smollm2"
"""SmolLM2-135M-Instruct; `make build/smollm2/model.safetensors` makes it."""

# vocabulary, hidden, intermediate, layers, heads, key-value heads, tied embeddings
SIZES = {
    "1m": (100, 128, 384, 5, 4, 2, False),
    "25m": (32_000, 256, 688, 8, 8, 4, False),
    "120m": (32_000, 768, 2048, 12, 12, 4, True),
    "smollm2": (49_152, 576, 1536, 30, 9, 3, True),
}
"""The last one is pretrained."""


def model_of(size: str, *, vocab: int | None = None) -> PreTrainedModel:
    """The pretrained model, or a Llama with random weights of a size; `vocab` in place of the size's own vocabulary."""
    if size == "smollm2" and vocab is None:
        return AutoModelForCausalLM.from_pretrained(SMOLLM2, attn_implementation="sdpa", dtype=torch.float32)
    own_vocab, hidden, intermediate, layers, heads, kv_heads, tied = SIZES[size]
    config = LlamaConfig(
        vocab_size=own_vocab if vocab is None else vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_like(config, seed=0)


def random_like(config: LlamaConfig, *, seed: int) -> PreTrainedModel:
    """A model of this shape. Weights are twice as large as at initialisation: its distributions are not all flat."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


def tokenizer() -> PreTrainedTokenizerBase:
    """What a trainer asks for; the rows come as tokens."""
    return build_tokenizer(TokenizerInit(type="characters"), None)


def random_rows(
    vocab: int, prompts: int, per_prompt: int, prompt: int, completion: int, *, seed: int = 1
) -> list[Sample]:
    """Rows of random tokens of so many prompts, those of a prompt side by side."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(FIRST, vocab, (n,), generator=generator).tolist()

    rows = []
    for _ in range(prompts):
        shared = tokens(prompt)
        for _ in range(per_prompt):
            rows.append(Sample(shared + tokens(completion), [0] * prompt + [1] * completion, Origin.POLICY))
    return rows


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Distance of two sets of tensors over the size of the second."""
    if found.keys() != expected.keys():
        raise ValueError(f"different tensors: {sorted(found.keys() ^ expected.keys())}")
    over = sum(float((found[name] - expected[name]).double().square().sum()) for name in found)
    under = sum(float(value.double().square().sum()) for value in expected.values())
    return (over / under) ** 0.5


def interleaved(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds of each step, run in turn so that they meet the same disturbances; the order alternates."""
    times: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in steps}
    for repeat in range(repeats):
        order = list(steps.items())
        for name, step in order if repeat % 2 == 0 else reversed(order):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[name]["cpu"].append(time.process_time() - cpu)
            times[name]["wall"].append(time.perf_counter() - wall)
    return times


def ratio(times: dict[str, dict[str, list[float]]], slow: str, fast: str, clock: str = "cpu") -> float:
    """Median over repeats of the ratio within a repeat."""
    return statistics.median(a / b for a, b in zip(times[slow][clock], times[fast][clock], strict=True))


def peak_memory(step: Callable[[], object]) -> float:
    """Highest resident memory above that before the step, MiB. Linux; call in a fresh process."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
    step()
    return (resident("VmHWM") - before) / 1024


def show(found: object) -> None:
    """Print what a process of `in_a_fresh_process` has found."""
    print(json.dumps(found))


def in_a_fresh_process(command: Sequence[str], **environment: str) -> Any:
    """What a script of this folder shows, in a process of its own, on one thread."""
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, *command], env=own, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def quiet() -> None:
    """One thread, no reports, no network."""
    import datasets
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
