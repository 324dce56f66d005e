"""Forward and backward of the policy, ours and stock TRL in turn on the same rows: speed, memory, equality.

    python bench/train_speed.py                          every workload of the table
    python bench/train_speed.py policy dpo --size 120m   some of them
    python bench/train_speed.py policy --memory          with peak memory, a fresh process for each side
    python bench/train_speed.py --check                  equality alone; ends with 1 where a difference is too large

TRL runs through its own trainers' loss, with the fused head and settings it chooses itself; ours as the shells run it.
Both compute entropies. Speed is the median over repeats of the ratio of CPU seconds, on one thread; the gradients'
difference is relative to their size. Memory is the peak above model and gradients, in MiB. `speed_sides.py` has the
sides.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
from speed_sides import Sides, Workload, build

from posttrain.safe_files import write_json_atomic

WORKLOADS = {
    "policy": Workload("policy", 1, 8, 512, 128),
    "prefix": Workload("policy", 1, 16, 1024, 64),
    "short-prompt": Workload("policy", 1, 8, 16, 256),
    "one-completion": Workload("policy", 8, 1, 256, 128),
    "dpo": Workload("dpo", 4, 2, 512, 128),
    "two-pairs": Workload("dpo", 2, 2, 512, 128),
    "reference": Workload("reference", 1, 8, 512, 128),
    "distill": Workload("distill", 4, 1, 64, 256),
}
# Two pairs are for models of which four do not fit.
TABLE = [(name, "25m") for name in WORKLOADS if name != "two-pairs"]
TABLE += [("policy", "120m"), *((name, "1m") for name in ("policy", "short-prompt", "one-completion", "dpo"))]

TOLERANCE = {False: (1e-5, 1e-4), True: (0.02, 0.1)}
"""Largest relative difference of loss and gradients with `--check`, by whether it is under bfloat16."""


Case = tuple[str, str]
"""Workload and size."""


def sides_of(case: Case, options: argparse.Namespace, only: str | None = None) -> Sides:
    how = {"bf16": options.bf16, "checkpointing": options.checkpointing, "only": only}
    return build(common.model_of(case[1]), WORKLOADS[case[0]], **how)


def measure(case: Case, options: argparse.Namespace, sides: Sides) -> dict[str, Any]:
    """One line of the table."""
    found: dict[str, Any] = {"workload": case[0], "size": case[1], "bf16": options.bf16}
    found["checkpointing"] = options.checkpointing
    losses = {side: float(step()) for side, step in sides.steps.items()}
    found["loss_difference"] = abs(losses["ours"] - losses["trl"]) / max(abs(losses["trl"]), 1e-9)
    if WORKLOADS[case[0]].kind != "reference":
        left = [common.gradients(sides.models[side]) for side in ("ours", "trl")]
        found["gradient_difference"] = common.relative_difference(*left)
    if options.check:
        return found
    times = common.interleaved(sides.steps, options.repeats)
    return found | {"speed": common.ratio(times, "trl", "ours"), "times": times}


def measure_memory(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of both sides, each in a process of its own."""
    command = [__file__, case[0], "--size", case[1]]
    command += [f"--{flag}" for flag in ("bf16", "checkpointing") if getattr(options, flag)]
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # memory goes back, so the peak is the need
    peaks = {side: common.in_a_fresh_process([*command, "--peak-of", side], **freed) for side in ("trl", "ours")}
    return {"peak_mib": peaks, "memory": peaks["trl"] / peaks["ours"]}


def is_equal(found: dict[str, Any]) -> bool:
    loss, gradient = TOLERANCE[found["bf16"]]
    return found["loss_difference"] <= loss and found.get("gradient_difference", 0.0) <= gradient


def print_peak(case: Case, side: str, options: argparse.Namespace) -> None:
    sides = sides_of(case, options, only=side)
    for parameter in sides.models[side].parameters():
        parameter.grad = torch.zeros_like(parameter)
    common.show(common.peak_memory(sides.steps[side]))


def line(case: Case, found: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    seconds, speed, memory = ("-", "-"), "-", "-"
    if "times" in found:
        medians = {side: sorted(clocks["cpu"])[len(clocks["cpu"]) // 2] for side, clocks in found["times"].items()}
        seconds, speed = (f"{medians['trl']:.2f}", f"{medians['ours']:.2f}"), f"{found['speed']:.2f}"
    gradient = f"{found['gradient_difference']:.1e}" if "gradient_difference" in found else "-"
    if "memory" in found:
        memory = f"{found['peak_mib']['trl']:.0f} / {found['peak_mib']['ours']:.0f} = {found['memory']:.1f}"
    cells = (*case, *seconds, speed, f"{found['loss_difference']:.1e}", gradient, memory)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"any of {', '.join(WORKLOADS)}; default: the whole table")
    parser.add_argument("--size", choices=common.SIZES, default="25m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--memory", action="store_true", help="also peak memory")
    parser.add_argument("--check", action="store_true", help="equality alone")
    parser.add_argument("--json", type=Path, help="file for the figures of all repeats")
    parser.add_argument("--peak-of", choices=("trl", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(WORKLOADS)}")
    common.quiet()
    if options.peak_of:
        print_peak((options.workloads[0], options.size), options.peak_of, options)
        return
    print("| workload | model | TRL, s | ours, s | speed | loss diff. | gradient diff. | TRL / ours, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    results: list[dict[str, Any]] = []
    for case in [(name, options.size) for name in options.workloads] or TABLE:
        # Memory first: beside the sides that take the times, a fresh process has no room on a small machine.
        memory = measure_memory(case, options) if options.memory else {}
        results.append(measure(case, options, sides_of(case, options)) | memory)
        print(line(case, results[-1]), flush=True)
        if options.json:
            made = {"command": " ".join(sys.argv), "python": platform.python_version(), "versions": versions}
            write_json_atomic(options.json, {**made, "results": results})
    if options.check and not all(map(is_equal, results)):
        sys.exit(1)


if __name__ == "__main__":
    main()
