"""The recipe: every key a user may write, with type, default, unit and range. Imports without torch.

Strict throughout: an unknown key is an error (`config.loading` adds file, line and the nearest name). The `method`
section is validated by the method's own config class, which `config.loading.load_recipe` gets from its caller, so that
this package stays below `methods`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """Base of all recipe sections: strict and immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


# ----------------------------------------------------------------------------------------------------------- model


class TokenizerInit(Section):
    """A tokenizer made here, for models trained from scratch."""

    type: Literal["characters", "bpe"] = Field("characters", description="one token per character, or byte-level BPE")
    vocab_size: int = Field(1024, ge=260, description="size of a BPE vocabulary, special tokens included; bpe only")
    alphabet: str | None = Field(
        None, description="characters of a character tokenizer; default: printable ASCII and newline"
    )


class ModelInit(Section):
    """A small model with random weights, for work that needs no download."""

    architecture: Literal["llama", "qwen2", "qwen3"] = "llama"
    hidden_size: int = Field(64, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(2, ge=1)
    kv_heads: int | None = Field(None, ge=1, description="default: heads")
    intermediate_size: int | None = Field(None, ge=8, description="default: 3 * hidden_size")
    max_length: int = Field(512, ge=16, description="positions")
    tie_embeddings: bool = True
    tokenizer: TokenizerInit = TokenizerInit()

    @model_validator(mode="after")
    def _divides(self) -> ModelInit:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class Lora(Section):
    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1, description="rank")
    alpha: int | None = Field(None, ge=1, description="scale numerator; default: 2 * r")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """The policy: a path or Hub id, or `init` for random weights."""

    path: str | None = Field(None, description="Hub id or local folder with safetensors")
    init: ModelInit | None = None
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    peft: Lora | None = None
    trust_remote_code: bool = Field(False, description="run Python code from the model repository; off unless asked")
    attn_implementation: str | None = Field(None, description="transformers name: sdpa, eager, flash_attention_2, ...")

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of `path` (a Hub id or local folder) and `init` (random weights)")
        return self


# ------------------------------------------------------------------------------------------------------------ data


class FileSource(Section):
    """Rows from the Hub or from local JSONL, JSON, CSV or Parquet files."""

    path: str = Field(description="Hub dataset id, or a local file (.jsonl, .json, .csv, .parquet, also .gz) or folder")
    name: str | None = Field(None, description="Hub configuration name")
    split: str = "train"
    revision: str | None = None
    prompt: str = Field("prompt", description="column with the prompt: text, or a list of chat messages")
    completion: str | None = Field(None, description="column with a written completion (supervised methods)")
    reference: str | None = Field(None, description="column with the gold answer (verifiers)")
    reference_pattern: str | None = Field(
        None, description="regular expression whose first group is the answer within the reference column"
    )
    template: str | None = Field(
        None,
        description="text around the prompt, with the row's columns as {column}, the prompt column also as {prompt}",
    )
    system: str | None = Field(None, description="system message; makes the prompt a chat")
    chat: bool | None = Field(
        None, description="render text prompts through the chat template as a user message; default: if there is one"
    )
    limit: int | None = Field(None, ge=1, description="use the first N rows")


class WeakAnnotator(Section):
    """The simulated annotator that is systematically unsure (see docs/design, testbed)."""

    unsure_share: float = Field(0.45, ge=0.0, le=1.0, description="share of facts it is unsure of, fixed by fact_seed")
    error_rate: float = Field(0.8, ge=0.0, le=1.0, description="probability of the wrong result on an unsure fact")
    give_up_rate: float = Field(
        0.5, ge=0.0, le=1.0, description="countdown: probability to stop at a wrong attempt, after each failure"
    )
    fact_seed: int = Field(0, description="which facts are unsure and what is written instead")


