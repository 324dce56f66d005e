"""Keys of other tools (TRL's command line, axolotl, LLaMA-Factory) beside ours.

One table, for `posttrain convert` and for what an unknown key in a recipe may have meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import RecipeError, nearest

ROWS = "data.<rows>"
"""Stands for the section of `data` that the method reads."""


@dataclass(frozen=True, slots=True)
class Ours:
    """What became of a key of another tool.

    Attributes:
        key: of a recipe; empty where nothing takes its place.
        note: what a reader should know: another meaning, or why there is none.
        value: from their value to ours.
    """

    key: str
    note: str = ""
    value: Callable[[Any], Any] = lambda value: value


def _targets(value: Any) -> Any:
    names = value.replace(",", " ").split() if isinstance(value, str) else list(value)
    return "all-linear" if names in (["all"], ["all-linear"]) else names


def _dtype(value: Any) -> Any:
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(value), str(value).removeprefix("torch."))


_BATCH = "counted over all ranks and micro-steps: micro-batch x accumulation x ranks"
_RUNS = "a launcher's matter: `accelerate launch` (docs/scale.md)"
_ALWAYS = "always so here"
_GROUP = "the batch is counted in prompts"

KEYS: dict[str, Ours] = {
    # ------------------------------------------------------------------------------------------------------- the model
    **dict.fromkeys(("model_name_or_path", "base_model", "model_name"), Ours("model.path")),
    **dict.fromkeys(("model_revision", "revision_of_model"), Ours("model.revision")),
    **dict.fromkeys(("torch_dtype", "dtype"), Ours("model.dtype", value=_dtype)),
    "attn_implementation": Ours("model.attn_implementation"),
    "flash_attention": Ours("", "set model.attn_implementation"),
    "flash_attn": Ours("", "set model.attn_implementation"),
    "trust_remote_code": Ours("model.trust_remote_code", "true runs the Python code of the model: read it first"),
    **dict.fromkeys(("chat_template_path", "chat_template_jinja"), Ours("model.chat_template")),
    "template": Ours("", "the tokenizer's chat template is taken; another one by model.chat_template"),
    "chat_template": Ours("", "the tokenizer's chat template is taken; another one by model.chat_template"),
    **dict.fromkeys(("lora_r", "lora_rank"), Ours("model.peft.r")),
    "lora_alpha": Ours("model.peft.alpha"),
    "lora_dropout": Ours("model.peft.dropout"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), Ours("model.peft.target_modules", value=_targets)),
    "lora_target_linear": Ours("model.peft.target_modules", value=lambda on: "all-linear" if on else None),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), Ours("model.peft.rslora")),
    **dict.fromkeys(("use_dora", "peft_use_dora"), Ours("model.peft.dora")),
    **dict.fromkeys(("lora_modules_to_save", "additional_target"), Ours("model.peft.modules_to_save")),
    "load_in_4bit": Ours("model.quantization.bits", value=lambda on: 4 if on else None),
    "load_in_8bit": Ours("model.quantization.bits", value=lambda on: 8 if on else None),
    "quantization_bit": Ours("model.quantization.bits"),
    # -------------------------------------------------------------------------------------------------------- the data
    "dataset_name": Ours(f"{ROWS}.path"),
    "dataset_config": Ours(f"{ROWS}.name"),
    "dataset_train_split": Ours(f"{ROWS}.split"),
    "dataset_test_split": Ours("", "held-out rows: evaluation.held_out (docs/evaluation.md)"),
    "dataset": Ours("", f"a name in dataset_info.json: put the file or Hub id behind it into {ROWS}.path"),
    "max_samples": Ours(f"{ROWS}.limit"),
    **dict.fromkeys(("max_length", "max_seq_length", "sequence_len", "cutoff_len"), Ours("data.max_length")),
    "max_prompt_length": Ours("data.max_prompt_length"),
    "train_on_inputs": Ours("", "prompts are never trained on; assistant turns by train_on"),
    "assistant_only_loss": Ours("", _ALWAYS),
    "completion_only_loss": Ours("", _ALWAYS),
    **dict.fromkeys(("packing", "sample_packing", "padding_free"), Ours("", "rows are padded, none are packed")),
    "pad_to_sequence_len": Ours("", "a batch is as wide as its longest row"),
    "val_set_size": Ours("", "held-out rows: evaluation.held_out (docs/evaluation.md)"),
    # ---------------------------------------------------------------------------------------------------- batch, length
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size"), Ours("batch.micro_batch")),
    "gradient_accumulation_steps": Ours("batch.rows_per_step", _BATCH),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), Ours("training.num_train_epochs", value=float)),
    "max_steps": Ours("training.max_steps", value=lambda steps: steps if steps > 0 else None),
    # -------------------------------------------------------------------------------------------------------- training
    "learning_rate": Ours("training.learning_rate", value=float),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), Ours("training.lr_scheduler_type")),
    "warmup_steps": Ours("training.warmup_steps"),
    "warmup_ratio": Ours("", "give training.warmup_steps: this share of the steps"),
    "weight_decay": Ours("training.weight_decay", value=float),
    **dict.fromkeys(("optim", "optimizer"), Ours("training.optim")),
    **{f"adam_{name}": Ours(f"training.adam_{name}", value=float) for name in ("beta1", "beta2", "epsilon")},
    "max_grad_norm": Ours("training.max_grad_norm", value=float),
    "bf16": Ours("training.bf16", value=lambda on: on is True or None),
    "fp16": Ours("", "no float16 autocast: training.bf16"),
    "tf32": Ours("", "torch's own setting is kept"),
    "gradient_checkpointing": Ours("training.gradient_checkpointing", value=bool),
    "logging_steps": Ours("training.logging_steps"),
    "save_steps": Ours("training.save_steps"),
    "save_total_limit": Ours("training.save_total_limit"),
    "report_to": Ours(
        "training.report_to", value=lambda to: [] if to == "none" else [to] if isinstance(to, str) else to
    ),
    "run_name": Ours("training.run_name"),
    "push_to_hub": Ours("training.push_to_hub"),
    "hub_model_id": Ours("training.hub_model_id"),
    "output_dir": Ours("output"),
    "seed": Ours("seed"),
    **dict.fromkeys(("eval_steps", "eval_strategy", "evaluation_strategy"), Ours("", "evaluation.every")),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp_timeout"), Ours("", _RUNS)),
    "resume_from_checkpoint": Ours("", "posttrain train RECIPE --resume auto"),
    **dict.fromkeys(
        ("do_train", "overwrite_output_dir", "save_safetensors", "remove_unused_columns"), Ours("", _ALWAYS)
    ),
    # ------------------------------------------------------------------------------------------ preferences, rollouts
    **dict.fromkeys(("beta", "pref_beta", "rl_beta"), Ours("method.beta", value=float)),
    "simpo_gamma": Ours("method.gamma", value=float),
    "pref_ftx": Ours("", "no such term beside dpo's; simpo has method.sft_weight"),
    "epsilon": Ours("method.epsilon", value=float),
    "epsilon_high": Ours("method.epsilon_high", value=float),
    "num_iterations": Ours("method.updates_per_rollout"),
    "mask_truncated_completions": Ours("method.mask_truncated"),
    **dict.fromkeys(("num_ppo_epochs", "ppo_epochs"), Ours("method.epochs")),
    **dict.fromkeys(("num_mini_batches", "ppo_buffer_size"), Ours("method.minibatches")),
    **dict.fromkeys(("cliprange", "clip_ratio"), Ours("method.epsilon", value=float)),
    "clip_ratio_high": Ours("method.epsilon_high", value=float),
    "cliprange_value": Ours("method.value_clip", value=float),
    **{name: Ours(f"method.{name}", value=float) for name in ("gamma", "lam", "vf_coef", "kl_coef")},
    **dict.fromkeys(("whiten_rewards", "ppo_whiten_rewards"), Ours("method.whiten_rewards")),
    "ppo_target": Ours("method.kl_target", value=float),
    "ppo_score_norm": Ours(
        "", "scores are not normed by a running deviation; advantages are: method.whiten_advantages"
    ),
    "missing_eos_penalty": Ours(
        "", "it is taken off the reward there; here method.missing_eos_reward stands in its place"
    ),
    "kl_loss_coef": Ours("method.beta", value=float),
    "sft_model_path": Ours("model.path"),
    **dict.fromkeys(
        ("reward_model_path", "reward_model"),
        Ours("verifier", "a model: {type: reward_model, path: ...} (docs/verifiers.md)"),
    ),
    "num_generations": Ours("rollouts.samples_per_prompt"),
    **dict.fromkeys(("max_completion_length", "response_length"), Ours("rollouts.max_new_tokens")),
    "temperature": Ours("rollouts.temperature", value=float),
    "top_p": Ours("rollouts.top_p", value=float),
    "top_k": Ours("rollouts.top_k", value=lambda k: k or None),
    "use_vllm": Ours("rollouts.engine", value=lambda on: "vllm" if on else "transformers"),
    "vllm_mode": Ours("rollouts.mode"),
    "generation_batch_size": Ours("", _GROUP),
    "steps_per_generation": Ours("", _GROUP),
    "reward_funcs": Ours(
        "verifier", "a function of yours: {type: python, function: rewards.py:name} (docs/verifiers.md)"
    ),
    "reward_weights": Ours("", "`weight` of each verifier"),
}
"""Key of another tool -> ours. A key that two of them have means the same in both."""


def hint(key: str) -> str:
    """What an unknown key of a recipe is called here; empty where nobody knows it."""
    ours = KEYS.get(key)
    if ours is None:
        return ""
    place = f"it is `{ours.key}` here" if ours.key else ""
    return "; ".join(part for part in (place, ours.note) if part)


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert` makes.

    Attributes:
        recipe: as plain data.
        left: (their key, their value, why) of what could not be carried over.
        told: (their key, our key, note) of what was, and means something else.
    """

    recipe: dict[str, Any]
    left: list[tuple[str, Any, str]]
    told: list[tuple[str, str, str]]


