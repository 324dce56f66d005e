"""Forward and backward of the policy, ours and stock TRL in turn on the same rows: speed, memory, equality.

    python bench/train_speed.py                          every workload of the table
    python bench/train_speed.py policy --size 120m       one of them
    python bench/train_speed.py policy --memory          with peak memory, a fresh process for each side
    python bench/train_speed.py policy --scale group     the workload with several group sizes (or prompt, vocabulary)
    python bench/train_speed.py --check                  equality alone; ends with 1 where a difference is too large
    python bench/train_speed.py --draw FILE... --image docs/images/speed.png     a picture of saved figures

TRL runs through its own trainers' loss, with the fused head and settings it chooses itself; ours as the shells run it.
Both compute entropies. Speed is the median over repeats of the ratio of CPU seconds, on one thread; the gradients'
difference is relative to their size. Memory is the peak above model and gradients, in MiB. `speed_sides.py` has the
sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import SIZES, gradients, interleaved, peak_memory, quiet, random_model, ratio, relative_difference
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from speed_sides import RAGGED, Sides, Workload, build

from posttrain.state.files import write_json_atomic

WORKLOADS = {
    "policy": Workload("policy", 1, 8, 512, 128),
    "ragged": Workload("policy", 1, 8, 256, RAGGED),
    "prefix": Workload("policy", 1, 16, 1024, 64),
    "short-prompt": Workload("policy", 1, 8, 16, 256),
    "one-completion": Workload("policy", 8, 1, 256, 128),
    "mix": Workload("mix", 1, 8, 512, 128, experts=8),
    "dpo": Workload("dpo", 4, 2, 512, 128),
    "simpo": Workload("simpo", 4, 2, 512, 128),
    "reference": Workload("reference", 1, 8, 512, 128),
}
TABLE = [(name, "25m") for name in WORKLOADS]
TABLE += [("policy", "120m"), *((name, "1m") for name in ("policy", "short-prompt", "one-completion", "dpo"))]

SCALES = {
    "group": (2, 4, 8, 16, 32),
    "prompt": (32, 128, 256, 512, 1024),
    "vocabulary": (100, 8_000, 32_000, 128_000),
}

TOLERANCE = {False: (1e-5, 1e-4), True: (0.02, 0.1)}
"""Largest relative difference of loss and gradients with `--check`, by whether it is under bfloat16."""

TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)

GREY, PALE, BLUE, ORANGE = "#555555", "#dddddd", "#2f6db3", "#d98032"


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        varied: what is changed in the workload, and to what; None for the workload as it is.
    """

    name: str
    size: str
    varied: tuple[str, int] | None = None

    def sides(self, options: argparse.Namespace, only: str | None = None) -> Sides:
        workload, vocab = WORKLOADS[self.name], None
        if self.varied is not None:
            field, value = self.varied
            if field == "vocabulary":
                vocab = value
            else:
                workload = replace(workload, **{field: value})
        model = random_model(self.size, vocab=vocab)
        return build(model, workload, bf16=options.bf16, checkpointing=options.checkpointing, only=only)

    @property
    def label(self) -> str:
        return self.name if self.varied is None else f"{self.name}, {self.varied[0]} {self.varied[1]:,}"


# ------------------------------------------------------------------------------------------------------------- the runs


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    sides = case.sides(options)
    losses = {side: float(step()) for side, step in sides.steps.items()}
    found: dict[str, Any] = {
        "workload": case.name,
        "size": case.size,
        "varied": case.varied,
        "bf16": options.bf16,
        "checkpointing": options.checkpointing,
        "loss_difference": abs(losses["ours"] - losses["trl"]) / max(abs(losses["trl"]), 1e-9),
    }
    if WORKLOADS[case.name].kind != "reference":
        found["gradient_difference"] = relative_difference(*(gradients(sides.models[side]) for side in ("ours", "trl")))
    if options.check:
        return found
    times = interleaved(sides.steps, options.repeats)
    found |= {"speed": ratio(times, "trl", "ours"), "speed_wall": ratio(times, "trl", "ours", "wall"), "times": times}
    if options.memory:
        peaks = {side: _peak_in_fresh_process(case, side, options) for side in ("trl", "ours")}
        found |= {"peak_mib": peaks, "memory": peaks["trl"] / peaks["ours"]}
    return found


def is_equal(found: dict[str, Any]) -> bool:
    loss, gradient = TOLERANCE[found["bf16"]]
    return found["loss_difference"] <= loss and found.get("gradient_difference", 0.0) <= gradient


def _peak_in_fresh_process(case: Case, side: str, options: argparse.Namespace) -> float:
    flags = [f"--{flag}" for flag in ("bf16", "checkpointing") if getattr(options, flag)]
    if case.varied is not None:
        flags += ["--varied", case.varied[0], str(case.varied[1])]
    command = [sys.executable, __file__, case.name, "--size", case.size, "--peak-of", side, *flags]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back, so the peak is the need
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def print_peak(case: Case, side: str, options: argparse.Namespace) -> None:
    sides = case.sides(options, only=side)
    for parameter in sides.models[side].parameters():
        parameter.grad = torch.zeros_like(parameter)
    print(peak_memory(sides.steps[side]))


