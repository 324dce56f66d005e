"""DPO, SimPO and HyPO on pairs that the base wrote itself, several seeds: accuracy, length and KL, as table and curves.

    python bench/preference.py --seeds 1 2 3 --save bench/results/preference.json --image docs/images/preference.png

For each seed: a base is trained on a weak annotator's traces, it samples 16 completions for training problems of levels
3 and 4, the strict verifier judges them, and right and wrong ones make pairs (at most four per problem). Each recipe
below trains on the same pairs for 100 updates; a tenth of the prompts is held out. Measured before and every 20
updates: greedy accuracy on held-out problems, length, and on held-out prompts the KL to the base (sampled, with
interval) and the log-probs of chosen and rejected. The settings of the recipes were chosen on seed 0, which is not
among those reported. Finished parts are kept. `--draw FILE` only draws the curves of a saved result.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from posttrain.config.collection import PairSettings, SampleSettings
from posttrain.config.loading import load_recipe
from posttrain.data.held_out import hold_out
from posttrain.data.pairs import write_pairs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example
from posttrain.data.sources import preferences
from posttrain.evaluation.report import Report
from posttrain.evaluation.token_rewards import Response, token_rewards
from posttrain.methods import METHODS
from posttrain.models.tokenizer import load_tokenizer
from posttrain.rollouts.collect import collect
from posttrain.safe_files import write_json_atomic
from posttrain.tracking.plots import COLOURS, GREY, PALE
from posttrain.trainers.run import train

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CONFIGS = {name: cls.Config for name, cls in METHODS.items()}
COMPARED = ("dpo", "simpo", "hypo")
BENCHMARKS = ("chain-sum-3", "chain-sum-4")
EVERY = 20
MEASURED = [
    f"evaluation.benchmarks={json.dumps(BENCHMARKS)}",
    "evaluation.max_new_tokens=64",
    f"evaluation.every={EVERY}",
    "evaluation.preferences.share=0.1",
    "evaluation.preferences.kl_prompts=128",
]

Curves = dict[str, list[Any]]
"""`step`, and beside it one value per step for each measure."""


def base_of(folder: Path, seed: int) -> Path:
    """The base of a seed, trained if it is not there."""
    run = folder / "base"
    if not (run / "model").exists():
        changes = [f"output={run}", f"seed={seed}", f"data.completions.seed={seed}", "tracking.console=off"]
        train(load_recipe(RECIPES / "testbed" / "sft-tiny-chain_sum.yaml", changes, CONFIGS))
    return run / "model"


def pairs_of(base: Path, folder: Path, seed: int) -> Path:
    """Pairs from the base's own verified completions."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        settings = SampleSettings(
            model={"path": str(base)},
            data={"prompts": {"task": "chain_sum", "levels": [3, 4], "size": 2048, "seed": seed}},
            verifier=[{"type": "procedural", "profile": "strict"}],
            rollouts={"samples_per_prompt": 16, "max_new_tokens": 48},
            seed=seed,
            threads=1,
        )
        collect(settings, folder / "traces.jsonl", say=lambda _: None)
        write_pairs([folder / "traces.jsonl"], pairs, PairSettings(strategy="margin", max_pairs=4, seed=seed))
    return pairs


def trained(name: str, base: Path, pairs: Path, run: Path, seed: int, overrides: list[str]) -> Curves:
    """A recipe's run on the pairs, measured all along."""
    if not (run / "model").exists():
        recipe = RECIPES / "preference" / f"{name}-tiny-chain_sum.yaml"
        changes = [f"model.path={base}", f"data.preferences.path={pairs}", f"output={run}", f"seed={seed}"]
        train(load_recipe(recipe, [*changes, "tracking.console=off", *MEASURED, *overrides], CONFIGS))
    return curves_of(run)


def curves_of(run: Path) -> Curves:
    """What the evaluations of a run found, by step."""
    found: Curves = {"step": []}
    for path in sorted((run / "evaluation").glob("step-*.json")):
        report = Report.load(path)
        held_out = json.loads((run / "held_out" / path.name).read_text(encoding="utf-8"))
        found["step"].append(held_out["step"])
        for benchmark in report.benchmarks:
            greedy = benchmark.headline()["greedy"]
            found.setdefault(benchmark.name, []).append([greedy.value, greedy.low, greedy.high])
        lengths = [benchmark.greedy.mean_length for benchmark in report.benchmarks]
        kl = held_out["drift"]["kl"]
        values = {
            "length": sum(lengths) / len(lengths),
            "sampled length": held_out["drift"]["length"],
            "kl": [kl["value"], kl["low"], kl["high"]],
            "logps chosen": held_out["logps_chosen"],
            "logps rejected": held_out["logps_rejected"],
            "pair accuracy": held_out["accuracy"]["accuracy"]["value"],
            "pair accuracy per token": held_out["accuracy_per_token"]["accuracy"]["value"],
        }
        for measure, value in values.items():
            found.setdefault(measure, []).append(value)
    return found


