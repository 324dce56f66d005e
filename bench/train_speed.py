"""Forward and backward of the policy, ours and stock TRL in turn on the same rows: speed, memory, equality.

    python bench/train_speed.py                          every workload of the table
    python bench/train_speed.py policy mix --size 120m   some of them
    python bench/train_speed.py policy --memory          with peak memory, a fresh process for each side
    python bench/train_speed.py policy --scale group     the workload with several group sizes (or prompt, vocabulary,
                                                         ranks)
    python bench/train_speed.py read-pairs --size smollm2 --rows FILE     DPO of pairs from a file of preferences
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
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from common import SIZES, SMOLLM2, gradients, interleaved, model_of, peak_memory, quiet, ratio, relative_difference
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from speed_sides import RAGGED, Sides, Workload, build, read_pairs

from posttrain.safe_files import write_json_atomic

WORKLOADS = {
    "policy": Workload("policy", 1, 8, 512, 128),
    "ragged": Workload("policy", 1, 8, 256, RAGGED),
    "prefix": Workload("policy", 1, 16, 1024, 64),
    "short-prompt": Workload("policy", 1, 8, 16, 256),
    "one-completion": Workload("policy", 8, 1, 256, 128),
    "mix": Workload("mix", 1, 8, 512, 128, experts=8),
    "dpo": Workload("dpo", 4, 2, 512, 128),
    "two-pairs": Workload("dpo", 2, 2, 512, 128),
    "read-pairs": Workload("dpo", 8, 2, 0, 0),
    "simpo": Workload("simpo", 4, 2, 512, 128),
    "reference": Workload("reference", 1, 8, 512, 128),
    "rollout": Workload("rollout", 8, 8, 256, 64),
    "rollout-prefixes": Workload("rollout", 2, 8, 256, 64, cuts=(64, 128, 192)),
}
# Two pairs are for models of which four do not fit, and those that are read need a file.
TABLE = [(name, "25m") for name in WORKLOADS if name not in ("two-pairs", "read-pairs")]
TABLE += [("policy", "120m"), *((name, "1m") for name in ("policy", "short-prompt", "one-completion", "dpo"))]

SCALES = {
    "group": (2, 4, 8, 16),
    "prompt": (32, 128, 256, 512, 1024),
    "vocabulary": (100, 8_000, 32_000, 64_000),
    "ranks": (1, 2),
}
"""Up to where stock TRL takes 10 GiB with 25M parameters."""

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
        if self.name == "read-pairs":
            workload = replace(workload, read=read_pairs(options.rows, workload.prompts, SMOLLM2))
        if self.varied is not None:
            field, value = self.varied
            if field == "vocabulary":
                vocab = value
            elif field == "ranks":  # the same two prompts whatever the number of ranks
                workload = replace(workload, prompts=2, ranks=value, rank=int(os.environ.get("RANK", 0)))
            else:
                workload = replace(workload, **{field: value})
        model = model_of(self.size, vocab=vocab)
        return build(model, workload, bf16=options.bf16, checkpointing=options.checkpointing, only=only)

    @property
    def label(self) -> str:
        return self.name if self.varied is None else f"{self.name}, {self.varied[0]} {self.varied[1]:,}"


# ------------------------------------------------------------------------------------------------------------- the runs


def measure(case: Case, options: argparse.Namespace, sides: Sides) -> dict[str, Any]:
    """One line of the table."""
    kind = WORKLOADS[case.name].kind
    found: dict[str, Any] = {
        "workload": case.name,
        "size": case.size,
        "varied": case.varied,
        "bf16": options.bf16,
        "checkpointing": options.checkpointing,
    }
    if kind == "rollout":
        greedy = {side: generate() for side, generate in sides.greedy.items()}
        found["token_difference"] = _different_tokens(greedy["ours"], greedy["trl"])
    else:
        losses = {side: float(step()) for side, step in sides.steps.items()}
        found["losses"] = losses
        found["loss_difference"] = abs(losses["ours"] - losses["trl"]) / max(abs(losses["trl"]), 1e-9)
    if kind not in ("reference", "rollout"):
        found["gradient_difference"] = relative_difference(*(gradients(sides.models[side]) for side in ("ours", "trl")))
    if options.check:
        return found
    times = interleaved(sides.steps, options.repeats)
    found |= {"speed": ratio(times, "trl", "ours"), "speed_wall": ratio(times, "trl", "ours", "wall"), "times": times}
    return found


def measure_memory(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of both sides, each in a process of its own."""
    peaks = {side: _peak_in_fresh_process(case, side, options) for side in ("trl", "ours")}
    return {"peak_mib": peaks, "memory": peaks["trl"] / peaks["ours"]}