class TaskSource(Section):
    """A procedural task with visible chain of thought and an exact verifier."""

    task: Literal["chain_sum", "countdown", "variable_chain"]
    levels: list[int] | dict[int, float] = Field(description="difficulty levels, equally often or with weights")
    size: int = Field(ge=1, description="number of problems")
    seed: int = 0
    split: Literal["train", "test"] = Field("train", description="disjoint by construction, whatever the seeds")
    annotator: Literal["expert", "weak"] = Field("expert", description="who writes the traces (supervised methods)")
    weakness: WeakAnnotator | None = Field(None, description="parameters of the weak annotator; default: its defaults")


class GymSource(Section):
    """Problems of a `reasoning-gym` generator, scored by that package's own scorer."""

    reasoning_gym: str = Field(description="generator name, e.g. chain_sum, countdown, gsm_symbolic")
    size: int = Field(ge=1)
    seed: int = 0
    split: Literal["train", "test"] = Field("train", description="disjoint seed ranges")
    config: dict[str, Any] = Field(default_factory=dict, description="the generator's own parameters")
    template: str | None = Field(None, description="text around the question, with {question}")
    system: str | None = None
    chat: bool | None = None


def _source_kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, Section) else ()
    return "task" if "task" in keys else "reasoning_gym" if "reasoning_gym" in keys else "file"


Source = Annotated[
    Annotated[FileSource, Tag("file")]
    | Annotated[TaskSource, Tag("task")]
    | Annotated[GymSource, Tag("reasoning_gym")],
    Discriminator(_source_kind),
]


class DataConfig(Section):
    """Where rows come from. Which of them a method reads is part of its needs."""

    prompts: Source | None = Field(None, description="problems that rollouts are sampled for")
    completions: Source | None = Field(None, description="problems with written completions")
    preferences: Source | None = Field(None, description="problems with a chosen and a rejected completion")
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; default: no limit but the model's")
    max_length: int | None = Field(None, ge=2, description="tokens of prompt and completion; default: the model's")
    too_long: Literal["drop", "cut", "error"] = Field(
        "drop", description="what happens to longer ones: leave out, cut (prompt left, completion right), stop"
    )
    max_lost_share: float = Field(
        0.1, ge=0.0, le=1.0, description="stop if a larger share of rows is dropped or loses its end token"
    )


# --------------------------------------------------------------------------------------------------------- verifier


class _VerifierSection(Section):
    weight: float = Field(1.0, description="factor of the score in the reward")


class MathVerifierConfig(_VerifierSection):
    """Mathematical equality by math-verify."""

    type: Literal["math"]
    profile: Literal["strict", "lenient"] = Field("strict", description="strict for rewards, lenient for evaluation")


class ExactVerifierConfig(_VerifierSection):
    """String equality after stripping."""

    type: Literal["exact"]
    pattern: str | None = Field(
        None, description="regular expression whose first group of the last match is the answer"
    )
    ignore_case: bool = False


class NumericVerifierConfig(_VerifierSection):
    """Equality of the last number (or of the first group of the last match of `pattern`)."""

    type: Literal["numeric"]
    pattern: str | None = None
    tolerance: float = Field(0.0, ge=0.0, description="absolute or relative, whichever allows more")


class FormatVerifierConfig(_VerifierSection):
    """Shaping only: whether the completion matches a pattern as a whole."""

    type: Literal["format"]
    pattern: str = Field(description="regular expression that the whole completion must match (dot matches newline)")


class ProceduralVerifierConfig(_VerifierSection):
    """The verifier of the procedural task that the problem came from."""

    type: Literal["procedural"]
    profile: Literal["strict", "lenient"] = Field("strict", description="strict checks every step, lenient the answer")


class GymVerifierConfig(_VerifierSection):
    """The scorer of the reasoning-gym generator that the problem came from."""

    type: Literal["reasoning_gym"]
    pattern: str | None = Field(
        None, description="answer within the completion; default: <answer> tag, else the last line"
    )


VerifierConfig = Annotated[
    MathVerifierConfig
    | ExactVerifierConfig
    | NumericVerifierConfig
    | FormatVerifierConfig
    | ProceduralVerifierConfig
    | GymVerifierConfig,
    Field(discriminator="type"),
]