def line(case: Case, found: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    seconds, speed, memory = ("-", "-"), "-", "-"
    if "times" in found:
        medians = {side: sorted(clocks["cpu"])[len(clocks["cpu"]) // 2] for side, clocks in found["times"].items()}
        seconds, speed = (f"{medians['trl']:.2f}", f"{medians['ours']:.2f}"), f"{found['speed']:.2f}"
    gradient = f"{found['gradient_difference']:.1e}" if "gradient_difference" in found else "-"
    if "memory" in found:
        memory = f"{found['peak_mib']['trl']:.0f} / {found['peak_mib']['ours']:.0f} = {found['memory']:.1f}"
    cells = (case.label, case.size, *seconds, speed, f"{found['loss_difference']:.1e}", gradient, memory)
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------------------------------------------- the picture


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Ratios of speed and memory as bars, one pair per workload, and below them the scales, if any."""
    table = [found for found in results if found["varied"] is None]
    scales = {
        key: [found for found in results if found["varied"] is not None and _scale_of(found) == key]
        for key in dict.fromkeys(_scale_of(found) for found in results if found["varied"] is not None)
    }
    bars = 1 + 0.32 * len(table)
    figure = Figure(figsize=(9, bars + (2.8 if scales else 0)), layout="constrained")
    rows = figure.subfigures(2 if scales else 1, 1, height_ratios=[bars, 2.8] if scales else None, squeeze=False)[:, 0]
    for ax, key, title in zip(
        rows[0].subplots(1, 2, sharey=True),
        ("speed", "memory"),
        ("time of stock TRL / ours", "peak memory of stock TRL / ours"),
        strict=True,
    ):
        known = [(place, found[key]) for place, found in enumerate(table) if key in found]
        for place, value in known:
            ax.barh(place, value - 1, left=1, color=BLUE if value >= 1 else ORANGE, height=0.6)
            ax.annotate(f" {value:.2g}", (max(value, 1), place), va="center", fontsize=8, color=GREY)
        ax.set_xscale("log")
        ax.set_yticks(range(len(table)), [f"{found['workload']}, {found['size']}" for found in table])
        ax.set_ylim(len(table) - 0.4, -0.6)
        ax.axvline(1, color=GREY, linewidth=0.8)
        ends = min([value for _, value in known], default=1), 1.6 * max([value for _, value in known], default=2)
        ax.set_xlim(min(ends[0], 1) * 0.95, ends[1])
        ax.set_xticks([tick for tick in TICKS if tick < ends[1]], [f"{tick:g}" for tick in TICKS if tick < ends[1]])
        ax.minorticks_off()
        _decorate(ax, title)
    for ax, ((workload, size, field), found) in zip(
        rows[-1].subplots(1, len(scales), squeeze=False)[0] if scales else (), scales.items(), strict=True
    ):
        found.sort(key=lambda one: one["varied"][1])
        values = [one["varied"][1] for one in found]
        for key, colour, label in (("speed", BLUE, "time"), ("memory", ORANGE, "memory")):
            known = [(value, one[key]) for value, one in zip(values, found, strict=True) if key in one]
            if known:
                ax.plot(*zip(*known, strict=True), "o-", color=colour, markersize=4, label=label)
        ax.set_xscale("log")
        ax.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        ax.minorticks_off()
        ax.axhline(1, color=GREY, linewidth=0.8)
        ax.legend(fontsize=8, frameon=False)
        _decorate(ax, f"{workload}, {size}: TRL / ours by {field}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=130)


def _scale_of(found: dict[str, Any]) -> tuple[str, str, str]:
    return found["workload"], found["size"], found["varied"][0]


def _decorate(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=9, loc="left")
    ax.tick_params(labelsize=8, colors=GREY)
    ax.grid(color=PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def cases(options: argparse.Namespace) -> list[Case]:
    if options.scale is not None:
        return [Case(options.workload, options.size, (options.scale, value)) for value in SCALES[options.scale]]
    return [Case(*case) for case in TABLE] if options.workload is None else [Case(options.workload, options.size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", nargs="?", choices=WORKLOADS, help="default: the whole table")
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--memory", action="store_true", help="also peak memory")
    parser.add_argument("--scale", choices=SCALES, help="vary this of one workload")
    parser.add_argument("--check", action="store_true", help="equality alone")
    parser.add_argument("--json", type=Path, help="file for the figures of all repeats")
    parser.add_argument("--draw", type=Path, nargs="+", help="draw these saved figures, and measure nothing")
    parser.add_argument("--image", type=Path, help="PNG file for a picture of the ratios")
    parser.add_argument("--peak-of", choices=("trl", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--varied", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scale is not None and options.workload is None:
        parser.error("--scale takes a workload")
    if options.scale == "group" and WORKLOADS[options.workload].kind in ("dpo", "simpo"):
        parser.error("a pair has two responses")
    if options.draw is not None:
        if options.image is None:
            parser.error("--draw takes --image")
        draw([one for file in options.draw for one in json.loads(file.read_text())["results"]], options.image)
        return
    quiet()
    if options.peak_of:
        varied = (options.varied[0], int(options.varied[1])) if options.varied else None
        print_peak(Case(options.workload, options.size, varied), options.peak_of, options)
        return
    print("| workload | model | TRL, s | ours, s | speed | loss diff. | gradient diff. | TRL / ours, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    results: list[dict[str, Any]] = []
    for case in cases(options):
        results.append(measure(case, options))
        print(line(case, results[-1]), flush=True)
        if options.json:
            made = {"command": " ".join(sys.argv), "python": platform.python_version(), "versions": versions}
            write_json_atomic(options.json, {**made, "results": results})
    if options.image is not None:
        draw(results, options.image)
    if options.check and not all(map(is_equal, results)):
        sys.exit(1)


if __name__ == "__main__":
    main()
