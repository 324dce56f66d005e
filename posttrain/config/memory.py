"""An estimate of the memory that one rank needs, before anything is loaded. Every term has its formula here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.config.adapters import trained_lora
from posttrain.config.needs import Needs
from posttrain.config.pictures import Part
from posttrain.config.schema import Recipe
from posttrain.config.shapes import ModelShape, model_shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

HEAD_TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Budget of the fused head for the logits of one tile; those of all tokens never exist together. On the CPU about its
last cache, for the tile alone; on a GPU for the tile and its float32 working copies, wide enough to fill it."""

HEAD_CACHE_BYTES = 64 * 2**20
"""Logits that the fused head keeps from the forward pass for the backward pass; tiles beyond are computed again."""

DIVERGENCE_CACHE_BYTES = 256 * 2**20
"""The same for gradients of a divergence over the vocabulary, where a tile that is not kept takes two products."""
WORKING_COPIES = 3
"""Float32 copies of a tile that the head holds on a GPU at once; the CPU goes over it a few rows at a time."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a run will need of memory, by part.

    Attributes:
        parameters: of the model; None if its shape is unknown.
        trainable: parameters that the optimizer updates.
        fixed: (term, bytes, formula) of what stays through the run.
        training: terms of the forward and backward pass of one micro-batch.
        sampling: terms of sampling; they and the training terms do not occur together.
        notes: assumptions, and why terms are missing.
    """

    parameters: int | None
    trainable: int | None
    fixed: list[tuple[str, int, str]]
    training: list[tuple[str, int, str]]
    sampling: list[tuple[str, int, str]]
    notes: list[str]

    @property
    def peak(self) -> int | None:
        """Bytes: what stays, and the larger of training and sampling; None if a term is missing."""
        if self.parameters is None or not self.training:
            return None
        return _sum(self.fixed) + max(_sum(self.training), _sum(self.sampling))


def _sum(terms: list[tuple[str, int, str]]) -> int:
    return sum(size for _, size, _ in terms)