class VerifierPoolConfig(Section):
    workers: int = Field(1, ge=0, description="worker processes; 0 runs in this process, without a time limit")
    timeout: float = Field(10.0, gt=0, description="seconds of wall clock for one completion")


# ---------------------------------------------------------------------------------------------------------- rollouts


class RolloutConfig(Section):
    """How completions are sampled from the policy."""

    engine: Literal["transformers"] = Field("transformers", description="the engine that samples")
    samples_per_prompt: int = Field(8, ge=1, description="completions per prompt: the group")
    max_new_tokens: int = Field(256, ge=1, description="tokens")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, description="default: off")
    max_batch: int = Field(256, ge=1, description="sequences the engine holds at once")


# ------------------------------------------------------------------------------------------------- batch and training


class BatchConfig(Section):
    """Two numbers; everything else is derived and printed. Online methods count prompts, offline methods rows."""

    prompts_per_step: int | None = Field(None, ge=1, description="prompts per optimizer step over all ranks (online)")
    rows_per_step: int | None = Field(None, ge=1, description="rows per optimizer step over all ranks (offline)")
    micro_batch: int = Field(8, ge=1, description="sequences per forward and backward pass on one rank")


class TrainingConfig(Section):
    """Names and meaning as in Hugging Face TrainingArguments."""

    learning_rate: float = Field(1e-6, gt=0)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    num_train_epochs: float | None = Field(None, gt=0, description="passes over the data; or give max_steps")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "constant_with_warmup"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    bf16: bool = False
    gradient_checkpointing: bool = False
    optim: str = Field("adamw_torch_fused", description="Hugging Face optimizer name")
    save_steps: int | None = Field(
        None, ge=1, description="checkpoint every N steps; default: only when the run is stopped"
    )
    save_total_limit: int | None = Field(None, ge=1)
    logging_steps: int = Field(1, ge=1)
    report_to: list[str] = Field(default_factory=list, description="Hugging Face trackers: wandb, tensorboard, ...")
    run_name: str | None = None

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give exactly one of `max_steps` and `num_train_epochs`")
        return self


# -------------------------------------------------------------------------------------------------------- evaluation


class BenchmarkConfig(Section):
    """A benchmark written in place: problems and the verifiers that judge answers to them."""

    name: str
    data: Source
    verifier: list[VerifierConfig] = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1, description="default: the evaluation's")


class EvaluationConfig(Section):
    benchmarks: list[str | BenchmarkConfig] = Field(
        min_length=1, description="names (`posttrain eval --list`) or in place"
    )
    every: int | None = Field(None, ge=1, description="optimizer steps between evaluations while training")
    samples: int = Field(1, ge=1, description="sampled completions per problem; besides the greedy one")
    greedy: bool = Field(True, description="also measure greedy accuracy")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    k: list[int] = Field(default_factory=lambda: [1], description="pass@k to report, each at most `samples`")
    limit: int | None = Field(None, ge=1, description="first N problems of each benchmark")
    seed: int = 0
    max_batch: int = Field(256, ge=1, description="sequences the engine holds at once")


class TrackingConfig(Section):
    console: Literal["auto", "live", "plain", "off"] = "auto"
    plots: bool = Field(True, description="PNG curves at the end of the run")


# ------------------------------------------------------------------------------------------------------------ recipe


class Recipe(Section):
    """One run.

    `method` is the validated config object of the method (it has a `name` attribute).
    """

    model: ModelConfig
    data: DataConfig
    method: Any = Field(description="name and parameters of the method: `posttrain methods`")
    batch: BatchConfig
    training: TrainingConfig
    verifier: list[VerifierConfig] | None = Field(None, min_length=1)
    verifier_pool: VerifierPoolConfig = VerifierPoolConfig()
    rollouts: RolloutConfig | None = None
    evaluation: EvaluationConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    threads: int | None = Field(None, ge=1, description="CPU threads of torch per rank; default: as torch chooses")
    output: str = Field(description="folder of the run")
    seed: int = 0
