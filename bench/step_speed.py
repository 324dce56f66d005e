"""Whole steps, rollouts and verification included: ours and stock TRL's GRPO in turn.

    python bench/step_speed.py                                  GRPO on the quickstart's task and settings
    python bench/step_speed.py --base runs/quickstart/base/model --rounds 5 --steps 12
    python bench/step_speed.py --method prefixrl                rollouts that start within a right trace
    python bench/step_speed.py --method smollm2                 GRPO with LoRA on a pretrained model of 135M parameters

Both train the same base on the same kind of problems with the same sizes, sampling and learning rate, from the start in
every round; the order of the sides alternates. Each side gets the verifier it would have: ours its worker processes,
TRL a reward function that calls the same verifier at once. With `--method prefixrl` TRL gets prompts that end in the
prefixes which the method cuts for these problems, as text; with `--method smollm2` its prompts as messages, which it
renders by the same template (`make build/smollm2/model.safetensors` first). A step counts from the end of one to the
end of the next, the first ones of a round left out. Seconds are wall clock, and CPU of this process and its workers.
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

import numpy as np
import psutil
from accelerate import PartialState
from common import SMOLLM2, quiet
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from posttrain.config.loading import load_recipe
from posttrain.config.schema import Recipe
from posttrain.data.known_traces import TraceBook
from posttrain.data.preparation import fit_known, load_known, load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.methods import METHODS
from posttrain.models.adapters import adapter_to_train
from posttrain.safe_files import write_json_atomic
from posttrain.trainers.run import build, train
from posttrain.verifiers import VERIFIERS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PAIRS: dict[str, tuple[str | None, str]] = {
    "grpo": ("testbed/sft-tiny-chain_sum.yaml", "testbed/grpo-tiny-chain_sum.yaml"),
    "prefixrl": ("hybrid/sft-tiny-chain_sum.yaml", "hybrid/prefixrl-tiny-chain_sum.yaml"),
    "smollm2": (None, "real/grpo-smollm2-sums.yaml"),
}
"""Name -> the recipes of its base, None where that is made otherwise, and of the steps."""

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
    counted = {name: found[name][WARM_UP:] for name in ("reward", "completion_length", "tokens_prompt")}
    means = {name: statistics.mean(values) for name, values in counted.items()}
    parts = {name: statistics.median(found[name][WARM_UP:]) for name in ("rollout_seconds", "verify_seconds")}
    return clock, means | parts


def stock(recipe: Recipe, seed: int) -> tuple[Clock, dict[str, float]]:
    """One round by TRL's trainer with its own generation, loss and logging."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    rows = prompts_of(recipe, tokenizer)
    known = {problem.id: problem for problem, _ in rows}
    verifier = VERIFIERS[recipe.verifier[0].type](recipe.verifier[0])

    def reward(completions: list[Any], id: list[str], prefix: list[str], **_: Any) -> list[float]:
        texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
        answers = zip(id, prefix, texts, strict=True)
        return [verifier(known[i], before + text).score or 0.0 for i, before, text in answers]

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
        scale_rewards=recipe.method.scale_rewards,
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
        train_dataset=Dataset.from_list(
            [{"prompt": stock_prompt(p, text, tokenizer), "id": p.id, "prefix": text} for p, text in rows]
        ),
        processing_class=tokenizer,
        peft_config=adapter_to_train(recipe.model),
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


def prompts_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Problem, str]]:
    """Each problem, and the text of the prefix with which the method starts a group of it; empty for none."""
    method = METHODS[recipe.method.name](recipe.method)
    renderer = Renderer(tokenizer)
    method.bind(renderer, recipe.seed)
    book = TraceBook(fit_known(recipe, load_known(recipe, method.needs), renderer)[0])
    rows = []
    for number, problem in enumerate(load_rows(recipe, method.needs)):
        ids, draw = renderer.prompt_ids(problem), np.random.default_rng([recipe.seed, number])
        start = method.start(problem, ids, book.of(problem, ids), draw)
        rows.append((problem, renderer.text(start.prefix)))
    return rows


def stock_prompt(problem: Problem, prefix: str, tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]]:
    """The prompt as TRL takes it: messages where the tokenizer has a template, else text."""
    if tokenizer.chat_template is None or problem.chat is False:
        return problem.prompt + prefix
    return [{"role": "user", "content": problem.prompt}]


def make_base(name: str, folder: Path) -> Path:
    """The base of the recipes, trained once."""
    base, _ = PAIRS[name]
    if base is None:
        return SMOLLM2
    if not (folder / "model").exists():
        train(load_recipe(RECIPES / base, [f"output={folder}", "tracking.console=plain"], SECTIONS))
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=PAIRS, default="grpo")
    parser.add_argument("--base", type=Path, help="a trained base; default: the recipe's, made here")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/step_speed"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="steps of a round")
    parser.add_argument("--json", type=Path, help="file for the figures of all rounds")
    options = parser.parse_args()
    quiet()
    output = options.output / options.method
    base = options.base or make_base(options.method, output / "base")
    results = []
    for number in range(options.rounds):

        def recipe(side: str, number: int = number) -> Recipe:
            overrides = [f"model.path={base}", f"training.max_steps={options.steps}", f"seed={number}"]
            overrides += [f"output={output / side}", "training.logging_steps=1", "tracking.console=off"]
            return load_recipe(RECIPES / PAIRS[options.method][1], overrides, SECTIONS)

        sides: list[tuple[str, Callable[[], tuple[Clock, dict[str, float]]]]] = [
            ("ours", lambda recipe=recipe: ours(recipe("ours"))),
            ("trl", lambda recipe=recipe, number=number: stock(recipe("trl"), number)),
        ]
        found: dict[str, Any] = {"method": options.method, "round": number}
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
    parts = [found["ours"] for found in results]
    rollout, verify = (statistics.median(part[f"{name}_seconds"] for part in parts) for name in ("rollout", "verify"))
    print(f"ours: of a step {rollout:.3f} s sample and {verify:.3f} s verify")
    if options.json:
        write_json_atomic(options.json, results)


if __name__ == "__main__":
    main()