def localised(run: Path, base: Path) -> dict[str, float]:
    """How often the rejected answer's lowest token reward stands where it first differs from the chosen answer.

    On the held-out pairs. Chance is the mean of 1 / tokens.
    """
    recipe = load_recipe(run / "resolved.yaml", [], CONFIGS)
    renderer = Renderer(load_tokenizer(recipe.model))
    rows = hold_out(recipe.evaluation.preferences, preferences(recipe.data.preferences, "pairs"), seed=0).held_out
    responses = [
        Response(row.problem.id, "", renderer.sample(Example(row.problem, text)))
        for row in rows
        for text in (row.chosen, row.rejected)
    ]
    how = (recipe.method.beta, responses, renderer, "float32")
    found = token_rewards(str(run / "model"), str(base), *how)
    hits, chances = [], []
    for chosen, rejected in zip(found[::2], found[1::2], strict=True):
        differ = [i for i, (a, b) in enumerate(zip(chosen.ids, rejected.ids, strict=False)) if a != b]
        lowest = min(range(len(rejected.ids)), key=rejected.rewards.__getitem__)
        hits.append(lowest == differ[0])
        chances.append(1 / len(rejected.ids))
    return {"share": sum(hits) / len(hits), "chance": sum(chances) / len(chances), "pairs": len(hits)}


# -------------------------------------------------------------------------------------------------------- table, curves


def table(seeds: dict[str, dict[str, Curves]]) -> str:
    """One row per seed and model: the base is what every run measures before its first update."""
    head = ["seed", "model", *BENCHMARKS, "length", "KL to the base", "chosen / rejected"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for seed, runs in seeds.items():
        first = next(iter(runs.values()))
        lines.append(_row(seed, "base", first, 0))
        lines += [_row(seed, name, curves, -1) for name, curves in runs.items()]
    return "\n".join(lines)


def _row(seed: str, name: str, curves: Curves, at: int) -> str:
    shares = [_percent(*curves[benchmark][at]) for benchmark in BENCHMARKS]
    kl = "{:.2f} [{:.2f}, {:.2f}]".format(*curves["kl"][at])
    logps = f"{curves['logps chosen'][at]:.2f} / {curves['logps rejected'][at]:.2f}"
    return f"| {seed} | {name} | {' | '.join(shares)} | {curves['length'][at]:.1f} | {kl} | {logps} |"


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def draw(result: dict[str, Any], out: Path) -> None:
    """Curves of all seeds: a colour per method, a line per seed; bars are 95% intervals at the last step."""
    figure = Figure(figsize=(11.0, 5.6), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    titles = {
        "chain-sum-3": "Greedy accuracy, 3 terms (%)",
        "chain-sum-4": "Greedy accuracy, 4 terms (%)",
        "kl": "KL to the base (nats per completion)",
        "logps chosen": "Log-prob of held-out chosen (nats)",
        "logps rejected": "Log-prob of held-out rejected (nats)",
        "sampled length": "Length of sampled completions (tokens)",
    }
    for ax, (measure, title) in zip(panels, titles.items(), strict=True):
        for runs in result["seeds"].values():
            for number, curves in enumerate(runs.values()):
                scale = 100.0 if measure in BENCHMARKS else 1.0
                points = [value if isinstance(value, list) else [value] * 3 for value in curves[measure]]
                middle, low, high = ([scale * point[i] for point in points] for i in range(3))
                ax.plot(curves["step"], middle, color=COLOURS[number], linewidth=1.3, marker="o", markersize=2.5)
                reach = [[middle[-1] - low[-1]], [high[-1] - middle[-1]]]
                ax.errorbar(curves["step"][-1:], middle[-1:], yerr=reach, color=COLOURS[number], capsize=2.5)
        _decorate(ax, title)
    for number, name in enumerate(next(iter(result["seeds"].values()))):
        panels[0].plot([], [], color=COLOURS[number], label=name)
    panels[0].legend(fontsize=8, frameon=False, loc="upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def _decorate(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel("update", fontsize=8, color=GREY)
    ax.tick_params(labelsize=8, colors=GREY)
    ax.grid(color=PALE, linewidth=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(COMPARED))
    parser.add_argument("--set", action="append", default=[], help="override for every recipe, e.g. method.beta=2")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/preference"))
    parser.add_argument("--save", type=Path, help="JSON file for the result")
    parser.add_argument("--image", type=Path, help="PNG file for the curves")
    parser.add_argument("--draw", type=Path, help="draw this saved result, and train nothing")
    options = parser.parse_args()
    if options.draw is not None:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)
        result = {
            "command": " ".join(sys.argv),
            "versions": {"python": platform.python_version()}
            | {p: version(p) for p in ("torch", "transformers", "trl")},
            "seeds": {},
            "localised": {},
        }
        for seed in options.seeds:
            folder = options.output / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            base = base_of(folder, seed)
            pairs = pairs_of(base, folder, seed)
            runs = result["seeds"][str(seed)] = {}
            for name in options.methods:
                runs[name] = trained(name, base, pairs, folder / name, seed, options.set)
                print(_row(str(seed), name, runs[name], -1), flush=True)
            if "dpo" in options.methods:
                result["localised"][str(seed)] = localised(folder / "dpo", base)
            if options.save is not None:
                write_json_atomic(options.save, result)
    if options.image is not None:
        draw(result, options.image)
    print(table(result["seeds"]))
    for seed, found in result["localised"].items():
        print(
            f"seed {seed}: lowest token reward at the first difference: {found['share']:.1%} of {found['pairs']} pairs"
        )


if __name__ == "__main__":
    main()