STAGES = {"sft": "sft", "dpo": "dpo", "rm": "reward", "grpo": "grpo", "ppo": "ppo", "simpo": "simpo", "ipo": "dpo"}
LOSSES: dict[str, dict[str, dict[str, str]]] = {
    "dpo": {"sigmoid": {}, "ipo": {"loss": "ipo"}, "hinge": {"loss": "hinge"}},
    "simpo": {"simpo": {}},
    "grpo": {"grpo": {}, "dapo": {"aggregation": "tokens"}, "dr_grpo": {"aggregation": "constant"}},
}
"""Parameters by method and by what the other tool calls its loss."""

READS = {"sft": "completions", "grpo": "prompts", "ppo": "prompts"}
"""Section of `data` by method; the others read preferences."""


def convert(theirs: Mapping[str, Any], method: str | None = None, ranks: int = 1) -> Converted:
    """A configuration of TRL's command line, axolotl or LLaMA-Factory as a recipe.

    Args:
        theirs: what stands in their YAML.
        method: of ours; default: what `stage` or `rl` says, else `sft`.
        ranks: processes that it ran on; their batch size is per process.

    Raises:
        RecipeError: it is none of these, or trains by a method that has no counterpart here.
    """
    theirs = dict(theirs)  # what is understood is taken out
    if not {"model_name_or_path", "base_model"} & set(theirs):
        raise RecipeError(
            "it names no model", hint="TRL and LLaMA-Factory have `model_name_or_path`, axolotl has `base_model`"
        )
    said = theirs.pop("stage", None) or theirs.pop("rl", None)
    stage = str(said or ("grpo" if {"num_generations", "reward_funcs"} & set(theirs) else "sft"))
    loss = theirs.pop("pref_loss", None) or theirs.pop("loss_type", None) or ("ipo" if stage == "ipo" else None)
    if method is None and stage not in STAGES:
        raise RecipeError(f"no counterpart of {stage!r}", hint=nearest(stage, STAGES) + "; or name one with --method")
    given, method = method, method or ("simpo" if loss == "simpo" else STAGES[stage])
    if loss is not None and loss not in LOSSES.get(method, {}):
        raise RecipeError(f"method {method} has no loss {loss!r}", hint=nearest(str(loss), LOSSES.get(method, {})))
    rows, online = READS.get(method, "preferences"), READS.get(method) == "prompts"
    parameters = LOSSES[method][loss] if loss is not None else {}
    recipe: dict[str, Any] = {"model": {}, "data": {rows: {}}, "method": {"name": method, **parameters}}
    found = Converted(recipe, [], [])
    if said is None and "base_model" not in theirs and given is None:
        found.told.append(("the command", "method.name", f"{method}, as the keys suggest; else say --method"))
    if method == "grpo" and loss is None:
        found.told.append(("loss_type", "method.aggregation", "GRPO's own mean; `dapo`, TRL's default, is `tokens`"))
    adapted = theirs.pop("adapter", None) or theirs.pop("finetuning_type", None) or theirs.pop("use_peft", None)
    adapted = adapted in ("lora", "qlora", True)
    for position, source in enumerate(theirs.pop("datasets", None) or []):
        _source(found, rows, source, position)
    for key, value in theirs.items():
        ours = KEYS.get(key)
        if ours is None:
            found.left.append((key, value, "no key of ours is known for it"))
            continue
        made = ours.value(value) if ours.key and value is not None else None
        if ours.key.startswith("model.peft") and not adapted:
            continue  # without an adapter nobody reads it
        if made is None or ours.key == "verifier":
            idle = value in (None, False, "", "none", "no", []) or ours.note == _ALWAYS
            idle = idle or (bool(ours.key) and ours.key != "verifier")
            found.left.extend([] if idle else [(key, value, hint(key))])
            continue
        _put(recipe, ours.key.replace(ROWS, f"data.{rows}"), made)
        if ours.note and key != "gradient_accumulation_steps":
            found.told.append((key, ours.key, ours.note))
    if adapted:
        recipe["model"].setdefault("peft", {})
        if not recipe["model"]["peft"]:
            _put(recipe, "model.peft.r", 8)  # PEFT's own default, which they take
    _batch(found, online, ranks, theirs)
    training = recipe.setdefault("training", {})
    if "max_steps" in training:
        training.pop("num_train_epochs", None)
    elif "num_train_epochs" not in training:
        training["num_train_epochs"] = 3.0 if "model_name_or_path" in theirs else 1.0  # their defaults
    recipe.setdefault("output", f"runs/{method}")
    if online:
        recipe.setdefault("rollouts", {})
    return found


