"""Whole GRPO steps on the quickstart's task, rollouts and verification included: ours and stock TRL in turn.

    python bench/step_speed.py                                  the quickstart's settings
    python bench/step_speed.py --base runs/quickstart/base/model --rounds 5 --steps 12

Both train the same base on the same kind of problems with the same sizes, sampling and learning rate, from the start in
every round; the order of the sides alternates. Each side gets the verifier it would have: ours its worker processes,
TRL a reward function that calls the same verifier at once. A step counts from the end of one to the end of the next,
the first ones of a round left out. Seconds are wall clock, and CPU of this process and its workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from accelerate import PartialState
from common import quiet
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from posttrain.config.loading import load_recipe
from posttrain.config.schema import Recipe
from posttrain.data.sources import problems
from posttrain.methods import METHODS
from posttrain.trainers.run import build, train
from posttrain.verifiers import VERIFIERS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "testbed"
SECTIONS = {name: method.Config for name, method in METHODS.items()}
WARM_UP = 2
"""Steps of a round that are not counted: caches fill, workers start."""


class Clock(TrainerCallback):
    """Wall and CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        process = psutil.Process()
        times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
        self.wall.append(time.perf_counter())
        self.cpu.append(sum(t.user + t.system for t in times))

    def seconds(self, clock: str) -> float:
        """Median step."""
        ends = getattr(self, clock)[WARM_UP - 1 :]
        return statistics.median(after - before for before, after in zip(ends, ends[1:], strict=False))


def ours(recipe: Recipe) -> tuple[Clock, dict[str, float]]:
    """One round by the shell."""
    clock = Clock()
    method = METHODS[recipe.method.name](recipe.method)
    shell = build(recipe, method, PartialState(cpu=True)).shell
    shell.add_callback(clock)
    found: dict[str, list[float]] = {}
    shell.tracker.log = lambda _, metrics: [found.setdefault(name, []).append(v) for name, v in metrics.items()]
    try:
        shell.train()
    finally:
        shell.parts.engine.close()
        shell.parts.judge.close()
        shell.tracker.close(plots=False)
    counted = {name: found[name][WARM_UP:] for name in ("reward", "completion_length")}
    return clock, {name: statistics.mean(values) for name, values in counted.items()}


def stock(recipe: Recipe, seed: int) -> tuple[Clock, dict[str, float]]:
    """One round by TRL's trainer with its own generation, loss and logging."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    rows = problems(recipe.data.prompts, "prompts")
    known = {problem.id: problem for problem in rows}
    verifier = VERIFIERS[recipe.verifier[0].type](recipe.verifier[0])

    def reward(completions: list[str], id: list[str], **_: Any) -> list[float]:
        return [verifier(known[i], text).score or 0.0 for i, text in zip(id, completions, strict=True)]

    prompts, samples = recipe.batch.prompts_per_step, recipe.rollouts.samples_per_prompt
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        seed=seed,
        per_device_train_batch_size=recipe.batch.micro_batch,
        gradient_accumulation_steps=prompts * samples // recipe.batch.micro_batch,
        num_generations=samples,
        max_completion_length=recipe.rollouts.max_new_tokens,
        temperature=recipe.rollouts.temperature,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=recipe.training.learning_rate,
        lr_scheduler_type=recipe.training.lr_scheduler_type,
        max_grad_norm=recipe.training.max_grad_norm,
        max_steps=recipe.training.max_steps,
        logging_steps=1,
        bf16=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "id": p.id} for p in rows]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry][WARM_UP:]
    return clock, {
        "reward": statistics.mean(entry["reward"] for entry in logged),
        "completion_length": statistics.mean(entry["completions/mean_length"] for entry in logged),
    }


def make_base(folder: Path) -> Path:
    """The quickstart's base, trained once."""
    if not (folder / "model").exists():
        train(
            load_recipe(RECIPES / "sft-tiny-chain_sum.yaml", [f"output={folder}", "tracking.console=plain"], SECTIONS)
        )
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="a trained base; default: the quickstart's, made here")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/step_speed"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="steps of a round")
    parser.add_argument("--json", type=Path, help="file for the figures of all rounds")
    options = parser.parse_args()
    quiet()
    base = options.base or make_base(options.output / "base")
    results = []
    for number in range(options.rounds):

        def recipe(side: str, number: int = number) -> Recipe:
            overrides = [f"model.path={base}", f"training.max_steps={options.steps}", f"seed={number}"]
            overrides += [f"output={options.output / side}", "training.logging_steps=1", "tracking.console=off"]
            return load_recipe(RECIPES / "grpo-tiny-chain_sum.yaml", overrides, SECTIONS)

        sides: list[tuple[str, Callable[[], tuple[Clock, dict[str, float]]]]] = [
            ("ours", lambda recipe=recipe: ours(recipe("ours"))),
            ("trl", lambda recipe=recipe, number=number: stock(recipe("trl"), number)),
        ]
        found: dict[str, Any] = {"round": number}
        for side, run in sides if number % 2 == 0 else sides[::-1]:
            clock, means = run()
            found[side] = {"wall": clock.seconds("wall"), "cpu": clock.seconds("cpu")} | means
        results.append(found)
        print(json.dumps(found), flush=True)
    print("| clock | TRL, s per step | ours, s per step | TRL / ours |\n| --- | --- | --- | --- |")
    for name in ("wall", "cpu"):
        seconds = {side: statistics.median(found[side][name] for found in results) for side in ("trl", "ours")}
        ratio = statistics.median(found["trl"][name] / found["ours"][name] for found in results)
        print(f"| {name} | {seconds['trl']:.3f} | {seconds['ours']:.3f} | {ratio:.2f} |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
