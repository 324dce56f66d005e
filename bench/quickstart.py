"""Does the quickstart teach, on every seed? Runs its pipeline from scratch for several seeds and prints one table.

    python bench/quickstart.py --seeds 0 1 2 --output runs/bench/quickstart

Each seed has its own base model, training data, prompts and rollouts; the held-out problems are the same for all. The
columns are the pipeline's own: greedy accuracy in percent with 95% intervals, the paired difference in points, and
seconds of wall clock for the whole pipeline. Exits with 1 unless, on every seed and on the benchmarks of trained
length, the gain is at least `--least` points and the intervals are disjoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from posttrain.pipeline.runner import run_pipeline

ROOT = Path(__file__).resolve().parents[1]
TRAINED_LENGTH = ("chain-sum-3", "chain-sum-4")


def run(seed: int, output: Path) -> tuple[list[dict], float]:
    """One quickstart from scratch; its table's rows for greedy accuracy and its seconds."""
    overrides = [f"output={output}"]
    for stage, source in (("base", "completions"), ("grpo", "prompts")):
        overrides += [f"{stage}.seed={seed}", f"{stage}.data.{source}.seed={seed}"]
    started = time.perf_counter()
    run_pipeline(ROOT / "recipes" / "quickstart.yaml", overrides, force=["base"])
    seconds = time.perf_counter() - started
    table = json.loads((output / "result" / "table.json").read_text(encoding="utf-8"))
    return [change for change in table["changes"] if change["metric"] == "greedy"], seconds


def percent(interval: dict) -> str:
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/quickstart"))
    parser.add_argument("--least", type=float, default=15.0, help="points of greedy accuracy to gain")
    options = parser.parse_args()
    lines = ["| seed | benchmark | base | trained | difference | seconds |", "| --- | --- | --- | --- | --- | --- |"]
    good = True
    for seed in options.seeds:
        changes, seconds = run(seed, options.output / f"seed-{seed}")
        for change in changes:
            base, other, difference = change["base"], change["other"], change["difference"]
            if change["benchmark"] in TRAINED_LENGTH:
                good &= 100 * difference["value"] >= options.least and base["high"] < other["low"]
            cells = (seed, change["benchmark"], percent(base), percent(other), percent(difference), f"{seconds:.0f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n" + "\n".join(lines))
    print(
        f"\ngain of at least {options.least:g} points with disjoint intervals on every seed: {'yes' if good else 'NO'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