def _different_tokens(found: list[list[int]], expected: list[list[int]]) -> float:
    """Share of the tokens that differ."""
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one != other for one, other in pairs) / len(pairs)


def measure_on_ranks(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One line of the table, by processes that share the prompts; a step takes as long as its slowest rank.

    Args:
        folder: for the gradients, which are compared with those of the first number of ranks that was measured.
    """
    ranks, file = case.varied[1], folder / f"{case.varied[1]}.pt"
    command = [sys.executable, __file__, case.name, "--size", case.size, *_flags(case, options)]
    command += ["--repeats", str(options.repeats), "--on-rank", str(file), *(["--check"] if options.check else [])]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    environment |= {"OMP_NUM_THREADS": "1"}  # accelerate would set more
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(n), "LOCAL_RANK": str(n)}, stdout=subprocess.PIPE)
        for n in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank of {ranks} failed")
    found = json.loads(outputs[0].splitlines()[-1])
    first = min(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    found["rank_difference"] = relative_difference(torch.load(file), torch.load(first))
    return found


def print_rank(case: Case, options: argparse.Namespace) -> None:
    """What one rank of `measure_on_ranks` runs; the first prints the figures of all and leaves our gradients."""
    state = PartialState(cpu=True)
    sides = case.sides(options)
    found = measure(case, options, sides)
    everyone = gather_object([found])
    if state.is_main_process:
        found["loss_difference"] = abs(sum(each["losses"]["ours"] - each["losses"]["trl"] for each in everyone))
        found["loss_difference"] /= max(abs(sum(each["losses"]["trl"] for each in everyone)), 1e-9)
        for side, clocks in found.get("times", {}).items():
            for clock in clocks:
                of_ranks = zip(*(each["times"][side][clock] for each in everyone), strict=True)
                clocks[clock] = [max(seconds) for seconds in of_ranks]
        if "times" in found:
            found |= {"speed": ratio(found["times"], "trl", "ours")}
            found |= {"speed_wall": ratio(found["times"], "trl", "ours", "wall")}
        torch.save(gradients(sides.models["ours"]), options.on_rank)
        print(json.dumps(found))
    state.wait_for_everyone()
    state.destroy_process_group()


def is_equal(found: dict[str, Any]) -> bool:
    loss, gradient = TOLERANCE[found["bf16"]]
    limits = {"loss": loss, "gradient": gradient, "rank": gradient, "token": 0.0}
    return all(found.get(f"{name}_difference", 0.0) <= most for name, most in limits.items())


def _peak_in_fresh_process(case: Case, side: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, case.name, "--size", case.size, "--peak-of", side, *_flags(case, options)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back, so the peak is the need
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _flags(case: Case, options: argparse.Namespace) -> list[str]:
    flags = [f"--{flag}" for flag in ("bf16", "checkpointing") if getattr(options, flag)]
    flags += [] if options.rows is None else ["--rows", str(options.rows)]
    return flags if case.varied is None else [*flags, "--varied", case.varied[0], str(case.varied[1])]


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
    if "rank_difference" in found:
        gradient += f", {found['rank_difference']:.1e} to one rank"
    if "memory" in found:
        memory = f"{found['peak_mib']['trl']:.0f} / {found['peak_mib']['ours']:.0f} = {found['memory']:.1f}"
    loss = (
        f"{found['loss_difference']:.1e}" if "loss_difference" in found else f"{found['token_difference']:.1%} tokens"
    )
    cells = (case.label, case.size, *seconds, speed, loss, gradient, memory)
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------------------------------------------- the picture


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Ratios of speed and memory as bars, one pair per workload, and below them the scales, if any."""
    table = [found for found in results if found["varied"] is None]
    scales = {
        key: [found for found in results if found["varied"] is not None and _scale_of(found) == key]
        for key in dict.fromkeys(_scale_of(found) for found in results if found["varied"] is not None)
    }
    bars, lines = 1 + 0.32 * len(table), 2.6 * -(-len(scales) // 2)
    figure = Figure(figsize=(9, bars + lines), layout="constrained")
    rows = figure.subfigures(2 if scales else 1, 1, height_ratios=[bars, lines] if scales else None, squeeze=False)[
        :, 0
    ]
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
    panels = list(rows[-1].subplots(-(-len(scales) // 2), 2, squeeze=False).flat) if scales else []
    for ax in panels[len(scales) :]:
        ax.remove()
    for ax, ((workload, size, field), found) in zip(panels, scales.items(), strict=False):
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


def _case_of(found: dict[str, Any]) -> tuple[Any, ...]:
    varied = found["varied"] and tuple(found["varied"])
    return found["workload"], found["size"], varied, found.get("bf16"), found.get("checkpointing")


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
        values = SCALES[options.scale]
        return [Case(name, options.size, (options.scale, value)) for name in options.workloads for value in values]
    return [Case(name, options.size) for name in options.workloads] or [Case(*case) for case in TABLE]


def _workload(name: str) -> str:
    if name not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(WORKLOADS)}")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "workloads", nargs="*", type=_workload, help=f"any of {', '.join(WORKLOADS)}; default: the whole table"
    )
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--memory", action="store_true", help="also peak memory")
    parser.add_argument("--rows", type=Path, help="file of preferences that `read-pairs` takes its rows of")
    parser.add_argument("--scale", choices=SCALES, help="vary this of one workload")
    parser.add_argument("--check", action="store_true", help="equality alone")
    parser.add_argument("--json", type=Path, help="file for the figures of all repeats")
    parser.add_argument("--draw", type=Path, nargs="+", help="draw these saved figures, and measure nothing")
    parser.add_argument("--image", type=Path, help="PNG file for a picture of the ratios")
    parser.add_argument("--peak-of", choices=("trl", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--varied", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = {WORKLOADS[name].kind for name in options.workloads}
    if "read-pairs" in options.workloads and (options.rows is None or options.size != "smollm2"):
        parser.error("read-pairs takes --rows FILE and --size smollm2, whose tokenizer it needs")
    if options.scale is not None and not options.workloads:
        parser.error("--scale takes a workload")
    if options.scale == "group" and kinds & {"dpo", "simpo"}:
        parser.error("a pair has two responses")
    if options.scale == "ranks" and kinds != {"policy"}:
        parser.error("--scale ranks takes a policy update")
    if options.scale == "ranks" and options.memory:
        parser.error("--memory is measured on one rank")
    if options.draw is not None:
        if options.image is None:
            parser.error("--draw takes --image")
        saved = [one for file in options.draw for one in json.loads(file.read_text())["results"]]
        draw(list({_case_of(one): one for one in saved}.values()), options.image)  # the last of a case counts
        return
    quiet()
    if options.peak_of or options.on_rank:
        varied = (options.varied[0], int(options.varied[1])) if options.varied else None
        case = Case(options.workloads[0], options.size, varied)
        if options.on_rank:
            print_rank(case, options)
        else:
            print_peak(case, options.peak_of, options)
        return
    print("| workload | model | TRL, s | ours, s | speed | loss diff. | gradient diff. | TRL / ours, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    results: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for case in cases(options):
            if options.scale == "ranks":
                results.append(measure_on_ranks(case, options, Path(folder)))
            else:
                # Memory first: beside the sides that take the times, a fresh process has no room on a small machine.
                memory = measure_memory(case, options) if options.memory else {}
                results.append(measure(case, options, case.sides(options)) | memory)
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
