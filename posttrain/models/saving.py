"""How a trained model is written: with the start's settings and type, and tried before anything is trained.

Training changes settings of the model in memory (no cache, padding ids) and its type (float32 weights of a 16-bit
checkpoint). None of that belongs into the saved folder, so a `SavePlan` keeps what the start had. Imports without
torch, so that `posttrain check` can try the same.
"""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from posttrain.config.adapters import resolved
from posttrain.config.memory import BYTES
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.lazy import Tensor, torch
from posttrain.models.start_files import load_config, start_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of a generation config that `do_sample: false` contradicts."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What a wrapper of a multimodal model has beside its tokenizer."""

OF_THE_SOFTWARE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""Keys of a config that say nothing about the model."""

MAX_SHARD = "50GB"
"""Largest file of weights, as transformers has it."""


@dataclass
class SavePlan:
    """What stands beside the weights of the model that is saved, and their type.

    Attributes:
        model: section of the recipe.
        config: of the start; `dtype`, `architectures` and what an adapter needs are the only changes.
        generation: of the start, valid; None for a classifier.
        tokenizer: as trained with.
        dtype: name of the type of the saved weights.
        notes: what was repaired or decided, a sentence each.
    """

    model: ModelConfig
    config: PretrainedConfig
    generation: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, config: ModelConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SavePlan:
        """The plan for a model as `models.loading` gives it, before anything trains it."""
        generation = model.generation_config if model.can_generate() else None
        return cls.of_settings(config, model.config, generation, tokenizer, trained=_name(model.dtype))

    @classmethod
    def of_settings(
        cls,
        model: ModelConfig,
        config: PretrainedConfig,
        generation: GenerationConfig | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        trained: str,
    ) -> SavePlan:
        """The same without weights.

        Args:
            trained: name of the type in which the weights are trained.
        """
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # what is saved is whole weights
        start = None if model.init is not None else start_dtype(model)
        dtype = start if start in BYTES and BYTES[start] < BYTES[trained] else trained
        notes = []
        if model.save_dtype is not None:
            dtype = model.save_dtype
        elif dtype != trained:
            notes.append(f"the model will be saved in {dtype}, as its start is (model.save_dtype: another)")
        config.dtype = dtype
        if generation is not None:
            generation, repairs = valid_generation(generation)
            notes += repairs
        return cls(model, config, generation, tokenizer, dtype, notes)

    @classmethod
    def of_path(cls, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, classifier: bool) -> SavePlan:
        """The same for a model that is a folder or in the Hub's cache, from its files but the weights."""
        base = resolved(model)
        config = load_config(base)
        generation = None
        if not classifier:
            given = start_file(model, "generation_config.json")
            generation = GenerationConfig() if given is None else GenerationConfig.from_pretrained(given.parent)
        return cls.of_settings(model, config, generation, tokenizer, trained=model.dtype)

    def prove(self, texts: Sequence[str] = ()) -> None:
        """Write everything but the weights into a scratch folder and read it again.

        Args:
            texts: the saved tokenizer must give the same ids for these.

        Raises:
            ModelError: it cannot be written, or what is read is something else.
        """
        with tempfile.TemporaryDirectory(prefix="posttrain-") as scratch:
            folder = Path(scratch)
            trusted = {"trust_remote_code": self.model.trust_remote_code, "local_files_only": True}
            try:
                self.write_settings(folder)
                config = AutoConfig.from_pretrained(folder, **trusted)
                if self.generation is not None:
                    GenerationConfig.from_pretrained(folder)
                tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise ModelError(
                    f"the trained model could not be saved: {str(error).strip() or type(error).__name__}",
                    where="model",
                    hint="load the start with transformers and save it again, and mend what that complains about",
                ) from error
            self._compare_config(config)
            self._compare_tokenizer(tokenizer, texts)

    def _compare_config(self, read: PretrainedConfig) -> None:
        before, after = (_plain(config.to_dict()) for config in (self.config, read))
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        if changed:
            key = changed[0]
            raise ModelError(
                f"a saved config.json does not bring the same config back: {key} would be {after.get(key)!r} in place "
                f"of {before.get(key)!r}" + (f" (also {', '.join(changed[1:4])})" if changed[1:] else ""),
                where="model",
                hint="load the start with transformers and save it again; train from that folder",
            )

    def _compare_tokenizer(self, read: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        mine = self.tokenizer
        facts = [("number of tokens", len(mine), len(read)), ("chat template", mine.chat_template, read.chat_template)]
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            facts.append((name, getattr(mine, name), getattr(read, name)))
        facts += [(f"reading of {text[:40]!r}", mine(text).input_ids, read(text).input_ids) for text in texts]
        for name, before, after in facts:
            if before != after:
                hint = "load the start's tokenizer with transformers, save it, and compare; train from that folder"
                if self.model.init is not None:  # of some types transformers reads any tokenizer by a class of theirs
                    hint = (
                        f"a tokenizer made here does not go with models of type {self.config.model_type!r}: take llama"
                    )
                raise ModelError(
                    f"a saved tokenizer is not the same when it is loaded again: its {name} is another",
                    where="model.path" if self.model.init is None else "model.init.architecture",
                    hint=hint,
                )

    def write_settings(self, folder: Path) -> None:
        """Config, generation config, tokenizer with its template, and a processor's files, into a folder."""
        self.config.save_pretrained(folder)
        if self.generation is not None:
            self.generation.save_pretrained(folder)
        self.write_processor(folder)
        self.tokenizer.save_pretrained(folder)

    def write_processor(self, folder: Path) -> None:
        """What looks at pictures, if anything does."""
        if self.model.path is None and self.model.pictures is not None:
            from posttrain.models.processor import save_processor

            save_processor(self.tokenizer, folder)
        if self.model.path is None:
            return
        for name in PROCESSOR_FILES:
            found = start_file(self.model, name)
            if found is not None:
                shutil.copyfile(found, folder / name)

    def write(
        self,
        folder: Path,
        policy: PreTrainedModel,
        state: Mapping[str, Tensor],
        *,
        max_shard_size: str = MAX_SHARD,
    ) -> None:
        """The whole model as a Hugging Face folder. Call on the main rank.

        Args:
            folder: is there.
            policy: says what the tensors are; its own may be sharded, quantised or wrapped.
            state: whole tensors by the names of the plain model, in the type to save.
        """
        skeleton = self.skeleton(policy)
        skeleton.save_pretrained(folder, state_dict=dict(state), max_shard_size=max_shard_size)
        self.config.architectures = skeleton.config.architectures
        self.write_settings(folder)

    def skeleton(self, policy: PreTrainedModel) -> PreTrainedModel:
        """The plain model without weights: nothing that wraps, shards or adapts the policy has changed its class."""
        plain = next(each for each in type(policy).__mro__ if not each.__name__.startswith("FSDP"))
        with torch.device("meta"):
            skeleton = plain(copy.deepcopy(self.config))
        conversions = getattr(policy, "_weight_conversions", None)
        if conversions is not None:  # how the names and shapes of the start's files follow from those in memory
            skeleton._weight_conversions = conversions
        if self.generation is not None:
            skeleton.generation_config = self.generation
        return skeleton

    def saved_type(self, name: str, tensor: Tensor, policy: PreTrainedModel) -> torch.dtype:
        """Type in which a tensor is saved: whole numbers, and what the architecture keeps in float32, stay."""
        saved = getattr(torch, self.dtype)
        if not tensor.is_floating_point() or tensor.dtype == saved:
            return tensor.dtype
        kept = {*(policy._keep_in_fp32_modules or ()), *(policy._keep_in_fp32_modules_strict or ())}
        return torch.float32 if kept & set(name.split(".")) else saved


def valid_generation(given: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """A generation config that can be saved, and what was changed to make it so.

    Sampling settings beside `do_sample: false` were meant to be used, so sampling is switched on; other settings that
    contradict each other go back to their defaults.
    """
    config, notes, default = copy.deepcopy(given), [], GenerationConfig()
    message = _complaint(config)
    if message and config.do_sample is not True and any(f"`{name}`" in message for name in SAMPLING):
        named = [f"{name} {getattr(config, name)}" for name in SAMPLING if f"- `{name}`" in message]
        config.do_sample = True
        notes.append(
            f"the start's generation_config has do_sample false beside {', '.join(named) or 'sampling settings'}, "
            "which cannot be saved: the trained model's has do_sample true"
        )
        message = _complaint(config)
    while message:
        named = [name for name in re.findall(r"`(\w+)", message) if hasattr(default, name)]
        wrong = next((name for name in named if getattr(config, name, None) != getattr(default, name)), None)
        if wrong is None:
            kept = {name: getattr(given, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            notes.append("the start's generation_config cannot be saved: the trained model's only has its token ids")
            return GenerationConfig(**kept), notes
        value, of_default = getattr(config, wrong), getattr(default, wrong)
        setattr(config, wrong, of_default)
        notes.append(
            f"the start's generation_config has {wrong} {value}, which cannot be saved: it is {of_default} now"
        )
        message = _complaint(config)
    return config, notes


def _complaint(config: GenerationConfig) -> str:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""


def start_dtype(model: ModelConfig) -> str | None:
    """Name of the type of the start checkpoint's weights by its config.json; None where that does not say."""
    model = resolved(model)
    config = load_config(model)
    dtype = config.dtype or config.get_text_config().dtype
    return None if dtype is None else _name(dtype)


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """A config as it compares: what says nothing about the model left out, keys as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in OF_THE_SOFTWARE}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
