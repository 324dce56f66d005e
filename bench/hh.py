"""DPO, SimPO and HyPO on real human preference pairs, with a small model from scratch on a CPU: held-out pair accuracy.

    python bench/hh.py --data hh_harmless_test.jsonl.gz

The rows are dialogues of HH-RLHF. A fifth of the prompts is held out. A small Llama with a BPE tokenizer of its own
learns to write the chosen responses of the other rows; from there each method trains on their pairs. Printed are, for
the held-out pairs, how often the trained reward prefers the chosen response (ties apart, 95% interval clustered by
prompt), the controls for length, what became of every row, and whether any logged loss was not finite.

The reward of DPO and HyPO is the log-ratio to the start, that of SimPO the policy's mean log-prob per token, that of
the explicit reward model its output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config.loading import build_recipe
from posttrain.config.locations import Locations
from posttrain.config.schema import FileSource, ModelConfig, Recipe
from posttrain.data.files import read_rows
from posttrain.data.preferences import usable
from posttrain.data.preparation import fit_preferences
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Preference, Sample
from posttrain.data.sources import preferences
from posttrain.evaluation.pair_accuracy import PairAccuracy, length_control, pair_accuracy
from posttrain.evaluation.reward_scores import Implicit, classifier_scores, response_logps
from posttrain.methods import METHODS
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.token_logps import prepare
from posttrain.trainers.run import train

INIT = {
    "hidden_size": 160,
    "layers": 4,
    "heads": 4,
    "max_length": 512,
    "tokenizer": {"type": "bpe", "vocab_size": 2048},
}
LIMITS = {"max_prompt_length": 256, "max_length": 512, "too_long": "cut", "max_lost_share": 0.1}
WARM_UP = {"learning_rate": 2e-3, "num_train_epochs": 3, "lr_scheduler_type": "cosine", "warmup_steps": 10}
TRAINING = {"num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 5}
METHODS_RUN: dict[str, dict[str, Any]] = {
    "dpo": {"method": {"name": "dpo", "beta": 0.1}, "learning_rate": 3e-4},
    "simpo": {"method": {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}, "learning_rate": 3e-4},
    "hypo": {"method": {"name": "hypo", "beta": 0.1, "lam": 0.01, "k": 2}, "learning_rate": 3e-4},
    "reward": {"method": {"name": "reward", "center_rewards_coefficient": 0.01}, "learning_rate": 3e-4},
}


def split(data: Path, folder: Path, held_out: float) -> tuple[Path, Path]:
    """The rows as two files. All rows of a prompt are on the same side, which a hash of the prompt decides."""
    folder.mkdir(parents=True, exist_ok=True)
    sides: tuple[list[str], list[str]] = ([], [])
    rows = read_rows(str(data))
    pairs = preferences(FileSource(path=str(data), chat=False), "hh")
    for row, pair in zip(rows, pairs, strict=True):
        digest = hashlib.sha256(str(pair.problem.prompt).encode()).digest()
        test = int.from_bytes(digest[:8], "big") / 2**64 < held_out
        sides[test].append(json.dumps(row.values, ensure_ascii=False) + "\n")
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, lines in zip(paths, sides, strict=True):
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def warm_up(rows: Path, folder: Path, options: argparse.Namespace) -> Path:
    """A model that has learnt to write the chosen responses."""
    pairs, _ = usable(preferences(FileSource(path=str(rows), chat=False), "hh"))
    written = folder / "chosen.jsonl"
    lines = [json.dumps({"prompt": pair.problem.prompt, "completion": pair.chosen}) + "\n" for pair in pairs]
    written.write_text("".join(lines), encoding="utf-8")
    recipe = recipe_of(
        {"init": INIT},
        {"completions": {"path": str(written), "completion": "completion", "chat": False}},
        {"name": "sft"},
        WARM_UP | {"num_train_epochs": options.warm_up_epochs},
        folder / "start",
        options,
    )
    return trained(recipe)


def recipe_of(
    model: dict, data: dict, method: dict, training: dict, output: Path, options: argparse.Namespace
) -> Recipe:
    """A recipe with what all runs share."""
    written = {
        "model": model,
        "data": data | LIMITS,
        "method": method,
        "batch": {"rows_per_step": 32, "micro_batch": 32},
        "training": training,
        "tracking": {"console": "off", "plots": False},
        "output": str(output),
        "seed": options.seed,
        "threads": 1,
    }
    if METHODS[method["name"]](METHODS[method["name"]].Config(**method)).needs.samples:
        written["rollouts"] = {"max_new_tokens": 64}
    return build_recipe(written, Locations("bench/hh.py"), {name: cls.Config for name, cls in METHODS.items()})


def trained(recipe: Recipe) -> Path:
    """The model of a recipe; a run that is there is not repeated."""
    model = Path(recipe.output) / "model"
    if not model.exists():
        began = time.process_time()
        train(recipe)
        (Path(recipe.output) / "cpu_seconds").write_text(f"{time.process_time() - began:.0f}")
    return model


def held_out_rows(rows: Path, model: Path, recipe: Recipe) -> tuple[list[Preference], list[dict[str, Sample]], str]:
    """The held-out pairs as tokens within the limits of the training, and what became of the rows."""
    _, tokenizer = load_policy(ModelConfig(path=str(model)), seed=0)
    renderer, method = Renderer(tokenizer), METHODS["dpo"](METHODS["dpo"].Config())
    pairs = {pair.problem.id: pair for pair in preferences(FileSource(path=str(rows), chat=False), "held-out")}
    fitted, ledger = fit_preferences(
        recipe, list(pairs.values()), lambda row: method.responses(row, renderer), head_ids=renderer.head_ids
    )
    return [pairs[row["chosen"].problem_id] for row in fitted], fitted, ledger.summary()


def logps_of(model: Path, samples: Sequence[Sample]) -> Tensor:
    policy, tokenizer = load_policy(ModelConfig(path=str(model)), seed=0)
    prepare(policy)
    return response_logps(policy, samples, tokenizer.pad_token_id, 32)


def outputs_of(model: Path, samples: Sequence[Sample]) -> Tensor:
    classifier, tokenizer = load_classifier(ModelConfig(path=str(model)), seed=0, new_head=False)
    return classifier_scores(classifier, samples, tokenizer.pad_token_id, 32)


def in_words(found: PairAccuracy | None) -> str:
    """Accuracy in percent with its interval."""
    if found is None:
        return "none"
    interval = found.accuracy
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def finite(run: Path) -> bool:
    """Whether every logged loss and gradient norm is finite."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm") if name in line)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="rows of HH-RLHF: chosen, rejected")
    parser.add_argument("--methods", nargs="+", default=list(METHODS_RUN), choices=list(METHODS_RUN))
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the prompts")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the pairs")
    parser.add_argument("--warm-up-epochs", type=float, default=WARM_UP["num_train_epochs"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/hh"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, test = split(options.data, options.output, options.held_out)
    start = warm_up(rows, options.output, options)

    runs = {}
    for name in options.methods:
        given = METHODS_RUN[name]
        training = TRAINING | {"num_train_epochs": options.epochs, "learning_rate": given["learning_rate"]}
        data = {"preferences": {"path": str(rows), "chat": False}}
        runs[name] = recipe_of({"path": str(start)}, data, given["method"], training, options.output / name, options)
        trained(runs[name])

    pairs, fitted, ledger = held_out_rows(test, start, next(iter(runs.values())))
    samples = [row[role] for role in ("chosen", "rejected") for row in fitted]
    tokens = torch.tensor([sum(sample.loss_mask) for sample in samples])
    prompts = [json.dumps(pair.problem.prompt) for pair in pairs]
    reference = logps_of(start, samples)

    def margins(scores: Tensor) -> list[float]:
        chosen, rejected = scores.double().view(2, -1)
        return (chosen - rejected).tolist()

    differences = [int(difference) for difference in margins(tokens)]
    lines = ["| score | accuracy | ties | chosen longer | chosen shorter | balanced | loss finite | CPU s |"]
    lines.append("| --- " * 8 + "|")

    def add(name: str, scores: Tensor, checked: str, seconds: str) -> None:
        found, control = pair_accuracy(margins(scores), prompts), length_control(margins(scores), differences, prompts)
        cells = [name, in_words(found), f"{found.ties}", in_words(control.longer), in_words(control.shorter)]
        lines.append("| " + " | ".join([*cells, f"{100 * control.balanced:.1f}", checked, seconds]) + " |")

    add("the shorter response", -tokens, "", "")
    add("start, log-prob per token", reference / tokens, "", "")
    for name, recipe in runs.items():
        run = Path(recipe.output)
        if name == "reward":
            score = outputs_of(run / "model", samples)
        else:
            scores = Implicit(logps_of(run / "model", samples), reference, tokens).scores()
            score = scores["policy log-prob per token" if name == "simpo" else "implicit"]
        add(name, score, "yes" if finite(run) else "NO", (run / "cpu_seconds").read_text())
    print(f"training rows, {runs[options.methods[0]].method.name}: {data_of(runs[options.methods[0]])}")
    print(f"held-out rows: {ledger}; {len(set(prompts))} prompts\n")
    print("\n".join(lines))


def data_of(recipe: Recipe) -> str:
    """What became of the training rows, from the run's own ledger."""
    found = json.loads((Path(recipe.output) / "data.json").read_text(encoding="utf-8"))
    return ", ".join(f"{name} {value}" for name, value in found.items())


if __name__ == "__main__":
    main()
