"""The recipe: every key a user may write, with type, default, unit and range. Imports without torch.

Strict throughout: an unknown key is an error (`config.loading` adds file, line and the nearest name). The `method`
section is validated by the method's own config class, which `config.loading.load_recipe` gets from its caller, so that
this package stays below `methods`.

One module although it is long: it is the reference of all keys in one place, mostly descriptions, and each section
refers to the ones before it.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from posttrain.config.addresses import Address
from posttrain.config.environment import AnyEnvironment
from posttrain.config.keys import KeyName
from posttrain.config.pictures import PictureConfig
from posttrain.config.revisions import RevisionTemplate, check_revisions
from posttrain.config.section import Section
from posttrain.config.tasks import TASKS
from posttrain.config.verifier import AnyVerifier
from posttrain.errors import nearest

# ----------------------------------------------------------------------------------------------------------- model


class TokenizerInit(Section):
    """A tokenizer made here, for models trained from scratch."""

    type: Literal["characters", "bpe"] = Field("characters", description="one token per character, or byte-level BPE")
    vocab_size: int = Field(
        1024, ge=260, le=1_000_000, description="size of a BPE vocabulary, special tokens included; bpe only"
    )
    alphabet: str | None = Field(
        None, description="characters of a character tokenizer; default: printable ASCII and newline"
    )


class ModelInit(Section):
    """A small model with random weights, for work that needs no download."""

    architecture: Literal["llama", "qwen2", "qwen3"] = Field("llama", description="type of the model")
    hidden_size: int = Field(64, ge=8, le=100_000, description="width; a multiple of `heads`")
    layers: int = Field(3, ge=1, le=10_000, description="number of layers")
    heads: int = Field(2, ge=1, description="attention heads")
    kv_heads: int | None = Field(None, ge=1, description="heads of keys and values; default: heads")
    intermediate_size: int | None = Field(
        None, ge=8, le=1_000_000, description="width of the MLP; default: 3 * hidden_size"
    )
    max_length: int = Field(512, ge=16, le=100_000_000, description="positions")
    tie_embeddings: bool = Field(True, description="the output projection is the embedding table")
    tokenizer: TokenizerInit = TokenizerInit()

    @model_validator(mode="after")
    def _divides(self) -> ModelInit:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class Lora(Section):
    """A low-rank adapter; the options are PEFT's."""

    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1, description="rank")
    alpha: int | None = Field(None, ge=1, description="scale numerator; default: 2 * r")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of the adapter's inputs while training")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="ends of the names of the layers that get an adapter; all-linear: all but the head"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) in place of alpha / r")
    dora: bool = Field(False, description="train the length of each output's weights beside their direction")
    modules_to_save: list[str] | None = Field(None, description="modules trained as a whole beside the adapter")
    rank_pattern: dict[str, int] | None = Field(None, description="other ranks by the end of the module's name")
    alpha_pattern: dict[str, int] | None = Field(None, description="other alphas by the end of the module's name")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that are trained too, in place")
    layers_to_transform: list[int] | None = Field(None, description="layers with an adapter; default: all")
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = Field(
        "default", description="default: Kaiming-uniform A, B zero; all begin as the base model"
    )


class AdapterStart(Section):
    """A trained LoRA adapter that the run starts from."""

    path: str | None = Field(None, description="adapter folder; default: `model.path` is one, and names its base")
    mode: Literal["merge", "continue"] = Field(
        "merge", description="merge: added to the weights first; continue: this adapter is trained on"
    )


class Quantization(Section):
    """The base model in few bits by bitsandbytes, under an adapter that is trained (QLoRA)."""

    bits: Literal[4, 8] = Field(4, description="of a weight")
    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit numbers; bits: 4 only")
    double: bool = Field(True, description="quantise the scales too; bits: 4 only")
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the products; default: `model.dtype`; bits: 4 only"
    )


