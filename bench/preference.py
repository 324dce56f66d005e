"""DPO, SimPO and HyPO on pairs that the base wrote itself, several seeds: accuracy, length and KL in one table.

    python bench/preference.py --bases runs/bench/quickstart/seed-{}/base/model --seeds 1 2

For each seed: the base samples 16 completions for training problems of levels 3 and 4, the strict verifier judges
them, right and wrong ones make pairs (at most four per problem), and each recipe below trains on the same pairs for 100
updates. Measured on held-out problems: greedy accuracy with 95% intervals, the mean length of greedy completions, and
the reverse KL to the base, as the mean log-ratio of sampled completions (nats per completion). The settings were chosen
on seed 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from posttrain.config.collection import PairSettings, SampleSettings
from posttrain.config.loading import load_recipe
from posttrain.config.schema import EvaluationConfig, ModelConfig
from posttrain.data.pairs import write_pairs
from posttrain.data.rendering import Renderer
from posttrain.data.sources import problems
from posttrain.evaluation.benchmarks import resolve
from posttrain.evaluation.report import Report
from posttrain.evaluation.runner import evaluate_model
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.rollouts.collect import collect
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.run import train

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "preference"
COMPARED = ("dpo", "simpo", "hypo")
BENCHMARKS = ["chain-sum-3", "chain-sum-4"]


def pairs_of(base: str, folder: Path, seed: int) -> Path:
    """Pairs from the base's own verified completions."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        settings = SampleSettings(
            model={"path": base},
            data={"prompts": {"task": "chain_sum", "levels": [3, 4], "size": 2048, "seed": seed}},
            verifier=[{"type": "procedural", "profile": "strict"}],
            rollouts={"samples_per_prompt": 16, "max_new_tokens": 48},
            seed=seed,
            threads=1,
        )
        collect(settings, folder / "traces.jsonl", say=lambda _: None)
        write_pairs([folder / "traces.jsonl"], pairs, PairSettings(strategy="margin", max_pairs=4, seed=seed))
    return pairs


def report_of(model: str, path: Path) -> Report:
    """The evaluation of a model, from `path` if it is there."""
    if path.exists():
        return Report.load(path)
    return evaluate_model(ModelConfig(path=model), EvaluationConfig(benchmarks=BENCHMARKS, max_new_tokens=64), path)


@torch.no_grad()
def reverse_kl(model_path: str, base_path: str) -> float:
    """Mean of log policy - log base over completions that the policy samples for held-out prompts, in nats."""
    policy, tokenizer = load_policy(ModelConfig(path=model_path), seed=0)
    base, _ = load_policy(ModelConfig(path=base_path), seed=0)
    renderer = Renderer(tokenizer)
    held_out = [p for b in resolve(BENCHMARKS) for p in problems(b.data, b.name)[:128]]
    prompts = [renderer.prompt_ids(problem) for problem in held_out]
    settings = {"stop_ids": renderer.stop_ids, "pad_id": tokenizer.pad_token_id, "max_batch": 256}
    drawn = TransformersEngine(policy.eval(), **settings).generate(prompts, Sampling(n=4, max_new_tokens=64))
    ratios = [
        sum(completion.logps) - log_prob(base.eval(), prompt, completion)
        for prompt, group in zip(prompts, drawn, strict=True)
        for completion in group
    ]
    return sum(ratios) / len(ratios)


def log_prob(model: PreTrainedModel, prompt: Sequence[int], completion: Completion) -> float:
    """Log-prob of a whole completion."""
    ids = torch.tensor([[*prompt, *completion.ids]])
    logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, torch.tensor(completion.ids).unsqueeze(1)).sum())


def cells(report: Report, kl: float) -> str:
    """Accuracies with intervals, mean length, KL."""
    found = []
    for benchmark in report.benchmarks:
        greedy = benchmark.headline()["greedy"]
        found.append(f"{100 * greedy.value:.1f} [{100 * greedy.low:.1f}, {100 * greedy.high:.1f}]")
    lengths = [benchmark.greedy.mean_length for benchmark in report.benchmarks]
    return " | ".join([*found, f"{sum(lengths) / len(lengths):.1f}", f"{kl:.2f}"])


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", required=True, help="model folder per seed, with {} for the seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/preference"))
    options = parser.parse_args()
    configs = {name: cls.Config for name, cls in METHODS.items()}
    head = ["seed", "model", *BENCHMARKS, "length", "reverse KL"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for seed in options.seeds:
        base, folder = options.bases.format(seed), options.output / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        lines.append(f"| {seed} | base | {cells(report_of(base, folder / 'base.json'), 0.0)} |")
        pairs = pairs_of(base, folder, seed)
        for name in COMPARED:
            run = folder / name
            if not (run / "model").exists():
                recipe = RECIPES / f"{name}-tiny-chain_sum.yaml"
                overrides = [f"model.path={base}", f"data.preferences.path={pairs}", f"output={run}", f"seed={seed}"]
                train(load_recipe(recipe, [*overrides, "tracking.console=off"], configs))
            model = str(run / "model")
            measured = cells(report_of(model, run / "report.json"), reverse_kl(model, base))
            lines.append(f"| {seed} | {name} | {measured} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