def estimate_memory(
    recipe: Recipe, needs: Needs, *, sequence_tokens: int | None, sequences_per_rank: int, device: Device
) -> MemoryEstimate:
    """Estimate the memory of one rank, without sharding (plain DDP or one device). All sizes in bytes.

    N parameters of b bytes, with those that look at pictures, of which A are trained in a bytes each (LoRA adapters: 4
    bytes, else a = b); L layers,
    hidden size h, query width q, key width k, MLP width i, vocabulary V; c bytes of the compute type (2 under bf16
    autocast, else b). T tokens that the pass over a micro-batch computes, S of them scored:

    - rollouts: T = prompts * longest prompt + micro_batch * max_new_tokens, S = the second part. A prompt (with its
      prefix) is computed once for its completions (`models.shared_prefix`), and those of a prompt stay together
      (`models.collate.split`): prompts = micro_batch / samples_per_prompt, rounded up, and one more where the two do
      not divide. An attention implementation other than sdpa shares nothing, and expert rows have no prompt in common
    - preferences: T = S = 2 * micro_batch * longest sequence, for a chosen and a rejected response; what they share is
      not known before the data are
    - else T = S = micro_batch * longest sequence

    - weights: N*b, and A*4 for adapters
    - autocast copies: 2 * N, where bf16 autocast meets float32 weights
    - gradients: A*a
    - optimizer: 2*A*a for Adam (its two moments have the type of the weights), A*a for SGD and other one-moment ones
    - sampling policy: A*a if rollouts.sync_every is above 1
    - models that the method brings (`methods.companions`): N*b for one more frozen model, which is taken as large as
      the policy, A*a for a copy of the policy that lags behind it
    - critic: N*b and its gradients and optimizer, for methods with a value model on a backbone of its own
    - engine: N bytes of its type for the copy of a colocated vLLM
    - reference: N*b if a frozen copy is needed; 0 with LoRA, where the adapter is switched off instead,
      unless reference.path names another model
    - one layer's activations: T * (4*(4h + n) + c*(4h + 5q + 4i)), n = 2q + 2k for qwen3 (norms on q and k), that
      and 4h for gemma3 (four norms), else 0:
      the norms keep float32 copies and their outputs (under autocast two of them), attention its inputs and output with
      keys repeated to all heads, the MLP its four intermediate results. Attention keeps no T x T scores and needs no
      mask. On a GPU a shared prompt's keys and values are laid before those of every completion: micro_batch * longest
      sequence * 2q * c more
    - activations: all L layers; with gradient checkpointing L * T*h*b (their inputs) and one layer. Twice that for a
      critic on a backbone of its own
    - working space of the backward pass: T * c * (4i + 2h)
    - pictures, of P patches at most, as if all that the prompts hold were pictures, each once: P = merge * tokens that
      no row has written. For each patch a layer of a tower that is trained keeps `SightShape.kept` numbers of c bytes;
      of one that is not, and under gradient checkpointing, one layer is there at a time. The projector keeps what its
      linear modules read and give
    - head: a tile of logits, S*V*c or its budget (`HEAD_TILE_BYTES`), with float32 copies of it; if the head is trained
      also the kept tiles, S*V*c or `HEAD_CACHE_BYTES`, and V*h float32 for the gradient; S*3h float32. What a
      divergence over the vocabulary keeps, at most `DIVERGENCE_CACHE_BYTES`, is not counted
    - cache while sampling: rows * longest sequence * L * 2k * c, with rows = min(max_batch, sequences per rank)
    - logits while sampling: rows * V * 4 * 3

    Args:
        recipe: the recipe.
        needs: of the method.
        sequence_tokens: most tokens of one sequence; None if the recipe sets no limit.
        sequences_per_rank: sequences of one step on one rank.
        device: where it runs.
    """
    shape = model_shape(recipe.model)
    if shape is None:
        note = f"unknown shape of {recipe.model.path!r}, memory not estimated"
        return MemoryEstimate(None, None, [], [], [], [note])
    trainable = _trainable(recipe, shape)
    notes = ["per rank, without sharding; allocator and library overhead not included"]
    if sequence_tokens is None:
        notes.append("no length limit in the recipe, so activations are not estimated: set data.max_length")
        return MemoryEstimate(shape.whole, trainable, _fixed(recipe, needs, shape, trainable), [], [], notes)
    rollouts = recipe.rollouts if needs.generates else None
    rows = min(rollouts.max_batch, sequences_per_rank) if rollouts else 0
    if "preferences" in needs.data:
        notes.append("two responses per row are assumed, and no prompt that they share")
    if shape.sight is not None:
        notes.append("prompts full of pictures are assumed; up to 512 MiB of pictures are kept beside")
    return MemoryEstimate(
        shape.whole,
        trainable,
        _fixed(recipe, needs, shape, trainable),
        _training(recipe, needs, shape, _passed(recipe, needs, sequence_tokens), trainable, device),
        _sampling(recipe, shape, rows, sequence_tokens) if rows else [],
        notes,
    )


def _trainable(recipe: Recipe, shape: ModelShape) -> int:
    lora, trained = trained_lora(recipe.model), _parts(recipe)
    n, sight = 0, shape.sight
    if "language" in trained:
        n = shape.parameters if lora is None else shape.lora_parameters(lora.r, lora.target_modules)
    for part in trained:
        if sight is not None and part != "language":
            whole = sight.tower if part == "tower" else sight.projector
            n += whole if lora is None else sight.lora_parameters(part, lora.r, lora.target_modules)
    return n


def _parts(recipe: Recipe) -> list[Part]:
    return ["language"] if recipe.model.pictures is None else recipe.model.pictures.train


def _compute_bytes(recipe: Recipe) -> int:
    return 2 if recipe.training.bf16 else BYTES[recipe.model.dtype]