class ModelConfig(Section):
    """The policy: a path or Hub id, or `init` for random weights."""

    path: str | None = Field(None, description="Hub id or local folder with safetensors")
    init: ModelInit | None = None
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type that weights are trained in; bf16 arithmetic on float32 weights: training.bf16"
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the saved model; default: the start checkpoint's, or `dtype` if that is smaller"
    )
    peft: Lora | None = Field(None, description="train an adapter; default: all weights")
    adapter: AdapterStart | None = Field(None, description="start from a trained adapter")
    quantization: Quantization | None = Field(None, description="load the base in 4 or 8 bits (extra `quantized`)")
    trust_remote_code: bool = Field(False, description="run Python code from the model repository; off unless asked")
    chat_template: str | None = Field(
        None, description="Jinja chat template, a file or the text itself; default: the tokenizer's own"
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="settings that the chat template reads, e.g. {enable_thinking: false}"
    )
    template_date: date | None = Field(
        None, description="day that a chat template which reads the clock takes for today, as 2026-01-31"
    )
    router_loss: float | None = Field(
        None,
        ge=0,
        description="coefficient of the routers' load-balancing loss of a mixture of experts; default: the model's "
        "router_aux_loss_coef where its config has output_router_logits: true, else none",
    )
    pictures: PictureConfig | None = Field(
        None, description="a model of text and pictures, read as such; default: the text part of one (docs/pictures.md)"
    )
    attn_implementation: str | None = Field(
        None,
        description="transformers name: sdpa, flex_attention (training on GPUs only), eager, flash_attention_2, ...",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of `path` (a Hub id or local folder) and `init` (random weights)")
        if self.init is not None and (self.adapter is not None or self.quantization is not None):
            name = "adapter" if self.adapter is not None else "quantization"
            raise ValueError(f"`{name}` is about a model that is loaded, and `init` makes one")
        if self.peft is not None and self.adapter is not None and self.adapter.mode == "continue":
            raise ValueError("`adapter` with mode: continue trains that adapter as it is: leave out `peft`")
        return self

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained, and not the weights."""
        return self.peft is not None or (self.adapter is not None and self.adapter.mode == "continue")

    def of_folder(self, path: str, dtype: str | None = None) -> ModelConfig:
        """How to load another model like this one: whole, with this section's attention and trust.

        Args:
            path: folder or Hub id.
            dtype: type of the weights; default: this section's.
        """
        changes = {"path": path, "dtype": dtype or self.dtype}
        none = ("init", "revision", "peft", "adapter", "quantization", "router_loss")
        return self.model_copy(update=changes | dict.fromkeys(none))


# ------------------------------------------------------------------------------------------------------------ data


class MixedSection(Section):
    """What a source may say where several stand in a list."""

    source: str | None = Field(
        None,
        pattern=r"^[\w\-]+$",
        description="name of this source among several, in metrics and counts; default: of its file or task",
    )
    weight: float | dict[int, float] | None = Field(
        None,
        description="share of the draws among several sources, relative to theirs; or {step: weight}, from which "
        "optimizer step (from 0) which holds, 0 before the first of them; default: all rows alike",
    )
    max_epochs: float | None = Field(
        None, gt=0, description="passes over this source after which the others are drawn alone; default: no limit"
    )

    @field_validator("weight")
    @classmethod
    def _weights_from_zero(cls, weight: float | dict[int, float] | None) -> float | dict[int, float] | None:
        by_step = weight if isinstance(weight, dict) else {} if weight is None else {0: weight}
        if any(step < 0 for step in by_step):
            raise ValueError("steps count from 0")
        if by_step and (min(by_step.values()) < 0 or max(by_step.values()) <= 0):
            raise ValueError("a weight is greater than 0, or 0 in the steps in which the source takes no part")
        return weight


class ProblemSection(MixedSection):
    """What a source of problems may say beside others in a list."""

    verifier: list[AnyVerifier] | None = Field(
        None,
        min_length=1,
        description="verifiers of this source among several, in place of the recipe's (data.prompts)",
    )


class FileSource(ProblemSection):
    """Rows from the Hub or from local JSONL, JSON, CSV or Parquet files."""

    path: str = Field(description="Hub dataset id, or a local file (.jsonl, .json, .csv, .parquet, also .gz) or folder")
    name: str | None = Field(None, description="Hub configuration name")
    split: str = Field("train", description="split of a data set on the Hub or in a folder")
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    prompt: str = Field("prompt", description="column with the prompt: text, or a list of chat messages")
    completion: str | None = Field(
        None,
        description="column with a written completion (data.completions); default: what the columns of the first row "
        "say (prompt and completion, messages, conversations, or instruction and output)",
    )
    messages: str | None = Field(
        None,
        description="column with a whole conversation, in the form of OpenAI or ShareGPT (data.completions, and "
        "data.unpaired, where the label is that of the last assistant turn)",
    )
    images: str | None = Field(
        None,
        description="column with the pictures of a row, paths in the folder of the file or bytes; parts of messages "
        "may hold theirs (docs/pictures.md; with model.pictures)",
    )
    image_hosts: list[str] = Field(
        [],
        description="hosts that pictures are fetched from where a row names an address, such as images.example.com; "
        "default: addresses are refused (with `images`)",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="which assistant turns are trained on; turns of weight 0 never are (data.completions)"
    )
    tools: str | None = Field(
        None,
        description="column with descriptions of tools (JSON schema) for the chat template; default: `tools`, or "
        "`functions` beside messages",
    )
    chosen: str | None = Field(
        None, description="column with the preferred completion (data.preferences); default: chosen"
    )
    rejected: str | None = Field(
        None, description="column with the completion it is preferred to (data.preferences); default: rejected"
    )
    label: str | None = Field(
        None, description="column that says whether a completion, or each step, is good; default: label, or labels"
    )
    steps: str | None = Field(None, description="column with a list of steps (data.stepwise); default: completions")
    others: dict[str, str] | None = Field(
        None, description="columns of further completions by role, e.g. {gold: best} (data.preferences)"
    )
    scores: dict[str, str] | None = Field(
        None, description="columns of scores by role (data.preferences); default: score_<role> where a row has it"
    )
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
    miscount_share: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="tasks of pictures: share of the numbers 1..8 (dots, digits, rows) that it takes for one more",
    )
    miscount_rate: float = Field(
        0.6, ge=0.0, le=1.0, description="tasks of pictures: probability that it does, each time"
    )
    fact_seed: int = Field(0, description="which facts are unsure and what is written instead")


class TaskSource(ProblemSection):
    """A procedural task with visible chain of thought and an exact verifier."""

    task: str = Field(
        description="chain_sum, countdown, digit_sum, dot_sum, maze, rooms, variable_chain, or one of a plugin"
    )
    levels: list[int] | dict[int, float] = Field(description="difficulty levels, equally often or with weights")
    size: int = Field(ge=1, le=10_000_000, description="number of problems")
    seed: int = Field(0, description="of the problems")
    split: Literal["train", "test"] = Field("train", description="disjoint by construction, whatever the seeds")
    annotator: Literal["expert", "weak"] = Field("expert", description="who writes the traces (supervised methods)")
    weakness: WeakAnnotator | None = Field(None, description="parameters of the weak annotator; default: its defaults")

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}\n  {nearest(task, TASKS)}")
        return task


class GymSource(ProblemSection):
    """Problems of a `reasoning-gym` generator, scored by that package's own scorer."""

    reasoning_gym: str = Field(description="generator name, e.g. chain_sum, countdown, gsm_symbolic")
    size: int = Field(ge=1, le=10_000_000, description="number of problems")
    seed: int = Field(0, description="of the problems")
    split: Literal["train", "test"] = Field("train", description="disjoint seed ranges")
    config: dict[str, Any] = Field(default_factory=dict, description="the generator's own parameters")
    template: str | None = Field(None, description="text around the question, with {question}")
    system: str | None = Field(None, description="system message")
    chat: bool | None = Field(
        None, description="put the question into the chat template; default: if the tokenizer has one"
    )


def _source_kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, Section) else ()
    return "task" if "task" in keys else "reasoning_gym" if "reasoning_gym" in keys else "file"


