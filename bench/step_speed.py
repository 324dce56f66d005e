"""Whole steps of GRPO, rollouts and verification included: ours and stock TRL's in turn.

    python bench/step_speed.py                                  on the quickstart's task and settings
    python bench/step_speed.py --on smollm2 --rounds 2 --steps 6      with LoRA on a pretrained model

Both train the same base on the same kind of problems with the same sizes, sampling and learning rate, from the start in
every round; the order of the sides alternates. Each side gets the verifier it would have: ours its worker processes,
TRL a reward function that calls the same verifier at once. A step counts from the end of one to the end of the next,
the first ones of a round left out. Seconds are wall clock, and CPU of this process and its workers. The pretrained
model is made by `make build/smollm2/model.safetensors`; TRL gets its prompts as messages, which it renders by the same
template.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
from accelerate import PartialState
from common import SMOLLM2, quiet
from datasets import Dataset
from speed_sides import trl_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from posttrain.config.loading import load_recipe
from posttrain.config.schema import Recipe
from posttrain.data.preparation import load_rows
from posttrain.methods import METHODS
from posttrain.models.adapters import adapter_to_train
from posttrain.safe_files import write_json_atomic
from posttrain.trainers.run import build, train
from posttrain.verifiers import VERIFIERS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STEPS = {"tiny": "testbed/grpo-tiny-chain_sum.yaml", "smollm2": "real/grpo-smollm2-sums.yaml"}
SECTIONS = {name: method.Config for name, method in METHODS.items()}
WARM_UP = 2
"""Steps of a round that are not counted: caches fill, workers start."""


class Clock(TrainerCallback):
    """Wall and CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.ends: dict[str, list[float]] = {"wall": [], "cpu": []}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        process = psutil.Process()
        times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
        self.ends["wall"].append(time.perf_counter())
        self.ends["cpu"].append(sum(t.user + t.system for t in times))

    def medians(self) -> dict[str, float]:
        """Of a step, by clock."""
        found = {name: ends[WARM_UP - 1 :] for name, ends in self.ends.items()}
        return {
            name: statistics.median(after - before for before, after in zip(ends, ends[1:], strict=False))
            for name, ends in found.items()
        }


def ours(recipe: Recipe) -> dict[str, float]:
    """One round by the shell."""
    clock = Clock()
    shell = build(recipe, METHODS["grpo"](recipe.method), PartialState(cpu=True)).shell
    shell.add_callback(clock)
    found: dict[str, list[float]] = {}
    shell.tracker.log = lambda _, metrics: [found.setdefault(name, []).append(v) for name, v in metrics.items()]
    try:
        shell.train()
    finally:
        shell.parts.engine.close()
        shell.parts.judge.close()
        shell.tracker.close(plots=False)
    names = ("reward", "completion_length", "rollout_seconds", "verify_seconds")
    return clock.medians() | {name: statistics.mean(found[name][WARM_UP:]) for name in names}


def stock(recipe: Recipe) -> dict[str, float]:
    """One round by TRL's trainer with its own generation, loss and logging."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    known = {problem.id: problem for problem in load_rows(recipe, METHODS["grpo"](recipe.method).needs)}
    verifier = VERIFIERS[recipe.verifier[0].type](recipe.verifier[0])

    def reward(completions: list[Any], id: list[str], **_: Any) -> list[float]:
        texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
        return [verifier(known[i], text).score or 0.0 for i, text in zip(id, texts, strict=True)]

    def prompt(text: str) -> str | list[dict[str, str]]:
        return text if tokenizer.chat_template is None else [{"role": "user", "content": text}]

    rows = recipe.batch.prompts_per_step * recipe.rollouts.samples_per_prompt
    arguments = GRPOConfig(
        **trl_arguments(bf16=False, rows=recipe.batch.micro_batch),
        save_strategy="no",
        seed=recipe.seed,
        gradient_accumulation_steps=rows // recipe.batch.micro_batch,
        num_generations=recipe.rollouts.samples_per_prompt,
        max_completion_length=recipe.rollouts.max_new_tokens,
        temperature=recipe.rollouts.temperature,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards=recipe.method.scale_rewards,
        learning_rate=recipe.training.learning_rate,
        lr_scheduler_type=recipe.training.lr_scheduler_type,
        max_grad_norm=recipe.training.max_grad_norm,
        max_steps=recipe.training.max_steps,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(recipe.model.path),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt(p.prompt), "id": p.id} for p in known.values()]),
        processing_class=tokenizer,
        peft_config=adapter_to_train(recipe.model),
    )
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry][WARM_UP:]
    names = {"reward": "reward", "completion_length": "completions/mean_length"}
    return clock.medians() | {own: statistics.mean(entry[name] for entry in logged) for own, name in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=STEPS, default="tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/step_speed"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="steps of a round")
    parser.add_argument("--json", type=Path, help="file for the figures of all rounds")
    options = parser.parse_args()
    quiet()
    base = SMOLLM2 if options.on == "smollm2" else options.output / "base" / "model"
    if not base.exists():
        recipe = RECIPES / "testbed" / "sft-tiny-chain_sum.yaml"
        train(load_recipe(recipe, [f"output={base.parent}", "tracking.console=plain"], SECTIONS))
    results = []
    for number in range(options.rounds):
        found: dict[str, Any] = {"round": number}
        for side, run in (("ours", ours), ("trl", stock))[:: 1 if number % 2 == 0 else -1]:
            overrides = [f"model.path={base}", f"training.max_steps={options.steps}", f"seed={number}"]
            overrides += [f"output={options.output / side}", "training.logging_steps=1", "tracking.console=off"]
            found[side] = run(load_recipe(RECIPES / STEPS[options.on], overrides, SECTIONS))
        results.append(found)
        print(json.dumps(found), flush=True)
    print("| clock | TRL, s per step | ours, s per step | TRL / ours |\n| --- | --- | --- | --- |")
    for name in ("wall", "cpu"):
        seconds = {side: statistics.median(found[side][name] for found in results) for side in ("trl", "ours")}
        ratio = statistics.median(found["trl"][name] / found["ours"][name] for found in results)
        print(f"| {name} | {seconds['trl']:.3f} | {seconds['ours']:.3f} | {ratio:.2f} |")
    if options.json:
        write_json_atomic(options.json, results)


if __name__ == "__main__":
    main()
