"""Forward and backward of the policy, ours and stock TRL in turn on the same rows: speed, memory, equality.

    python bench/train_speed.py                          every workload of the table
    python bench/train_speed.py policy --size 120m       one of them
    python bench/train_speed.py policy --memory          with peak memory, a fresh process for each side

TRL runs through its own trainers' loss, with the fused head and settings it chooses itself; ours as the shells run it.
Both compute entropies. Speed is the median over repeats of the ratio of CPU seconds, on one thread; the gradients'
difference is relative to their size. Memory is the peak above model and gradients, in MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from common import (
    PAD,
    SIZES,
    gradients,
    interleaved,
    long_tailed,
    peak_memory,
    quiet,
    random_model,
    random_rows,
    ratio,
    relative_difference,
    tokenizer,
    twin,
)
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.data.sample import Sample
from posttrain.methods import METHODS
from posttrain.models.token_logps import prepare, token_logps
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.trainers.collate import collate

RAGGED = -1
"""In place of a completion length: long-tailed lengths up to 256."""


@dataclass(frozen=True)
class Workload:
    """A step: what is computed, on how many prompts (for pairs: rows), completions per prompt and tokens of each."""

    kind: str
    prompts: int
    per_prompt: int
    prompt: int
    completion: int

    def rows(self, vocab: int) -> list[Sample]:
        n = self.prompts * self.per_prompt
        lengths = long_tailed(n, 256) if self.completion == RAGGED else [self.completion]
        return random_rows(vocab, self.prompts, self.per_prompt, self.prompt, lengths)


WORKLOADS = {
    "policy": Workload("policy", 1, 8, 512, 128),
    "ragged": Workload("policy", 1, 8, 256, RAGGED),
    "prefix": Workload("policy", 1, 16, 1024, 64),
    "short-prompt": Workload("policy", 1, 8, 16, 256),
    "one-completion": Workload("policy", 8, 1, 256, 128),
    "dpo": Workload("dpo", 4, 2, 512, 128),
    "simpo": Workload("simpo", 4, 2, 512, 128),
    "reference": Workload("reference", 1, 8, 512, 128),
}
TABLE = [(name, "25m") for name in WORKLOADS]
TABLE += [("policy", "120m"), *((name, "1m") for name in ("policy", "short-prompt", "one-completion", "dpo"))]


@dataclass
class Sides:
    """A step of either side, and the models whose gradients they leave; no models for a pass without gradients."""

    steps: dict[str, Callable[[], Tensor]]
    models: dict[str, PreTrainedModel]


def build(workload: Workload, size: str, bf16: bool, checkpointing: bool, only: str | None = None) -> Sides:
    """Both sides on equal weights and rows, or one of them alone."""
    model, rows = random_model(size), workload.rows(SIZES[size][0])
    makers = {"trl": {"policy": trl_policy, "reference": trl_reference, "dpo": trl_dpo, "simpo": trl_simpo}}
    makers["ours"] = {"policy": our_policy, "reference": our_reference, "dpo": our_pairs, "simpo": our_pairs}
    sides = Sides({}, {})
    for side in ("trl", "ours") if only is None else (only,):
        own = twin(model)
        if checkpointing:
            own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        own.train()
        step = makers[side][workload.kind](own, workload, rows, bf16)
        sides.steps[side] = step if workload.kind == "reference" else _with_backward(own, step)
        sides.models[side] = own
    return sides


def _with_backward(model: PreTrainedModel, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        value = loss()
        value.backward()
        return value.detach()

    return step


# ------------------------------------------------------------------------------------------------------------ stock TRL


def _arguments(bf16: bool, rows: int) -> dict[str, Any]:
    return {
        "output_dir": mkdtemp(),
        "use_cpu": True,
        "bf16": bf16,
        "report_to": [],
        "gradient_checkpointing": False,  # switched on by `build` for both
        "per_device_train_batch_size": rows,
        "disable_tqdm": True,
    }


def _grpo_trainer(model: PreTrainedModel, workload: Workload, rows: int, bf16: bool) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    # TRL wants two completions per prompt; it groups rewards by it, not what is computed here.
    generations = max(workload.per_prompt, 2)
    arguments = GRPOConfig(**_arguments(bf16, rows), loss_type="grpo", beta=0.0, num_generations=generations)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 16}),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _grpo_inputs(workload: Workload, rows: list[Sample]) -> dict[str, Tensor]:
    """Prompts and completions as TRL keeps them: apart, the completions padded."""
    completions = [torch.tensor(row.ids[workload.prompt :]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=PAD)
    masks = torch.nn.utils.rnn.pad_sequence([torch.ones_like(c) for c in completions], batch_first=True)
    prompts = torch.tensor([row.ids[: workload.prompt] for row in rows])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": padded,
        "completion_mask": masks,
        "advantages": _advantages(len(rows)),
        "num_items_in_batch": masks.sum(),
    }


def trl_policy(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Callable[[], Tensor]:
    trainer, inputs = _grpo_trainer(model, workload, len(rows), bf16), _grpo_inputs(workload, rows)

    def loss() -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer._compute_loss(model, inputs)

    return loss


def trl_reference(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Callable[[], Tensor]:
    from trl.trainer.utils import add_fused_lm_head

    trainer, inputs = _grpo_trainer(twin(model), workload, len(rows), bf16), _grpo_inputs(workload, rows)
    add_fused_lm_head(model.eval())  # as for its reference: log-probs only
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

    @torch.no_grad()
    def step() -> Tensor:
        with trainer.compute_loss_context_manager():
            arguments = (model, ids, attention, inputs["completion_ids"].size(1))
            logps = trainer._get_per_token_logps_and_entropies(*arguments)[0]
        return (logps * inputs["completion_mask"]).sum()

    return step


def trl_dpo(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Callable[[], Tensor]:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer = DPOTrainer(
        model=model,
        ref_model=random_model(_size_of(model), seed=7),
        args=DPOConfig(**_arguments(bf16, workload.prompts), max_length=None),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    examples = []
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        prompt, one, other = chosen.ids[: workload.prompt], chosen.ids, rejected.ids
        examples.append(
            {"prompt_ids": prompt, "chosen_ids": one[workload.prompt :], "rejected_ids": other[workload.prompt :]}
        )
    inputs = DataCollatorForPreference(pad_token_id=PAD)(examples)

    def loss() -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer._compute_loss(model, inputs, False)

    return loss


def trl_simpo(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Callable[[], Tensor]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
    trainer = CPOTrainer(
        model=model,
        args=CPOConfig(**_arguments(bf16, workload.prompts), **options),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8),
        processing_class=tokenizer(),
    )
    inputs = {}
    for role, own in (("chosen", rows[::2]), ("rejected", rows[1::2])):
        tensors = collate(own, PAD)
        inputs[f"{role}_input_ids"], inputs[f"{role}_attention_mask"] = tensors["ids"], tensors["attention_mask"]
        inputs[f"{role}_labels"] = tensors["ids"].masked_fill(tensors["mask"] == 0, -100)

    def loss() -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs)

    return loss


# ----------------------------------------------------------------------------------------------------------------- ours


def _autocast(bf16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def _advantages(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(2))


def _size_of(model: PreTrainedModel) -> str:
    return next(name for name, shape in SIZES.items() if shape[:2] == (model.vocab_size, model.config.hidden_size))


def our_policy(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Callable[[], Tensor]:
    method, tensors, advantages = METHODS["grpo"](METHODS["grpo"].Config()), collate(rows, PAD), _advantages(len(rows))
    prepare(model)

    def loss() -> Tensor:
        with _autocast(bf16):
            found = token_logps(model, tensors["ids"], tensors["attention_mask"], tensors["mask"], entropy=True)
        batch = TokenBatch(tensors["mask"], found.logps, found.entropies, advantages=advantages)
        return sum(part.value / part.count for part in method.loss(batch).values())

    return loss


def our_reference(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Callable[[], Tensor]:
    tensors = collate(rows, PAD)
    prepare(model.eval())

    @torch.no_grad()
    def step() -> Tensor:
        with _autocast(bf16):
            return token_logps(model, tensors["ids"], tensors["attention_mask"], tensors["mask"]).logps.sum()

    return step


def our_pairs(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Callable[[], Tensor]:
    """DPO with its reference pass, as TRL does it in every step, or SimPO, which has none."""
    parameters = {"dpo": {}, "simpo": {"beta": 2.0, "gamma": 1.0}}[workload.kind]
    method = METHODS[workload.kind](METHODS[workload.kind].Config(**parameters))
    tensors = collate([*rows[::2], *rows[1::2]], PAD)
    inputs = tensors["ids"], tensors["attention_mask"], tensors["mask"]
    prepare(model)
    reference = None
    if method.needs.reference:
        reference = random_model(_size_of(model), seed=7).eval()
        prepare(reference)

    def loss() -> Tensor:
        with _autocast(bf16):
            found, ref = token_logps(model, *inputs, entropy=True), None
            if reference is not None:
                with torch.no_grad():
                    ref = token_logps(reference, *inputs).logps
        responses = {}
        for role, part in (("chosen", slice(0, workload.prompts)), ("rejected", slice(workload.prompts, None))):
            logps, entropies = found.logps[part], found.entropies[part]
            ref_logps = None if ref is None else ref[part]
            responses[role] = TokenBatch(tensors["mask"][part], logps, entropies, ref_logps=ref_logps)
        return sum(part.value / part.count for part in method.loss(PreferenceBatch(responses)).values())

    return loss


# ------------------------------------------------------------------------------------------------------------- the runs


def measure(name: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    sides = build(WORKLOADS[name], size, options.bf16, options.checkpointing)
    losses = {side: float(step()) for side, step in sides.steps.items()}
    found: dict[str, Any] = {
        "workload": name,
        "size": size,
        "loss_difference": abs(losses["ours"] - losses["trl"]) / max(abs(losses["trl"]), 1e-9),
    }
    if WORKLOADS[name].kind != "reference":
        found["gradient_difference"] = relative_difference(*(gradients(sides.models[side]) for side in ("ours", "trl")))
    times = interleaved(sides.steps, options.repeats)
    found |= {"speed": ratio(times, "trl", "ours"), "speed_wall": ratio(times, "trl", "ours", "wall"), "times": times}
    if options.memory:
        peaks = {side: _peak_in_fresh_process(name, size, side, options) for side in ("trl", "ours")}
        found |= {"peak_mib": peaks, "memory": peaks["trl"] / peaks["ours"]}
    return found


def _peak_in_fresh_process(name: str, size: str, side: str, options: argparse.Namespace) -> float:
    flags = [flag for flag in ("bf16", "checkpointing") if getattr(options, flag)]
    command = [sys.executable, __file__, name, "--size", size, "--peak-of", side, *(f"--{flag}" for flag in flags)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back, so the peak is the need
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, size: str, side: str, options: argparse.Namespace) -> None:
    sides = build(WORKLOADS[name], size, options.bf16, options.checkpointing, only=side)
    for parameter in sides.models[side].parameters():
        parameter.grad = torch.zeros_like(parameter)
    print(peak_memory(sides.steps[side]))


def line(found: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    seconds = {side: sorted(clocks["cpu"])[len(clocks["cpu"]) // 2] for side, clocks in found["times"].items()}
    gradient = f"{found['gradient_difference']:.1e}" if "gradient_difference" in found else "-"
    memory = "-"
    if "memory" in found:
        memory = f"{found['peak_mib']['trl']:.0f} / {found['peak_mib']['ours']:.0f} = {found['memory']:.1f}"
    cells = (found["workload"], found["size"], f"{seconds['trl']:.2f}", f"{seconds['ours']:.2f}")
    return " | ".join((*cells, f"{found['speed']:.2f}", f"{found['loss_difference']:.1e}", gradient, memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", nargs="?", choices=WORKLOADS, help="default: the whole table")
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--memory", action="store_true", help="also peak memory")
    parser.add_argument("--json", type=Path, help="file for the figures of all repeats")
    parser.add_argument("--peak-of", choices=("trl", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.peak_of:
        print_peak(options.workload, options.size, options.peak_of, options)
        return
    print("| workload | model | TRL, s | ours, s | speed | loss diff. | gradient diff. | TRL / ours, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    results = []
    for name, size in TABLE if options.workload is None else [(options.workload, options.size)]:
        results.append(measure(name, size, options))
        print(f"| {line(results[-1])} |", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