Source = Annotated[
    Annotated[FileSource, Tag("file")]
    | Annotated[TaskSource, Tag("task")]
    | Annotated[GymSource, Tag("reasoning_gym")],
    Discriminator(_source_kind),
]


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Sources = Annotated[
    Annotated[Source, Tag("one")] | Annotated[Annotated[list[Source], Field(min_length=1)], Tag("several")],
    Discriminator(_one_or_several),
]
"""One source, or several that are mixed."""


class TraceWeights(Section):
    """How often a trace is drawn: in proportion to exp(scaled / alpha), where scaled runs from 0 to 1 over the traces.

    Source: trajectory weighting of offline data, arXiv 2306.13085.
    """

    by: Literal["advantage", "return"] = Field(
        "advantage", description="reward minus the mean reward of all traces of the problem, or the reward itself"
    )
    alpha: float = Field(0.1, gt=0, description="small: the best traces take nearly all draws; large: all alike")


class TraceSource(MixedSection):
    """Traces: files of `posttrain sample` or `posttrain prepare traces`, each with its manifest beside it."""

    path: str | list[str] = Field(description="trace file (.jsonl, .parquet), or several")
    keep: Literal["correct", "all"] = Field("correct", description="which traces are used, by the verdict they carry")
    per_problem: int | None = Field(None, ge=1, description="use the first N of each problem that are kept")
    weights: TraceWeights | None = Field(
        None, description="draw traces by weight, with replacement (sft, chord, red); default: each once per pass"
    )


