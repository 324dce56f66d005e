"""A sequence classifier as verifier. Runs in the process of the trainer, on whole batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from pydantic import Field

from posttrain.config.foreign_files import check_files
from posttrain.config.pictures import PictureConfig
from posttrain.config.schema import ModelConfig
from posttrain.config.verifier import VerifierConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Problem
from posttrain.errors import DataError, ModelError
from posttrain.registry import Registry
from posttrain.verifiers.verdict import Answer, Status, Verdict


class ScorerConfig(VerifierConfig):
    """What the sections of verifiers say that are models with one output."""

    path: str = Field(description="Hub id or local folder with safetensors and a tokenizer")
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    outcome: bool = Field(True, description="judges the outcome; false: only shapes the reward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of its weights")
    device: str | None = Field(None, description="torch device; default: the GPU of this rank, else the CPU")
    batch_size: int = Field(16, ge=1, description="sequences per forward pass")
    max_length: int = Field(2048, ge=8, description="tokens of prompt and completion; longer ones lose their beginning")

    @property
    def judges_outcome(self) -> bool:
        return self.outcome

    def inputs(self) -> list[str]:
        return [self.path]


class RewardModelVerifier:
    """The classifier's one output for prompt and answer, through a sigmoid unless told otherwise.

    Correct if the output itself is above the threshold, else wrong. Text goes through the classifier's own chat
    template if it has one; without one an end token follows it, as in training (`Renderer.conversation`, and TRL).
    Sequences that are too long lose their beginning. Loaded at the first use; draws no random numbers. An output that
    is not finite is a crash.
    """

    name = "reward_model"
    outcome = True

    class Config(ScorerConfig):
        """A sequence classifier with one output, run in the trainer's process on whole batches."""

        type: Literal["reward_model"] = "reward_model"
        transform: Literal["sigmoid", "none"] = Field("sigmoid", description="how the output becomes the score")
        threshold: float = Field(0.0, description="outputs above it count as correct")

    def __init__(self, config: RewardModelVerifier.Config) -> None:
        self.config = config
        self.outcome = config.outcome
        self._loaded: tuple[Any, Any, Renderer] | None = None

    def verify(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer.

        Raises:
            DataError: the classifier's chat template refuses a conversation.
            ModelError: the classifier cannot be loaded or is none.
        """
        import torch

        if not answers:
            return []
        if self._loaded is None:
            self._loaded = load_scorer(self.config)
        model, tokenizer, renderer = self._loaded
        rows = [_ids(renderer, problem, answer.text) for problem, answer in zip(problems, answers, strict=True)]
        if renderer.pictures is not None:
            self._refuse_cut_pictures(rows, problems)
        outputs = [0.0] * len(rows)
        # Sequences of about one length share a batch, so little is padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            batch = tokenizer.pad(
                {"input_ids": [rows[index][-self.config.max_length :] for index in chosen]},
                padding_side="right",
                return_tensors="pt",
            ).to(model.device)
            with torch.inference_mode():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for index, value in zip(chosen, logits[:, 0].float().tolist(), strict=True):
                outputs[index] = value
        return [self._verdict(value, len(row)) for value, row in zip(outputs, rows, strict=True)]

    def close(self) -> None:
        """Give the memory of the model back."""
        self._loaded = None

    def _refuse_cut_pictures(self, rows: Sequence[Sequence[int]], problems: Sequence[Problem]) -> None:
        from posttrain.data.picture_text import FIRST

        for row, problem in zip(rows, problems, strict=True):
            if len(row) > self.config.max_length and any(token >= FIRST for token in row):
                raise DataError(
                    f"prompt and completion have {len(row):,} tokens, and rows with pictures are not cut",
                    where=problem.where,
                    hint=f"raise the verifier's max_length from {self.config.max_length:,}",
                )

    def _verdict(self, value: float, tokens: int) -> Verdict:
        if not math.isfinite(value):
            return Verdict(Status.CRASH, None, f"the reward model's output is {value}")
        score = value if self.config.transform == "none" else 1 / (1 + math.exp(-max(-500.0, value)))
        cut = f", cut from {tokens} tokens" if tokens > self.config.max_length else ""
        return Verdict(Status.CORRECT if value > self.config.threshold else Status.WRONG, score, f"{value:.4g}{cut}")


def load_scorer(config: ScorerConfig) -> tuple[Any, Any, Renderer]:
    """A sequence classifier with one output, its tokenizer, and a renderer with that; one of text and pictures sees the
    pictures of its rows.

    Raises:
        ModelError: it cannot be loaded or is none.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = config.device
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    own = {"revision": config.revision, "trust_remote_code": False}  # else it asks at the terminal
    if Path(config.path).is_dir():
        check_files(Path(config.path))
    seeing = _seeing(config)
    if seeing is not None:
        model, tokenizer = seeing
        return model.to(device).eval().requires_grad_(False), tokenizer, Renderer(tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, **own)
        # Loading makes weights at random before it fills them; the run's own random numbers must not notice.
        with torch.random.fork_rng(devices=[]):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                config.path,
                **own,
                dtype=getattr(torch, config.dtype),
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"cannot load {config.path!r}: {first_line}",
            where=f"verifier.{config.type}.path",
            hint="give a Hub id or a folder with config.json, safetensors weights and tokenizer",
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(
            f"{config.path!r} is no trained sequence classifier: it has no weights {missing}",
            where=f"verifier.{config.type}.path",
            hint="a language model has to be trained as a reward model first",
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"{config.path!r} has {model.config.num_labels} outputs, and a reward model has one",
            where=f"verifier.{config.type}.path",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The classifier finds the last token of a row by this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval().requires_grad_(False), tokenizer, Renderer(tokenizer)


LOADERS: Registry[Callable[..., tuple[Any, Any]]] = Registry(
    "way of loading a classifier", {"text and pictures": "posttrain.models.loading:load_classifier"}
)
"""By what a classifier reads, where that is more than text."""


def _seeing(config: ScorerConfig) -> tuple[Any, Any] | None:
    """A classifier of text and pictures and its tokenizer; None where it is one of text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    try:
        known = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError):  # which is said where it is loaded as one of text
        return None
    if type(known) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    how = ModelConfig(path=config.path, revision=config.revision, dtype=config.dtype, pictures=PictureConfig())
    try:
        return LOADERS["text and pictures"](how, seed=0, new_head=False)
    except ModelError as error:
        raise ModelError(error.what, where=f"verifier.{config.type}.path", hint=error.hint) from error


def as_trained(problem: Problem, tokenizer: Any) -> Problem:
    """The problem as a classifier with this tokenizer reads it: as a chat if there is a template, else as text."""
    prompt = problem.prompt
    if tokenizer.chat_template is not None:
        return replace(problem, chat=None)
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return replace(problem, prompt=text, chat=False)


def _ids(renderer: Renderer, problem: Problem, text: str) -> list[int]:
    prompt, tokenizer = problem.prompt, renderer.tokenizer
    if renderer.pictures is not None:
        sample = renderer.conversation(Example(as_trained(problem, tokenizer), text))
        return list(sample.ids)
    if tokenizer.chat_template is None:
        ids = renderer.prompt_ids(as_trained(problem, tokenizer))
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if tokenizer.eos_token_id in (None, ids[-1]) else [*ids, tokenizer.eos_token_id]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages.append({"role": "assistant", "content": text})
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    except (TemplateError, RecursionError) as error:
        raise DataError(
            f"the reward model's chat template refuses these messages: {error}", where=problem.where
        ) from error
