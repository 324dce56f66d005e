"""Tokens sampled per second by the rollout engines: `python bench/engines.py [--sizes 1m 25m] [--server] [--json F]`.

The same prompts for the transformers engine, transformers' own generate (as GRPOTrainer calls it), the colocated vLLM
and (with `--server`) a vLLM server, in turn within one run; medians over the repeats of new tokens per CPU second (of
the processes that sample) and per wall second, and the time of a weight sync. Float32 on one thread unless `--dtype`
and `--threads` say otherwise. On a busy machine look at CPU seconds.

`--against TREE` compares this checkout with another one: each samples and syncs in a process of its own, in turn, and
the ratios within the pairs are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import packages_distributions
from importlib.metadata import version as metadata_version
from pathlib import Path

import torch
from accelerate import Accelerator
from common import FIRST, PAD, SIZES, model_of, quiet, tokenizer
from transformers import GenerationConfig

import posttrain
from posttrain.rollouts.engine import Completion, Engine, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_client import VllmClient
from posttrain.rollouts.vllm_engine import ColocatedVllm
from posttrain.rollouts.vllm_server import ServedVllm
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit

SCRIPT = Path(posttrain.__file__).resolve().parents[1] / "launch" / "vllm_server.sh"
STOP = 2
SHARE = 0.4
"""Of a GPU's memory, for each of the two vLLM engines."""


def cpu_of_this_process() -> float:
    return time.process_time()


def cpu_of_session(session: int) -> float:
    """CPU seconds of all processes of a session (Linux)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def start_server(stack: ExitStack, model: torch.nn.Module, dtype: str, max_length: int) -> tuple[VllmClient, int]:
    """(client, session) of a server with this model."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = stack.enter_context((folder / "server.log").open("w"))
    process = subprocess.Popen(
        [str(SCRIPT), str(folder), "--port", str(port), "--dtype", dtype, "--max-model-len", str(max_length)]
        + (["--gpu-memory-utilization", str(SHARE)] if torch.cuda.is_available() else []),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHON": sys.executable, "POSTTRAIN_VLLM_API_KEY": (key := secrets.token_hex(16))},
    )
    stack.callback(process.wait)
    stack.callback(os.killpg, process.pid, signal.SIGTERM)
    return VllmClient(f"http://127.0.0.1:{port}", api_key=key), process.pid


class Generate:
    """transformers' generate over prompts of one length, each repeated for its completions."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.eval()

    def sync(self, version: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """The tokens of each completion up to its stop token; no log-probs."""
        torch.manual_seed(sampling.seed)
        ids = torch.tensor(prompts, device=self.model.device).repeat_interleave(sampling.n, dim=0)
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": sampling.max_new_tokens}
        config = GenerationConfig(**settings, pad_token_id=PAD, eos_token_id=STOP, disable_compile=True)
        found = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        new = [row[: row.index(STOP) + 1 if STOP in row else None] for row in found[:, ids.size(1) :].tolist()]
        rows = [Completion(row, [], "stop" if row[-1] == STOP else "length", 0) for row in new]
        return [rows[start : start + sampling.n] for start in range(0, len(rows), sampling.n)]


def engines(
    stack: ExitStack, size: str, arguments: argparse.Namespace, max_length: int, prompts: list[list[int]]
) -> dict[str, tuple[Engine, Callable[[], float]]]:
    """Name -> (engine, CPU clock of what samples)."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = model_of(size).to(accelerator.device, getattr(torch, arguments.dtype)).requires_grad_(False)
    batch = arguments.prompts * arguments.samples
    found: dict[str, tuple[Engine, Callable[[], float]]] = {
        "transformers": (TransformersEngine(model, stop_ids=[STOP], pad_id=0, max_batch=batch), cpu_of_this_process),
        "generate": (Generate(model), cpu_of_this_process),
    }
    weights = PolicyWeights(model, accelerator)
    if not arguments.plain:
        limit = canary_limit(None, trainer_float32=weights.computes_in_float32, engine_dtype=arguments.dtype)
        colocated = ColocatedVllm(
            weights,
            Canary(prompts, STOP, limit),
            stop_ids=[STOP],
            dtype=arguments.dtype,
            max_length=max_length,
            max_batch=batch,
            gpu_memory_utilization=SHARE,
            enforce_eager=False if arguments.compile else None,
        )
        stack.callback(colocated.close)
        found["vllm colocate"] = (colocated, cpu_of_this_process)
    if arguments.server:
        client, session = start_server(stack, model, arguments.dtype, max_length)
        served = ServedVllm(weights, prompts, client=client, stop_ids=[STOP], max_batch=batch)
        found["vllm server"] = (served, lambda: cpu_of_session(session))
    return found


