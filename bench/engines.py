"""Tokens sampled per second by the rollout engines: `python bench/engines.py [--sizes 1m 25m] [--json F]`.

The same prompts for the transformers engine, transformers' own generate (as GRPOTrainer calls it) and the colocated
vLLM, in turn within one run; medians over the repeats of new tokens per CPU second and per wall second, and the time of
a weight sync. Float32 on one thread unless `--dtype` and `--threads` say otherwise. On a busy machine look at CPU
seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from importlib.metadata import packages_distributions
from importlib.metadata import version as metadata_version
from pathlib import Path

import torch
from accelerate import Accelerator
from common import FIRST, PAD, SIZES, model_of, quiet
from transformers import GenerationConfig

from posttrain.rollouts.engine import Completion, Engine, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_engine import ColocatedVllm
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit

STOP = 2


class Generate:
    """transformers' generate over prompts of one length, each repeated for its completions; no log-probs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.eval()

    def sync(self, version: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        torch.manual_seed(sampling.seed)
        ids = torch.tensor(prompts, device=self.model.device).repeat_interleave(sampling.n, dim=0)
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": sampling.max_new_tokens}
        config = GenerationConfig(**settings, pad_token_id=PAD, eos_token_id=STOP, disable_compile=True)
        found = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        new = [row[: row.index(STOP) + 1 if STOP in row else None] for row in found[:, ids.size(1) :].tolist()]
        rows = [Completion(row, [], "stop" if row[-1] == STOP else "length", 0) for row in new]
        return [rows[start : start + sampling.n] for start in range(0, len(rows), sampling.n)]


def engines(
    stack: ExitStack, size: str, arguments: argparse.Namespace, prompts: list[list[int]]
) -> dict[str, Engine | Generate]:
    """Those that are compared, by name."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = model_of(size).to(accelerator.device, getattr(torch, arguments.dtype)).requires_grad_(False)
    batch = arguments.prompts * arguments.samples
    ours = TransformersEngine(model, stop_ids=[STOP], pad_id=0, max_batch=batch)
    found: dict[str, Engine | Generate] = {"transformers": ours, "generate": Generate(model)}
    if not arguments.plain:
        weights = PolicyWeights(model, accelerator)
        limit = canary_limit(None, trainer_float32=weights.computes_in_float32, engine_dtype=arguments.dtype)
        found["vllm colocate"] = ColocatedVllm(
            weights,
            Canary(prompts, STOP, limit),
            stop_ids=[STOP],
            dtype=arguments.dtype,
            max_length=arguments.prompt_length + arguments.new_tokens,
            max_batch=batch,
            gpu_memory_utilization=0.4,
        )
        stack.callback(found["vllm colocate"].close)
    return found


def measure(size: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Engine -> medians."""
    shape = (arguments.prompts, arguments.prompt_length)
    prompts = torch.randint(FIRST, SIZES[size][0], shape, generator=torch.Generator().manual_seed(0)).tolist()
    with ExitStack() as stack:
        compared = engines(stack, size, arguments, prompts)
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in compared}
        syncs: dict[str, list[float]] = {name: [] for name in compared}
        for repeat in range(-1, arguments.repeats):  # the first one warms up
            for name, engine in compared.items():
                syncs[name] += [engine.sync(repeat + 1).get("sync_seconds", 0.0)]
                sampling = Sampling(n=arguments.samples, max_new_tokens=arguments.new_tokens, seed=repeat + 1)
                cpu, wall = time.process_time(), time.perf_counter()
                answers = engine.generate(prompts, sampling)
                tokens = sum(len(completion.ids) for group in answers for completion in group)
                if repeat >= 0:
                    times[name].append((tokens, time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "tokens_per_cpu_second": statistics.median(tokens / cpu for tokens, cpu, _ in rows),
            "tokens_per_second": statistics.median(tokens / wall for tokens, _, wall in rows),
            "sync_seconds": statistics.median(syncs[name]),
        }
        for name, rows in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    numbers = {"prompts": 16, "samples": 4, "prompt-length": 32, "new-tokens": 53, "repeats": 3, "threads": 1}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--plain", action="store_true", help="without the colocated vLLM")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)
    owners = packages_distributions()  # vLLM has a name of its own for CPUs
    versions = {name: metadata_version(owners[name][0]) for name in ("torch", "transformers", "vllm") if name in owners}
    results = {size: measure(size, arguments) for size in arguments.sizes}
    print("| model | engine | tokens / CPU second | tokens / second | sync, ms |\n| --- | --- | --- | --- | --- |")
    for size, rows in results.items():
        for name, row in rows.items():
            rates = f"{row['tokens_per_cpu_second']:,.0f} | {row['tokens_per_second']:,.0f}"
            print(f"| {size} | {name} | {rates} | {1000 * row['sync_seconds']:.0f} |")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if arguments.json is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(
            json.dumps({"settings": settings, "versions": versions, "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