def _traces_kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else value.model_fields_set if isinstance(value, Section) else ()
    return "task" if "task" in keys else "file" if {"completion", "messages"} & set(keys) else "traces"


Traces = Annotated[
    Annotated[TraceSource, Tag("traces")] | Annotated[FileSource, Tag("file")] | Annotated[TaskSource, Tag("task")],
    Discriminator(_traces_kind),
]


TraceSources = Annotated[
    Annotated[Traces, Tag("one")] | Annotated[Annotated[list[Traces], Field(min_length=1)], Tag("several")],
    Discriminator(_one_or_several),
]


class DataConfig(Section):
    """Where rows come from. Which of them a method reads is part of its needs."""

    prompts: Sources | None = Field(None, description="problems that rollouts are sampled for; one source, or a list")
    completions: Sources | None = Field(None, description="problems with written completions; one source, or a list")
    preferences: Sources | None = Field(
        None, description="problems with a chosen and a rejected completion; one source, or a list"
    )
    unpaired: Sources | None = Field(
        None, description="problems with one completion each that is good or bad; one source, or a list"
    )
    stepwise: Sources | None = Field(
        None, description="problems with a solution whose steps are each right or wrong; one source, or a list"
    )
    traces: TraceSources | None = Field(
        None,
        description="completions that others wrote or the policy sampled before: trace files, or a file with a "
        "`completion` column, or a task's annotator; one source, or a list",
    )
    streaming: bool | None = Field(
        None,
        description="read and render rows when a step needs them, so that no more of them is in memory (sft; .jsonl, "
        ".arrow, .parquet, Hub); default: where the files together are larger than 64 MiB",
    )
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; default: no limit but the model's")
    max_length: int | None = Field(None, ge=2, description="tokens of prompt and completion; default: the model's")
    too_long: Literal["drop", "cut", "error"] = Field(
        "drop", description="what happens to longer ones: leave out, cut (prompt left, completion right), stop"
    )
    bad_rows: Literal["drop", "error"] = Field(
        "drop",
        description="what happens to a row that cannot be used (an empty reply, a missing value, messages that the "
        "template refuses): leave it out and count it, or stop",
    )
    max_lost_share: float = Field(
        0.1, ge=0.0, le=1.0, description="stop if a larger share of rows is dropped or loses its end token"
    )


# --------------------------------------------------------------------------------------------------------- verifier


class VerifierPoolConfig(Section):
    """The worker processes that verifiers run in, and their clock."""

    workers: int = Field(1, ge=0, description="worker processes; 0 runs in this process, without a time limit")
    timeout: float = Field(10.0, gt=0, description="seconds of wall clock for one completion")
    memory_mb: int = Field(
        4096, ge=256, description="MiB of data that one worker may hold; beyond it a verdict is crash"
    )
    on_timeout: Literal["unknown", "wrong"] = Field(
        "unknown", description="what a completion is that takes longer: not judged, or wrong (score 0)"
    )


# ---------------------------------------------------------------------------------------------------------- rollouts


class ReplayConfig(Section):
    """Earlier groups of rollouts, trained on again beside fresh ones."""

    size: int = Field(ge=1, description="groups that are kept; the oldest make room")
    share: float = Field(gt=0, lt=1, description="share of the prompts of a step whose groups come from the buffer")