def prompts_of(size: str, arguments: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Random prompts, and the most tokens that one has with its completion."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.prompts, arguments.prompt_length)
    prompts = torch.randint(FIRST, SIZES[size][0], shape, generator=generator).tolist()
    return prompts, arguments.prompt_length + arguments.new_tokens


def measure(size: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Engine -> medians."""
    prompts, max_length = prompts_of(size, arguments)
    with ExitStack() as stack:
        compared = engines(stack, size, arguments, max_length, prompts)
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in compared}
        syncs: dict[str, list[float]] = {name: [] for name in compared}
        for repeat in range(-1, arguments.repeats):  # the first one warms up
            for name, (engine, clock) in compared.items():
                syncs[name] += [engine.sync(repeat + 1).get("sync_seconds", 0.0)]
                sampling = Sampling(n=arguments.samples, max_new_tokens=arguments.new_tokens, seed=repeat + 1)
                cpu, wall = clock(), time.perf_counter()
                answers = engine.generate(prompts, sampling)
                tokens = sum(len(completion.ids) for group in answers for completion in group)
                if repeat >= 0:
                    times[name].append((tokens, clock() - cpu, time.perf_counter() - wall))
        return {
            name: {
                "tokens_per_cpu_second": statistics.median(tokens / cpu for tokens, cpu, _ in rows),
                "tokens_per_second": statistics.median(tokens / wall for tokens, _, wall in rows),
                "sync_seconds": statistics.median(syncs[name]),
            }
            for name, rows in times.items()
        }


# ------------------------------------------------------------------------------------------------------- two checkouts


def be_a_side(size: str, arguments: argparse.Namespace) -> None:
    """For each line on standard input sync and sample once; a line with what -> (CPU seconds, wall seconds)."""
    prompts, max_length = prompts_of(size, arguments)

    def timed(clock: Callable[[], float], do: Callable[[], object]) -> tuple[float, float]:
        cpu, wall = clock(), time.perf_counter()
        do()
        return clock() - cpu, time.perf_counter() - wall

    def measured(engine: Engine, clock: Callable[[], float], seed: int) -> dict[str, tuple[float, float]]:
        sampling = Sampling(n=arguments.samples, max_new_tokens=arguments.new_tokens, seed=seed)
        return {
            "sync": timed(clock, lambda: [engine.sync(version) for version in range(arguments.syncs)]),
            "sampling": timed(clock, lambda: engine.generate(prompts, sampling)),
        }

    with ExitStack() as stack:
        compared = engines(stack, size, arguments, max_length, prompts)
        compared.pop("generate")  # is transformers' alone
        for number, _ in enumerate(sys.stdin):
            found = {}
            for name, (engine, clock) in compared.items():
                # A server's client works too.
                whole = (lambda of=clock: of() + cpu_of_this_process()) if name == "vllm server" else clock
                times = measured(engine, whole, number)
                if name == "transformers":  # samples with the trained model itself
                    times.pop("sync")
                found |= {f"{name}, {what}": seconds for what, seconds in times.items()}
            print(json.dumps(found), flush=True)


def pair(size: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What -> the median, least and largest ratio of this checkout's seconds to the other's, and its own median."""
    here = Path(posttrain.__file__).resolve().parents[1]
    options = [word for word in sys.argv[1:] if word not in SIZES and word != "--sizes"]
    command = [sys.executable, os.path.abspath(__file__), *options, "--sizes", size, "--side"]
    rows: list[tuple[dict[str, list[float]], dict[str, list[float]]]] = []
    with ExitStack() as stack:
        sides = []
        for tree in (here, arguments.against.resolve()):
            environment, pipes = (
                os.environ | {"PYTHONPATH": str(tree)},
                {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
            )
            sides.append(stack.enter_context(subprocess.Popen(command, cwd=tree, env=environment, text=True, **pipes)))
        for number in range(-1, arguments.repeats):  # the first one warms up
            found = {}
            for side in sides if number % 2 else reversed(sides):
                side.stdin.write("\n")
                side.stdin.flush()
                # vLLM writes to the same place.
                found[side.pid] = next(json.loads(line) for line in side.stdout if line.startswith("{"))
            if number >= 0:
                rows.append((found[sides[0].pid], found[sides[1].pid]))
    results = {}
    for what in rows[0][0]:
        for place, clock in enumerate(("CPU", "wall")):
            ratios = [own[what][place] / other[what][place] for own, other in rows]
            results[f"{what}, {clock}"] = {
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "largest": max(ratios),
                "seconds": statistics.median(own[what][place] for own, _ in rows),
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=53)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="let the colocated vLLM compile")
    parser.add_argument("--server", action="store_true", help="also a server")
    parser.add_argument("--plain", action="store_true", help="without the colocated vLLM")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout to compare with")
    parser.add_argument("--syncs", type=int, default=10, help="in one measurement of these")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        be_a_side(arguments.sizes[0], arguments)
        return
    owners = packages_distributions()  # vLLM has a name of its own for CPUs
    versions = {name: metadata_version(owners[name][0]) for name in ("torch", "transformers", "vllm") if name in owners}
    if arguments.against is not None:
        results = {size: pair(size, arguments) for size in arguments.sizes}
        print("| model | what | seconds, ratio to the other checkout | least to largest | seconds here |")
        print("| --- | --- | --- | --- | --- |")
        for size, rows in results.items():
            for what, row in rows.items():
                span = f"{row['least']:.3f} to {row['largest']:.3f}"
                print(f"| {size} | {what} | {row['ratio']:.3f} | {span} | {row['seconds']:.2f} |")
    else:
        results = {size: measure(size, arguments) for size in arguments.sizes}
        print("| model | engine | tokens / CPU second | tokens / second | sync, ms |\n| --- | --- | --- | --- | --- |")
        for size, rows in results.items():
            for name, row in rows.items():
                rates = f"{row['tokens_per_cpu_second']:,.0f} | {row['tokens_per_second']:,.0f}"
                print(f"| {size} | {name} | {rates} | {1000 * row['sync_seconds']:.0f} |")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if arguments.json is not None:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "side", "against")}
        arguments.json.write_text(
            json.dumps({"settings": settings, "versions": versions, "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
