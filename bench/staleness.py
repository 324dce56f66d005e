"""Which policy gradients stay stable on rollouts that are k updates old: the REC family against GRPO, several seeds.

    python bench/staleness.py --output runs/bench/staleness --bases runs/bench/hybrid

For each seed the base of `hybrid.py` (made if it is not there) trains on sums of two to four terms, on rollouts
sampled k updates earlier (`rollouts.delay`), with the sampling policy's log-probs recorded. Measured on problems that
nobody trained on: accuracy at the end, its best value on the way, and whether it collapsed from there. A cell
(variant, k, seed) is a JSON file that is not made again; `--load bench/results/staleness.json` brings those of ours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cells as saved
import numpy as np
import torch
from hybrid import VERIFIER, Settings, make_base, read_curve, run
from hybrid_report import COLOURS, percent
from matplotlib.figure import Figure

from posttrain.safe_files import write_json_atomic

VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "aggregation": "tokens"},
    "reinforce": {"name": "rec", "clip": "none"},
    "importance_only": {"name": "rec", "clip": "none", "weight": "importance"},
    "one_side": {"name": "rec"},
    "one_side_is": {"name": "rec", "weight": "importance"},
    "one_side_wide": {"name": "rec", "epsilon_low": 0.6, "epsilon_high": 2.0},
    "ring": {"name": "rec", "clip": "ring"},
    "asymre": {"name": "asymre"},
    "opmd": {"name": "opmd"},
    "red_drop": {"name": "rec", "clip": "none", "drop": "balanced"},
    "red_weight": {"name": "rec", "clip": "none", "weight": "advantage"},
}
POINTS = 8
LOST = 0.5
"""A run that falls, at some measurement, below this share of its best accuracy so far is called unstable."""
Cell = dict[str, Any]


def place(output: Path, cell: Mapping[str, Any]) -> Path:
    return output / cell["variant"] / f"k-{cell['k']}" / f"seed-{cell['seed']}.json"


def run_cell(output: Path, bases: Path, variant: str, k: int, seed: int, steps: int, learning_rate: float) -> Cell:
    path = place(output, {"variant": variant, "k": k, "seed": seed})
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    base, started = make_base(Settings(bases, learning_rate, learning_rate), seed), time.process_time()
    prompts = {"task": "chain_sum", "levels": [2, 3, 4], "seed": seed}
    benchmark = {"name": "fresh", "data": prompts | {"size": 192, "split": "test"}, "verifier": VERIFIER}
    measured = {"benchmarks": [benchmark], "samples": 2, "max_new_tokens": 40, "max_batch": 1024}
    recipe = {
        "model": {"path": str(base)},
        "data": {"prompts": prompts | {"size": 4096}},
        "verifier": VERIFIER,
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": 8, "max_new_tokens": 40, "delay": k},
        "method": VARIANTS[variant],
        "batch": {"prompts_per_step": 16, "micro_batch": 128},
        "training": {"learning_rate": learning_rate, "max_steps": steps},
        "evaluation": measured | {"every": max(steps // POINTS, 1)},
        "seed": seed,
        "threads": 1,
    }
    run(recipe, path.with_suffix(""))
    metrics = path.with_suffix("") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    cell = {
        "variant": variant,
        "k": k,
        "seed": seed,
        "points": list(read_curve(metrics)),
        "entropy": [row["entropy"] for row in rows if "entropy" in row],
        "largest_approx_kl": max((row["approx_kl"] for row in rows if "approx_kl" in row), default=None),
        "learning_rate": learning_rate,
        "seconds": time.process_time() - started,
    }
    write_json_atomic(path, cell)
    return cell


def report(cells: Sequence[Cell]) -> str:
    """Rows: variants; columns: k; entries: final accuracy over seeds, and how many seeds collapsed."""
    ks = sorted({cell["k"] for cell in cells})
    lines = ["final sampled accuracy in percent, mean over seeds [95%]; best on the way; unstable runs"]
    lines += ["| variant | " + " | ".join(f"k = {k}" for k in ks) + " |", "| --- " * (len(ks) + 1) + "|"]
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        row = []
        for k in ks:
            curves = [accuracies(cell) for cell in cells if (cell["variant"], cell["k"]) == (variant, k)]
            if not curves:
                row.append("-")
                continue
            best = np.mean([max(curve) for curve in curves])
            unstable = sum(collapses(curve) for curve in curves)
            final = percent(np.array([curve[-1] for curve in curves]))
            row.append(f"{final}; {100 * best:.1f}; {unstable} of {len(curves)}")
        lines.append(f"| {variant} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def collapses(curve: Sequence[float]) -> bool:
    return any(value < LOST * max(curve[: place + 1]) for place, value in enumerate(curve))


def accuracies(cell: Cell) -> list[float]:
    return [point["avg@2"] for point in cell["points"]]


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Accuracy against updates, one panel for each k; pale: single seeds."""
    ks = sorted({cell["k"] for cell in cells})
    figure = Figure(figsize=(4.6 * len(ks), 3.9), dpi=130, layout="constrained")
    for ax, k in zip(figure.subplots(1, len(ks), squeeze=False)[0], ks, strict=True):
        for number, variant in enumerate(dict.fromkeys(cell["variant"] for cell in cells)):
            found = [cell for cell in cells if (cell["variant"], cell["k"]) == (variant, k)]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if number < len(COLOURS) else "--"}
            for cell in found:
                steps = [point["step"] for point in cell["points"]]
                ax.plot(steps, 100 * np.array(accuracies(cell)), alpha=0.2, linewidth=0.8, **style)
            if found:
                ax.plot(steps, 100 * np.mean([accuracies(cell) for cell in found], axis=0), label=variant, **style)
        ax.set_title(f"rollouts {k} updates old", fontsize=10, loc="left")
        ax.set_xlabel("update", fontsize=8)
        ax.set_ylabel("sampled accuracy, percent", fontsize=8)
        ax.grid(color="#dddddd", linewidth=0.6)
    ax.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--k", type=int, nargs="+", default=[0, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--bases", type=Path, default=Path("runs/bench/hybrid"), help="output folder of hybrid.py")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/staleness"))
    saved.add_options(parser)
    options = parser.parse_args()
    saved.load(options.load, partial(place, options.output))
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as workers:
        settings = Settings(options.bases, options.learning_rate, options.learning_rate)
        list(workers.map(make_base, [settings] * len(options.seeds), options.seeds))
        futures = [
            workers.submit(
                run_cell, options.output, options.bases, variant, k, seed, options.steps, options.learning_rate
            )
            for seed in options.seeds
            for k in options.k
            for variant in options.variants
        ]
        cells = []
        for future in futures:
            cells.append(cell := future.result())
            last = f"{cell['points'][-1]['avg@2']:.3f}, {cell['seconds']:.0f} CPU s"
            print(f"{cell['variant']} k {cell['k']} seed {cell['seed']}: {last}", flush=True)
    draw(cells, options.output / "staleness.png")
    print(report(cells))
    saved.save(options.save, options.output, "*/k-*/seed-*.json", partial(place, options.output))


if __name__ == "__main__":
    main()