class ImportanceConfig(Section):
    """Weights for the difference of trainer and engine, beyond `importance_cap`."""

    level: Literal["token", "sequence", "geometric"] = Field(
        "token",
        description="weigh tokens, whole completions by the product over their tokens, or by its geometric mean",
    )
    mode: Literal["truncate", "mask"] = Field(
        "truncate", description="a weight beyond a bound becomes the bound, or 0, which leaves its tokens untrained"
    )
    low: float = Field(0.0, ge=0, le=1, description="lower bound of a weight")
    high: float = Field(2.0, ge=1, description="upper bound of a weight")


class RefillConfig(Section):
    """Groups whose rewards do not differ, replaced by those of further prompts."""

    waves: int = Field(4, ge=2, description="at most so many times batch.prompts_per_step prompts for a rollout")
    unbiased: bool = Field(
        False,
        description="advantages times the estimated share of groups with a signal, so that the expected gradient is "
        "that of all draws; false: as published, larger by one over that share",
    )


class VllmConfig(Section):
    """How vLLM runs; with mode server, how the trainer reaches it (docs/vllm.md)."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the engine; default: bfloat16 with training.bf16, else model.dtype (colocate)"
    )
    kv_cache_mb: int | None = Field(
        None,
        ge=1,
        description="MiB of keys and values; default: on a CPU enough for max_batch sequences, at most 4096; on a GPU "
        "by gpu_memory_utilization (colocate)",
    )
    gpu_memory_utilization: float = Field(
        0.3, gt=0, lt=1, description="share of the GPU's memory for the engine, weights included (colocate)"
    )
    enforce_eager: bool | None = Field(
        None, description="no compilation and no CUDA graphs; default: true on a CPU, false on a GPU (colocate)"
    )
    sleep: bool = Field(
        False,
        description="while nothing is sampled, keep the engine's weights in the machine's memory and give its cache "
        "back to the GPU (colocate, GPU)",
    )
    url: Address = Field("http://127.0.0.1:8000", description="the server's address (server)")
    api_key_env: KeyName | None = Field(
        None,
        description="environment variable with the server's key; default: the one that launch/vllm_server.sh made, for "
        "a server on this machine (server)",
    )
    start_timeout: float = Field(600.0, gt=0, description="seconds to wait for the server at the start (server)")
    timeout: float = Field(1800.0, gt=0, description="seconds for one batch of rollouts, and for one sync (server)")
    reconnect: float = Field(
        30.0, ge=0, description="seconds for which a server that cannot be reached is tried again (server)"
    )
    transfer_dir: str = Field(
        "/dev/shm",  # nosec B108 # a private folder is made in it
        description="folder that trainer and server both see, through which weights go (server)",
    )
    sync: Literal["merged", "adapter"] = Field(
        "merged",
        description="what goes to vLLM after an update: all weights, with an adapter merged into them, or the adapter "
        "alone (model.peft)",
    )
    canary_limit: float | None = Field(
        None,
        gt=0,
        description="largest difference, in nats, of trainer and engine log-probs after a sync; default: 1e-4 where "
        "both compute in float32, else 0.5",
    )


class RolloutConfig(Section):
    """How completions are sampled from the policy."""

    engine: Literal["transformers", "vllm"] = Field("transformers", description="the engine that samples")
    mode: Literal["colocate", "server"] = Field(
        "colocate", description="vLLM in the trainer's process, or a server (launch/vllm_server.sh); vllm only"
    )
    vllm: VllmConfig = Field(VllmConfig(), description="settings of the vllm engine")
    importance_cap: float | None = Field(
        None,
        ge=1,
        description="weigh every token by trainer's over engine's probability at the sampling weights, at most this, "
        "because the two round differently; default: off; vllm only",
    )
    importance: ImportanceConfig | None = Field(
        None, description="the same at other levels and with other bounds, in place of importance_cap; vllm only"
    )
    samples_per_prompt: int = Field(8, ge=1, le=1_000_000, description="completions per prompt: the group")
    max_new_tokens: int = Field(256, ge=1, description="tokens")
    temperature: float = Field(1.0, gt=0, description="of the sampling; losses are taken at the same")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    top_k: int | None = Field(None, ge=1, description="sample from so many likeliest tokens; default: off")
    max_batch: int = Field(256, ge=1, description="sequences the engine holds at once")
    sync_every: int = Field(
        1, ge=1, description="rollouts between refreshes of the policy that samples; above 1 it is a copy that lags"
    )
    delay: int = Field(0, ge=0, description="rollouts are trained on this many rollouts after they were sampled")
    pipeline: bool = Field(
        False,
        description="sample the next rollout while this one is trained on, which makes it one update old, as with "
        "delay: 1; engine vllm with mode: server",
    )
    replay: ReplayConfig | None = Field(None, description="train again on earlier groups; default: off")
    refill: RefillConfig | None = Field(
        None, description="sample further prompts in place of groups without a signal (dynamic sampling); default: off"
    )

    @property
    def weighs(self) -> ImportanceConfig | None:
        """How the difference of trainer and engine is weighed out of the advantages; None: not at all."""
        return self.importance if self.importance_cap is None else ImportanceConfig(high=self.importance_cap)

    @property
    def stale(self) -> bool:
        """Whether some rollouts come from another policy than the one that is trained."""
        return self.sync_every > 1 or self.delay > 0 or self.pipeline or self.replay is not None


# ------------------------------------------------------------------------------------------------- batch and training


class BatchConfig(Section):
    """Two numbers; everything else is derived and printed. Online methods count prompts, offline methods rows."""

    prompts_per_step: int | None = Field(
        None, ge=1, le=1_000_000, description="prompts per optimizer step over all ranks (online)"
    )
    rows_per_step: int | None = Field(
        None, ge=1, le=1_000_000, description="rows per optimizer step over all ranks (offline)"
    )
    micro_batch: int = Field(8, ge=1, le=1_000_000, description="sequences per forward and backward pass on one rank")


class TrainingConfig(Section):
    """Names and meaning as in Hugging Face TrainingArguments."""

    learning_rate: float = Field(1e-6, gt=0, description="at its highest; adapters usually take 10 to 100 times this")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    num_train_epochs: float | None = Field(None, gt=0, description="passes over the data; or give max_steps")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field("constant_with_warmup", description="how the learning rate changes")
    lr_scheduler_kwargs: dict[str, int | float | str] | None = Field(
        None, description="further arguments of the schedule, by their names in transformers, e.g. {min_lr_rate: 0.1}"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, as AdamW has it")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of their squares")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of that mean")
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    bf16: bool = Field(False, description="arithmetic in bfloat16 (autocast) on weights of `model.dtype`")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, about a third more time"
    )
    optim: str = Field("adamw_torch_fused", description="Hugging Face optimizer name")
    save_steps: int | None = Field(
        None, ge=1, description="checkpoint every N steps; default: only when the run is stopped"
    )
    save_total_limit: int | None = Field(None, ge=1, description="checkpoints to keep, the newest; default: all")
    logging_steps: int = Field(1, ge=1, description="optimizer steps of one entry in metrics.jsonl")
    report_to: list[str] = Field(
        default_factory=list,
        description="trackers, by Hugging Face's names: wandb, trackio, tensorboard, mlflow (extra `trackers`), ...",
    )
    run_name: str | None = Field(None, description="name of the run in trackers")
    push_to_hub: bool = Field(False, description="upload the saved model at the end; the token is HF_TOKEN or a login")
    hub_model_id: str | None = Field(None, description="owner/name on the Hub; default: the output folder's name")
    hub_private_repo: bool | None = Field(None, description="make it private; default: as the account's setting says")
    hub_strategy: Literal["end"] = Field("end", description="when: the proven model after the last step")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give exactly one of `max_steps` and `num_train_epochs`")
        return self


# -------------------------------------------------------------------------------------------------------- evaluation


class BenchmarkConfig(Section):
    """A benchmark written in place: problems and the verifiers that judge answers to them."""

    name: str = Field(description="name in reports")
    data: Source
    verifier: list[AnyVerifier] = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1, description="default: the evaluation's")
    options: list[str] | None = Field(
        None,
        min_length=1,
        description="multiple choice: columns with wrong options, which are shuffled with the reference, lettered and "
        "written under the prompt",
    )
    licence: str | None = Field(None, description="of the problems; recorded in the report")


class BenchmarkFile(Section):
    """A YAML file of benchmarks, for `posttrain eval MODEL --benchmarks my.yaml`."""

    benchmarks: list[BenchmarkConfig] = Field(min_length=1)


class BestConfig(Section):
    """Which checkpoint of a run is its best: the one with the highest measure, of equal ones the earliest."""

    benchmark: str = Field(description="name of a benchmark of this evaluation")
    measure: str = Field("greedy", description="greedy, avg@n, pass@k, maj@k, beam@width or revision@i")


class HeldOutConfig(Section):
    """Held-out pairs of a preference run, and how far the policy has moved on their prompts."""

    data: FileSource | None = Field(None, description="the pairs; or give `share`")
    share: float | None = Field(
        None, gt=0, lt=1, description="share of the prompts of data.preferences that is kept from training"
    )
    limit: int | None = Field(None, ge=1, description="use the first N pairs")
    kl_prompts: int = Field(
        64, ge=0, description="prompts whose completions estimate the KL to the start; 0: none, and no copy of it"
    )
    kl_samples: int = Field(4, ge=1, description="completions for each of them")

    @model_validator(mode="after")
    def _one_origin(self) -> HeldOutConfig:
        if (self.data is None) == (self.share is None):
            raise ValueError("give exactly one of `data` (a file of pairs) and `share` (of the training pairs)")
        return self


class ValueSearchConfig(Section):
    """A value model that guides the search of `beams` over steps, in place of the likelihood of tokens."""

    path: str = Field(description="folder or Hub id of a value model: the `critic` folder of a run, or a reward model")
    delimiter: str | None = Field(
        "\n",
        min_length=1,
        description="text that ends a step; null: none does, so `beams` whole samples are drawn and the one of highest "
        "value is taken (best of n)",
    )
    max_steps: int = Field(20, ge=1, description="steps of a completion at most")
    temperature: float = Field(1.0, gt=0, description="of the continuations that are drawn")


class EpisodesConfig(Section):
    """Episodes of the policy in the recipe's environment, one of each problem, with the limits of the rollouts."""

    prompts: Source = Field(description="problems that are not trained on")
    greedy: bool = Field(False, description="take the likeliest tokens; else sampled as the rollouts are")