def _source(found: Converted, rows: str, source: Mapping[str, Any], position: int) -> None:
    """A data set of axolotl's list."""
    where, taken = f"datasets[{position}]", {}
    names = {"path": "path", "name": "name", "split": "split", "field_messages": "messages"}
    for key, value in source.items():
        if key in names:
            taken[names[key]] = value
        else:
            found.left.append((f"{where}.{key}", value, "what a row holds is seen from its columns (docs/data.md)"))
    known = found.recipe["data"][rows]
    if not known:
        found.recipe["data"][rows] = taken
    else:
        found.recipe["data"][rows] = [*(known if isinstance(known, list) else [known]), taken]


def _batch(found: Converted, online: bool, ranks: int, theirs: Mapping[str, Any]) -> None:
    batch = found.recipe.setdefault("batch", {})
    micro = batch.setdefault("micro_batch", 8 if "model_name_or_path" in theirs else 1)  # their defaults
    steps = batch.pop("rows_per_step", 1)
    size = micro * steps * ranks
    told = f"{micro} x {steps} x {ranks} rank{'s' if ranks > 1 else ''}"
    if online:
        group = found.recipe.setdefault("rollouts", {}).setdefault("samples_per_prompt", 8)
        batch["prompts_per_step"] = max(1, size // group)
        told += f" completions, in groups of {group}"
    else:
        batch["rows_per_step"] = size
    found.told.append(("batch size", f"batch.{'prompts' if online else 'rows'}_per_step", told))


def _put(recipe: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        recipe = recipe.setdefault(part, {})
    recipe[last] = value
