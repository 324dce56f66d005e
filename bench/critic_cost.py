"""Time and memory of a step of the shells with a critic, beside TRL's nearest trainer, on the same rows.

    python bench/critic_cost.py --steps 8 --repeats 3 --save bench/results/critic_cost.json

TRL 1.16 has no critic and no offline shell, so the nearest ones do less: SFTTrainer trains one model on the traces,
GRPOTrainer one model on rollouts without values. Ours with two models stand beside ours with one, so that the price of
the critic shows; OREO has a reference beside them, which it runs in every step for its KL over the whole vocabulary.

Each row is a fresh process, the rows take turns, and every other turn goes backwards: median seconds of all steps after
the first of a process; what the first takes beyond that, with loading and the scoring by the reference in it; and the
largest peak of resident memory over that of the loaded libraries. One thread, float32, a Llama of 8 layers and 256
channels over characters. CPU seconds, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from common import quiet
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

PROMPTS, GROUP, ROWS = 8, 8, 64
LEVEL, NEW_TOKENS = 6, 56
OREO = {"name": "oreo", "level": "step", "delimiter": ";", "balance": None}
OURS = {
    "offline: oreo": OREO,
    "offline: oreo, shared trunk": OREO,
    "offline: oreo, k3": {**OREO, "unbiased_kl": False},
    "offline: dapo_step, critic": {"name": "dapo_step", "phase": "critic", "delimiter": ";"},
    "sft shell: sft": {"name": "sft"},
    "online: ppo": {"name": "ppo", "kl_coef": 0.0, "epochs": 1},
    "online: ppo, shared trunk": {"name": "ppo", "kl_coef": 0.0, "epochs": 1},
    "online: grpo": {"name": "grpo"},
}
THEIRS = ("TRL: SFTTrainer", "TRL: GRPOTrainer")
INIT = {
    "hidden_size": 256,
    "layers": 8,
    "heads": 8,
    "max_length": 128,
    "tokenizer": {"type": "characters", "alphabet": "0123456789+=;#"},
}


def prepare(folder: Path) -> None:
    """The model, and right and wrong traces of the same problems."""
    from posttrain.config.schema import ModelConfig, TaskSource
    from posttrain.data.tasks import generate_examples
    from posttrain.data.traces import Manifest, Trace, manifest_path
    from posttrain.models.loading import load_policy

    model, tokenizer = load_policy(ModelConfig(init=INIT), seed=0)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    lines = []
    for example in generate_examples(TaskSource(task="chain_sum", levels=[LEVEL], size=256), "rows"):
        problem, right = example.problem, example.completion
        for sample, text in enumerate((right, right[:-1] + str((int(right[-1]) + 1) % 10))):
            verdict, outcome = ("wrong", 0.0) if sample else ("correct", 1.0)
            known = {"reference": problem.reference, "verdict": verdict, "outcome": outcome}
            lines.append(Trace(problem.id, sample, problem.prompt, text, "bench", "m", **known).to_json())
    (folder / "traces.jsonl").write_text("\n".join(lines), encoding="utf-8")
    manifest = Manifest(id="m", kind="taken in", policy={"label": "bench"}, data={}, problems_hash="")
    manifest_path(folder / "traces.jsonl").write_text(json.dumps(asdict(manifest)), encoding="utf-8")


def ours(name: str, folder: Path, steps: int) -> None:
    """Train with posttrain."""
    from posttrain.config.loading import load_recipe
    from posttrain.methods import METHODS
    from posttrain.trainers.run import train

    recipe: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "method": OURS[name],
        "training": {"learning_rate": 1e-5, "max_steps": steps},
        "tracking": {"console": "off", "plots": False},
        "output": str(folder / "run"),
        "threads": 1,
    }
    if name.startswith("online"):
        recipe["data"] = {"prompts": {"task": "chain_sum", "levels": [LEVEL], "size": 256}}
        recipe["verifier"], recipe["verifier_pool"] = [{"type": "procedural"}], {"workers": 0}
        recipe["rollouts"] = {"samples_per_prompt": GROUP, "max_new_tokens": NEW_TOKENS}
        recipe["batch"] = {"prompts_per_step": PROMPTS, "micro_batch": ROWS}
    else:
        recipe["data"] = {"traces": {"path": str(folder / "traces.jsonl"), "keep": "all"}}
        recipe["batch"] = {"rows_per_step": ROWS, "micro_batch": ROWS}
    if "shared trunk" in name:
        recipe["critic"] = {"trunk": "shared"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(load_recipe(folder / "recipe.yaml", [], {key: cls.Config for key, cls in METHODS.items()}))


def theirs(name: str, folder: Path, steps: int) -> None:
    """Train with a stock trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (folder / "traces.jsonl").read_text(encoding="utf-8").splitlines()]
    common: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-5,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    further = {"model": str(folder / "model"), "processing_class": tokenizer}
    if name == "TRL: SFTTrainer":
        data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["text"]} for row in rows])
        trainer: Any = SFTTrainer(args=SFTConfig(**common), train_dataset=data, **further)
    else:
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows[::2]])
        args = GRPOConfig(num_generations=GROUP, max_completion_length=NEW_TOKENS, **common)
        reward = lambda completions, **_: [float(len(text) % 2) for text in completions]  # noqa: E731
        trainer = GRPOTrainer(args=args, reward_funcs=reward, train_dataset=data, **further)
    trainer.train()