class EvaluationConfig(Section):
    """Benchmarks, while training or by `posttrain eval`."""

    benchmarks: list[str | BenchmarkConfig] = Field(
        default_factory=list, description="names (`posttrain eval --list`), YAML files of benchmarks, or in place"
    )
    preferences: HeldOutConfig | None = Field(
        None, description="held-out pairs of a preference run that evaluates `every`"
    )
    episodes: EpisodesConfig | None = Field(None, description="episodes of a run with an environment, `every` so often")
    benchmark_paths: dict[str, str] = Field(
        default_factory=dict, description="local files or folders for named benchmarks, in place of the Hub"
    )
    every: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between evaluations while training; the start and the end are measured too",
    )
    samples: int = Field(1, ge=1, description="sampled completions per problem; besides the greedy one")
    greedy: bool = Field(True, description="also measure greedy accuracy")
    temperature: float = Field(1.0, gt=0, description="of the samples")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer")
    k: list[int] = Field(default_factory=lambda: [1], description="pass@k to report, each at most `samples`")
    maj: list[int] = Field(
        default_factory=list, description="maj@k to report, each at most `samples`; for verifiers that name the answer"
    )
    limit: int | None = Field(None, ge=1, description="first N problems of each benchmark")
    seed: int = Field(0, description="of the samples")
    max_batch: int = Field(256, ge=1, description="sequences the engine holds at once")
    best: BestConfig | None = Field(None, description="rule for the best checkpoint of a run that evaluates `every`")

    beams: int | None = Field(
        None, ge=2, description="also measure the likeliest completion that a beam search of this width finds"
    )
    value: ValueSearchConfig | None = Field(None, description="guide that search by a value model over steps")
    revisions: int = Field(
        0, ge=0, description="also measure greedy answers that the model revises this many times (SRPO)"
    )
    revision_template: RevisionTemplate | None = Field(
        None, description="prompt of a revision, with {prompt} and {answer}: the one it was trained with"
    )

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvaluationConfig:
        if not self.benchmarks and self.preferences is None and self.episodes is None:
            raise ValueError(
                "there is nothing to measure: give `benchmarks` (or `preferences`, in a preference run, or `episodes`, "
                "in one with an environment)"
            )
        if self.episodes is not None and self.every is None:
            raise ValueError("`episodes` are played while training: set `every` (else: posttrain play)")
        if self.preferences is not None and self.every is None:
            raise ValueError("`preferences` are measured while training: set `every`")
        return self

    @model_validator(mode="after")
    def _value_of_a_search(self) -> EvaluationConfig:
        if self.value is not None and self.beams is None:
            raise ValueError("`value` guides a search: set `beams` to its width")
        if self.value is not None and self.every is not None:
            raise ValueError("`value` is not read while training: posttrain eval MODEL --value FOLDER")
        return self

    @model_validator(mode="after")
    def _template_of_revisions(self) -> EvaluationConfig:
        check_revisions(self.revisions, self.revision_template)
        return self

    @model_validator(mode="after")
    def _best_of_several(self) -> EvaluationConfig:
        if self.best is not None and self.every is None:
            raise ValueError("`best` chooses among evaluations while training: set `every`")
        return self