def _fixed(recipe: Recipe, needs: Needs, shape: ModelShape, trainable: int) -> list[tuple[str, int, str]]:
    width, lora = BYTES[recipe.model.dtype], recipe.model.adapted
    trained_width = 4 if lora else width
    count = f"{shape.whole:,}"
    terms = [("weights", shape.whole * width, f"{count} x {width}")]
    quantization = recipe.model.quantization
    if quantization is not None:
        small = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears.values())
        size = small * quantization.bits // 8 + (shape.parameters - small) * width
        terms = [("weights", size, f"{small:,} of {quantization.bits} bits, the others x {width}")]
    if lora:
        terms.append(("adapter", trainable * 4, f"{trainable:,} x 4"))
    if recipe.training.bf16 and width == 4:
        terms.append(("autocast copies", shape.whole * 2, f"{count} x 2"))
    terms.append(("gradients", trainable * trained_width, f"{trainable:,} x {trained_width}"))
    moments = 2 if "adam" in recipe.training.optim else 1
    size = trainable * trained_width * moments
    terms.append(("optimizer", size, f"{trainable:,} x {trained_width} x {moments} ({recipe.training.optim})"))
    if needs.rollouts and recipe.rollouts is not None and recipe.rollouts.sync_every > 1:
        terms.append(("sampling policy", trainable * trained_width, f"{trainable:,} x {trained_width}, sync_every > 1"))
    for one in needs.companions:
        if one.holds == "weights":
            terms.append((one.title, shape.whole * width, f"{count} x {width}, taken as large as the policy"))
        elif one.holds == "trained weights":
            terms.append((one.title, trainable * trained_width, f"{trainable:,} x {trained_width}"))
    terms += _critic(recipe, needs, shape, trainable)
    terms += _engine(recipe, needs, shape)
    if needs.reference and (not lora or (recipe.reference is not None and recipe.reference.path is not None)):
        terms.append(("reference", shape.whole * width, f"{count} x {width}"))
    return terms


def _engine(recipe: Recipe, needs: Needs, shape: ModelShape) -> list[tuple[str, int, str]]:
    """The copy of the weights that a colocated vLLM samples from; a server keeps it elsewhere."""
    rollouts = recipe.rollouts if needs.generates else None
    if rollouts is None or rollouts.engine != "vllm" or rollouts.mode != "colocate":
        return []
    width = BYTES[rollouts.vllm.dtype] if rollouts.vllm.dtype is not None else _compute_bytes(recipe)
    return [("engine", shape.whole * width, f"{shape.whole:,} x {width}, vLLM's copy")]


def _critic(recipe: Recipe, needs: Needs, shape: ModelShape, trainable: int) -> list[tuple[str, int, str]]:
    """A second model of the policy's size with gradients and optimizer; nothing worth a line with a shared trunk."""
    if not needs.critic or (recipe.critic is not None and recipe.critic.trunk == "shared"):
        return []
    width = BYTES[recipe.model.dtype]
    trained = trainable * (4 if recipe.model.adapted else width)
    moments = 2 if "adam" in recipe.training.optim else 1
    size = shape.whole * width + trained * (1 + moments)
    return [("critic", size, f"{shape.whole:,} x {width}, {trainable:,} trained x {1 + moments}")]


@dataclass(frozen=True, slots=True)
class _Pass:
    """Tokens of the pass over a micro-batch.

    Attributes:
        computed, scored: T and S of `estimate_memory`.
        unshared: as if nothing were shared; equal to `computed` where nothing is.
        given: that may be pictures: of prompts, and of rows whose own part is not known.
    """

    computed: int
    scored: int
    unshared: int
    given: int