def measure(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """One row, in this process."""
    quiet()
    import posttrain.trainers.run  # noqa: F401  the libraries count as there already

    clock = [time.process_time()]

    class Clock(TrainerCallback):
        """CPU time at the end of each step; trainers of both sides take it up by themselves."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.process_time())

    DEFAULT_CALLBACKS.append(Clock)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (theirs if name in THEIRS else ours)(name, folder, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if len(clock) != steps + 1:
        raise RuntimeError(f"{name}: {len(clock) - 1} of {steps} steps were seen")
    return {"seconds": [end - start for start, end in itertools.pairwise(clock)], "peak_mib": (peak - loaded) / 1024}


def in_a_fresh_process(name: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        command = [sys.executable, __file__, "--row", name, "--folder", folder, "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def summary(processes: list[dict[str, Any]]) -> dict[str, float]:
    """Of the processes of one row."""
    step = statistics.median(second for one in processes for second in one["seconds"][1:])
    first = statistics.median(one["seconds"][0] for one in processes)
    return {"seconds": step, "first": first - step, "peak_mib": max(one["peak_mib"] for one in processes)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown; each row beside TRL's nearest trainer."""
    head = "| | CPU s/step | of TRL's | first step, s more | peak MiB | of TRL's |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        nearest = rows[THEIRS[name.startswith("online") or name == THEIRS[1]]]
        time_, memory = (f"{row[key] / nearest[key]:.2f}" for key in ("seconds", "peak_mib"))
        numbers = f"{row['seconds']:.3f} | {time_} | {row['first']:.2f} | {row['peak_mib']:.0f} | {memory}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row is not None:
        print("RESULT " + json.dumps(measure(given.row, given.folder, given.steps)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OURS, *THEIRS)}
    for repeat in range(given.repeats):
        for name in list(found) if repeat % 2 == 0 else reversed(found):
            found[name].append(in_a_fresh_process(name, given.steps))
            print(f"turn {repeat + 1}: {name}", flush=True)
    rows = {name: summary(processes) for name, processes in found.items()}
    print(table(rows))
    if given.save is not None:
        versions = {"torch": torch.__version__, "trl": version("trl"), "machine": platform.machine()}
        settings = {"steps": given.steps, "repeats": given.repeats}
        content = {"versions": versions, **settings, "rows": rows, "processes": found}
        given.save.parent.mkdir(parents=True, exist_ok=True)
        given.save.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