class TrackingConfig(Section):
    """What is shown and drawn; trackers: `training.report_to`."""

    console: Literal["auto", "live", "plain", "off"] = Field(
        "auto", description="what the terminal shows: a table that is redrawn, lines, or nothing; auto: as it can"
    )
    plots: bool = Field(True, description="PNG curves at the end of the run")
    token_values: int = Field(
        50_000,
        ge=0,
        description="tokens of a run whose own values (log-prob, ratio, advantage, reward) tokens.jsonl holds for the "
        "report, spread over its steps; 0: none",
    )
    send_samples: bool = Field(True, description="trackers get the texts of samples.jsonl too, as a table")


class ReferenceConfig(Section):
    """The frozen policy that methods with a reference compare with: the start, unless `path` names another."""

    cache: str | None = Field(
        None,
        description="folder for its log-probs of the data, found again by the content of weights, data and template "
        "(preference and offline methods)",
    )
    path: str | None = Field(
        None,
        description="folder or Hub id of another model of the same vocabulary, e.g. a behaviour-cloned policy (online)",
    )

    @model_validator(mode="after")
    def _something(self) -> ReferenceConfig:
        if self.cache is None and self.path is None:
            raise ValueError("give `cache` or `path`; without this section the start of the run is the reference")
        return self


class GuardsConfig(Section):
    """What ends a run that goes wrong."""

    skipped_updates: int = Field(
        3, ge=0, description="updates left out in a row, for a loss or gradient that is not finite, before stopping"
    )