def _passed(recipe: Recipe, needs: Needs, longest: int) -> _Pass:
    rows, rollouts = recipe.batch.micro_batch, recipe.rollouts
    responses = 2 if "preferences" in needs.data else 1
    tokens = rows * longest * responses
    shares = recipe.model.attn_implementation in (None, "sdpa", "flex_attention") and not needs.expert_rows
    if not needs.rollouts or rollouts is None:
        return _Pass(tokens, tokens, tokens, rows * longest)
    # Observations stand between the actions of an episode, so all of it but its beginning is its own.
    group, new = rollouts.samples_per_prompt, longest if recipe.environment else min(rollouts.max_new_tokens, longest)
    prompts = min(-(-rows // group) + (1 if rows % group and group % rows else 0), rows)
    given = rows * longest if recipe.environment else prompts * (longest - new)
    if not shares:
        return _Pass(tokens, tokens, tokens, given)
    return _Pass(prompts * (longest - new) + rows * new, rows * new, tokens, given)


def _training(
    recipe: Recipe, needs: Needs, shape: ModelShape, passed: _Pass, trainable: int, device: Device
) -> list[tuple[str, int, str]]:
    hidden, query, inner, tokens = shape.hidden_size, shape.query_size, shape.intermediate_size, passed.computed
    compute, width = _compute_bytes(recipe), BYTES[recipe.model.dtype]
    head_norms = 2 * query + 2 * shape.kv_size if shape.architecture in ("qwen3", "gemma3") else 0
    norms = (8 if shape.architecture == "gemma3" else 4) * hidden + head_norms
    per_layer = tokens * (4 * norms + compute * (4 * hidden + 5 * query + 4 * inner))
    copies = recipe.model.attn_implementation != "flex_attention"  # of the keys and values of shared prompts
    if device == "cuda" and copies and passed.unshared > tokens:
        per_layer += passed.unshared * 2 * query * compute
    of = f"{tokens:,} tokens" if passed.unshared == tokens else f"{tokens:,} tokens, {passed.unshared:,} unshared"
    if recipe.training.gradient_checkpointing:
        kept = shape.layers * tokens * hidden * width + per_layer
        how = f"checkpointed: inputs of {shape.layers} layers and one layer, {of}"
    else:
        kept, how = shape.layers * per_layer, f"{shape.layers} layers, {of}"
    if needs.critic and not (recipe.critic is not None and recipe.critic.trunk == "shared"):
        kept, how = 2 * kept, f"{how}; policy and critic"
    trained = "language" in _parts(recipe) and not recipe.model.adapted
    return [
        ("activations", kept, how),
        *_looking(recipe, shape, passed.given, compute),
        ("backward workspace", tokens * compute * (4 * inner + 2 * hidden), "one layer's gradients"),
        _head(shape, passed.scored, compute, device, trained=trained),
    ]


def _looking(recipe: Recipe, shape: ModelShape, given: int, compute: int) -> list[tuple[str, int, str]]:
    sight, trained = shape.sight, _parts(recipe)
    if sight is None:
        return []
    patches = given * sight.merge
    whole = "tower" in trained and not recipe.training.gradient_checkpointing
    layers, how = (sight.layers, f"{sight.layers} layers") if whole else (1, "one layer at a time")
    size = layers * patches * sight.kept * compute
    if "tower" in trained and not whole:
        size += sight.layers * patches * sight.hidden_size * compute
    if set(trained) & {"tower", "projector"}:
        size += given * sum(inputs + outputs for _, inputs, outputs in sight.projector_linears) * compute
    return [("pictures", size, f"{how}, up to {patches:,} patches")]


def _head(shape: ModelShape, scored: int, compute: int, device: Device, *, trained: bool) -> tuple[str, int, str]:
    logits = scored * shape.vocab_size * compute
    if device == "cuda":
        tile = min(scored * shape.vocab_size * (compute + WORKING_COPIES * 4), HEAD_TILE_BYTES[device])
    else:
        tile = min(logits, HEAD_TILE_BYTES[device]) * (1 if compute == 4 else 3)  # a float32 one beside it
    size = tile + scored * 3 * shape.hidden_size * 4
    if trained:
        size += min(logits, HEAD_CACHE_BYTES) + shape.vocab_size * shape.hidden_size * 4
    kept = ", kept tiles, gradient of the head" if trained else ""
    return "head", size, f"a tile of logits of {gibibytes(tile)}, {scored:,} scored tokens{kept}"


def _sampling(recipe: Recipe, shape: ModelShape, rows: int, sequence_tokens: int) -> list[tuple[str, int, str]]:
    compute = _compute_bytes(recipe)
    cache = rows * sequence_tokens * shape.layers * 2 * shape.kv_size * compute
    return [
        ("KV cache", cache, f"{rows} sequences of {sequence_tokens} tokens, {shape.layers} layers"),
        ("sampling logits", rows * shape.vocab_size * 4 * 3, f"{rows} sequences x {shape.vocab_size:,} x 4 x 3"),
    ]


def gibibytes(size: int) -> str:
    """Bytes as text: `1.84 GiB`, `312 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
