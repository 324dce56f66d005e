"""The online methods and GRPO's variants on the testbed, same base and problems, several seeds: one table.

    python bench/variants.py --base runs/quickstart/base/model --seeds 0 1 2 --output runs/bench/variants

Runs every recipe of recipes/testbed that starts from the testbed base for its 100 updates and evaluates greedy accuracy
on held-out problems. The recipes share the learning rate of the GRPO one, which was chosen for GRPO, so the
table says that each variant runs and learns, not which is best. Finished runs are kept, so the command can be repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from posttrain.config.loading import load_recipe
from posttrain.config.schema import EvaluationConfig, ModelConfig
from posttrain.evaluation.report import Report
from posttrain.evaluation.runner import evaluate_model
from posttrain.methods import METHODS
from posttrain.tracking.plots import plot_comparison
from posttrain.trainers.run import train

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "testbed"
BENCHMARKS = ["chain-sum-3", "chain-sum-4", "chain-sum-6"]


def report_of(model: str, path: Path) -> Report:
    """The evaluation of a model, from `path` if it is there."""
    if path.exists():
        return Report.load(path)
    config = EvaluationConfig(benchmarks=BENCHMARKS, samples=4, max_new_tokens=64)
    return evaluate_model(ModelConfig(path=model), config, path)


def cells(report: Report) -> list[str]:
    """Greedy accuracy per benchmark, in percent."""
    values = {benchmark.name: benchmark.headline()["greedy"].value for benchmark in report.benchmarks}
    return [f"{100 * values[name]:.1f}" for name in BENCHMARKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="model folder to start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/variants"))
    options = parser.parse_args()
    configs = {name: cls.Config for name, cls in METHODS.items()}
    lines = ["| recipe | seed | " + " | ".join(BENCHMARKS) + " |", "| --- | --- |" + " --- |" * len(BENCHMARKS)]
    lines.append("| base | | " + " | ".join(cells(report_of(options.base, options.output / "base.json"))) + " |")
    for path in sorted(RECIPES.glob("*.yaml")):
        if not yaml.safe_load(path.read_text(encoding="utf-8"))["model"].get("path", "").startswith("runs/"):
            continue
        runs = []
        for seed in options.seeds:
            run = options.output / path.stem / f"seed-{seed}"
            if not (run / "model").exists():
                overrides = [f"model.path={options.base}", f"output={run}", f"seed={seed}", "tracking.console=off"]
                train(load_recipe(path, [*overrides, f"data.prompts.seed={seed}"], configs))
            report = report_of(str(run / "model"), run / "report.json")
            lines.append(f"| {path.stem.split('-')[0]} | {seed} | " + " | ".join(cells(report)) + " |")
            runs.append(run)
            print(lines[-1], flush=True)
        plot_comparison(runs, "accuracy", options.output / f"{path.stem}.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