class CriticConfig(Section):
    """The value model of methods that have one. It starts from the policy's backbone, with a head of zeros."""

    trunk: Literal["separate", "shared"] = Field(
        "separate", description="a backbone of its own, or a head on the policy's, which the value loss then trains too"
    )
    path: str | None = Field(
        None, description="start from this reward model, value model or language model instead (separate only)"
    )
    learning_rate: float | None = Field(None, gt=0, description="default: training.learning_rate")

    @model_validator(mode="after")
    def _own_backbone(self) -> CriticConfig:
        if self.trunk == "shared" and self.path is not None:
            raise ValueError("a shared trunk is the policy's own: leave out `path`, or set trunk: separate")
        return self


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
    verifier: list[AnyVerifier] | None = Field(
        None, min_length=1, description="what judges completions; several are summed by `weight`"
    )
    verifier_pool: VerifierPoolConfig = VerifierPoolConfig()
    rollouts: RolloutConfig | None = None
    environment: AnyEnvironment | None = Field(
        None, description="what rollouts act in over several turns, and what rewards them (tools: beside `verifier`)"
    )
    critic: CriticConfig | None = Field(None, description="value model; default: of its own, like the policy")
    evaluation: EvaluationConfig | None = None
    reference: ReferenceConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    guards: GuardsConfig = GuardsConfig()
    plugins: list[str] = Field(
        default_factory=list,
        description="files or modules of your own that register methods, tasks, metrics or callbacks (docs/plugins.md)",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch per rank; default: as torch chooses")
    output: str = Field(description="folder of the run")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the order of rows, the draws of rollouts and new weights")

    @property
    def new_tokens(self) -> int | None:
        """Most tokens that the policy writes in a rollout, over all its turns; None without rollouts."""
        if self.rollouts is None:
            return None
        return self.rollouts.max_new_tokens * (1 if self.environment is None else self.environment.max_turns)
