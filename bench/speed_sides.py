"""The two sides of `train_speed.py`: a step by stock TRL and by posttrain, on equal weights and rows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from common import PAD, long_tailed, random_like, random_rows, tokenizer, twin
from datasets import Dataset
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from posttrain.config.schema import FileSource
from posttrain.data.preferences import usable
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Sample
from posttrain.data.sources import preferences
from posttrain.methods import METHODS
from posttrain.models.collate import collate
from posttrain.models.token_logps import prepare, token_logps
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine

RAGGED = -1
"""In place of a completion length: long-tailed lengths up to 256."""

MU = 0.1
"""Weight of the expert rows in the mix."""

Losses = Sequence[Callable[[], Tensor]]
"""The losses of a step, one per micro-batch; each is followed by its backward pass."""


@dataclass(frozen=True)
class Workload:
    """A step: what is computed, on how many prompts (for pairs: rows), completions per prompt and tokens of each.

    Attributes:
        experts: rows with a prompt of their own beside the rollouts, in a micro-batch of their own.
        cuts: places at which each of two traces of a problem is cut, for rollouts that go on from there.
        ranks: processes that share the prompts, in micro-batches of one prompt; None for one micro-batch of all.
        rank: number of this one.
        read: rows of a file in place of random ones; `prompt` and `completion` are not looked at then.
    """

    kind: str
    prompts: int
    group: int
    prompt: int
    completion: int
    experts: int = 0
    cuts: tuple[int, ...] = ()
    ranks: int | None = None
    rank: int = 0
    read: tuple[Sample, ...] = ()

    def rows(self, vocab: int) -> list[Sample]:
        """The rollouts or responses, those of a prompt side by side."""
        if self.read:
            return list(self.read)
        n = self.prompts * self.group
        lengths = long_tailed(n, 256) if self.completion == RAGGED else [self.completion]
        return random_rows(vocab, self.prompts, self.group, self.prompt, lengths)

    def micro_batches(self, rows: list[Sample]) -> list[tuple[list[Sample], Tensor]]:
        """This rank's rows and their advantages."""
        advantages = _advantages(len(rows))
        if self.ranks is None:
            return [(rows, advantages)]
        share = self.prompts // self.ranks
        prompts = range(self.rank * share, (self.rank + 1) * share)
        places = [slice(prompt * self.group, (prompt + 1) * self.group) for prompt in prompts]
        return [(rows[place], advantages[place]) for place in places]

    def contexts(self, vocab: int) -> list[list[int]]:
        """What rollouts go on from: prompts, or with `cuts` each prompt with several beginnings of its traces."""
        traces = 2 if self.cuts else 1
        rows = random_rows(vocab, self.prompts, traces, self.prompt, [max(self.cuts, default=0)])
        return [row.ids[: self.prompt + cut] for row in rows for cut in self.cuts or (0,)]

    def expert_rows(self, vocab: int) -> list[Sample]:
        return random_rows(vocab, self.experts, 1, self.prompt, [self.completion], seed=3)


@dataclass
class Sides:
    """A step of either side, and the models whose gradients they leave.

    Attributes:
        greedy: for rollouts, what each side generates greedily in float64.
    """

    steps: dict[str, Callable[[], Tensor]]
    models: dict[str, PreTrainedModel]
    greedy: dict[str, Callable[[], list[list[int]]]] = field(default_factory=dict)


def read_pairs(file: Path, number: int, model: Path) -> tuple[Sample, ...]:
    """The first usable pairs of a file, spread evenly over it, as the preference shell renders them for a model."""
    loaded = AutoTokenizer.from_pretrained(model)
    renderer, method = Renderer(loaded), METHODS["dpo"](METHODS["dpo"].Config())
    pairs, _ = usable(preferences(FileSource(path=str(file)), "pairs"))
    responses = [method.responses(pair, renderer) for pair in pairs[:: len(pairs) // number][:number]]
    return tuple(row[role] for row in responses for role in ("chosen", "rejected"))


def build(
    model: PreTrainedModel, workload: Workload, *, bf16: bool, checkpointing: bool, only: str | None = None
) -> Sides:
    """Both sides on equal weights and rows, or one of them alone."""
    if workload.kind == "rollout":
        return _rollouts(model, workload, only)
    rows = workload.rows(model.vocab_size)
    makers = {
        "trl": {"policy": trl_policy, "reference": trl_reference, "dpo": trl_dpo, "simpo": trl_simpo, "mix": trl_mix},
        "ours": {
            "policy": our_policy,
            "reference": our_reference,
            "dpo": our_pairs,
            "simpo": our_pairs,
            "mix": our_mix,
        },
    }
    sides = Sides({}, {})
    for side in ("trl", "ours") if only is None else (only,):
        own = twin(model)
        if checkpointing:
            own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        own.train()
        losses = makers[side][workload.kind](own, workload, rows, bf16)
        sides.steps[side] = losses[0] if workload.kind == "reference" else _with_backward(own, losses)
        sides.models[side] = own
    return sides


def _with_backward(model: PreTrainedModel, losses: Losses) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        total = torch.zeros(())
        for loss in losses:
            value = loss()
            value.backward()
            total += value.detach()
        return total

    return step


def _on_ranks(model: PreTrainedModel, workload: Workload) -> torch.nn.Module:
    """The model as a trainer wraps it: gradients are averaged over the ranks."""
    return DistributedDataParallel(model) if workload.ranks not in (None, 1) else model


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
    generations = max(workload.group, 2)
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


def _grpo_inputs(workload: Workload, rows: list[Sample], advantages: Tensor) -> dict[str, Tensor]:
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
        "advantages": advantages,
        "num_items_in_batch": masks.sum(),
    }


def trl_policy(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    parts = workload.micro_batches(rows)
    trainer = _grpo_trainer(model, workload, len(parts[0][0]), bf16)
    trainer.current_gradient_accumulation_steps = len(parts)
    policy = _on_ranks(model, workload)

    def loss_of(inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with trainer.compute_loss_context_manager():
                return trainer._compute_loss(policy, inputs)

        return loss

    return [loss_of(_grpo_inputs(workload, *part)) for part in parts]


def trl_reference(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    from trl.trainer.utils import add_fused_lm_head

    trainer = _grpo_trainer(twin(model), workload, len(rows), bf16)
    inputs = _grpo_inputs(workload, rows, _advantages(len(rows)))
    add_fused_lm_head(model.eval())  # as for its reference: log-probs only
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

    @torch.no_grad()
    def step() -> Tensor:
        with trainer.compute_loss_context_manager():
            arguments = (model, ids, attention, inputs["completion_ids"].size(1))
            logps = trainer._get_per_token_logps_and_entropies(*arguments)[0]
        return (logps * inputs["completion_mask"]).sum()

    return [step]


def trl_dpo(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer = DPOTrainer(
        model=model,
        ref_model=random_like(model.config, seed=7),
        args=DPOConfig(**_arguments(bf16, workload.prompts), max_length=None),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    examples = []
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        start = chosen.loss_mask.index(1)
        examples.append(
            {"prompt_ids": chosen.ids[:start], "chosen_ids": chosen.ids[start:], "rejected_ids": rejected.ids[start:]}
        )
    inputs = DataCollatorForPreference(pad_token_id=PAD)(examples)

    def loss() -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer._compute_loss(model, inputs, False)

    return [loss]


def trl_simpo(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
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

    return [loss]


def trl_mix(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    """What TRL's users combine: the loss of its GRPOTrainer on rollouts, and that of its SFTTrainer on expert rows."""
    from trl import SFTConfig, SFTTrainer

    (policy,) = trl_policy(model, workload, rows, bf16)
    # Each trainer gives its model a head of its own; the second model has the parameters of the first.
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    trainer = SFTTrainer(
        model=shared,
        args=SFTConfig(**_arguments(bf16, workload.experts), max_length=None),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "completion": "2"}] * 8),
        processing_class=tokenizer(),
    )
    tensors = collate(workload.expert_rows(model.vocab_size), PAD)
    labels = tensors["ids"].masked_fill(tensors["mask"] == 0, -100)

    def expert() -> Tensor:
        inputs = {"input_ids": tensors["ids"], "attention_mask": tensors["attention_mask"], "labels": labels}
        with trainer.compute_loss_context_manager():
            return MU * trainer.compute_loss(shared, inputs)

    return [lambda: (1 - MU) * policy(), expert]


def trl_generation(model: PreTrainedModel, contexts: list[list[int]], group: int, new: int, *, greedy: bool) -> Any:
    """What its GRPOTrainer calls: transformers' generate over left-padded prompts, repeated for each completion."""
    settings = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(max_new_tokens=new, pad_token_id=PAD, eos_token_id=None, disable_compile=True, **settings)
    rows = [torch.tensor(context) for context in contexts for _ in range(group)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")
    masks = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=0, padding_side="left")
    model.generation_config.eos_token_id = None
    model.eval()

    @torch.no_grad()
    def generate() -> list[list[int]]:
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.size(1) :].tolist()

    return generate


# ----------------------------------------------------------------------------------------------------------------- ours


def _autocast(bf16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def _advantages(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(2))


def our_policy(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    method, parts = METHODS["grpo"](METHODS["grpo"].Config()), workload.micro_batches(rows)
    prepare(model)
    policy = _on_ranks(model, workload)

    def loss_of(own: list[Sample], advantages: Tensor) -> Callable[[], Tensor]:
        tensors = collate(own, PAD)

        def loss() -> Tensor:
            with _autocast(bf16):
                found = token_logps(policy, tensors["ids"], tensors["attention_mask"], tensors["mask"], entropy=True)
            batch = TokenBatch(tensors["mask"], found.logps, found.entropies, advantages=advantages)
            return sum(part.value / (part.count * len(parts)) for part in method.loss(batch).values())

        return loss

    return [loss_of(*part) for part in parts]


def our_reference(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    tensors = collate(rows, PAD)
    prepare(model.eval())

    @torch.no_grad()
    def step() -> Tensor:
        with _autocast(bf16):
            return token_logps(model, tensors["ids"], tensors["attention_mask"], tensors["mask"]).logps.sum()

    return [step]


def our_pairs(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    """DPO with its reference pass, as TRL does it in every step, or SimPO, which has none."""
    parameters = {"dpo": {}, "simpo": {"beta": 2.0, "gamma": 1.0}}[workload.kind]
    method = METHODS[workload.kind](METHODS[workload.kind].Config(**parameters))
    tensors = collate([*rows[::2], *rows[1::2]], PAD)
    inputs = tensors["ids"], tensors["attention_mask"], tensors["mask"]
    prepare(model)
    reference = None
    if method.needs.reference:
        reference = random_like(model.config, seed=7).eval()
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

    return [loss]


def our_mix(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    """CHORD with a fixed weight and plain likelihood of the expert's tokens."""
    parameters = {"phi": "none", "mu_valley": MU, "aggregation": "sequences", "dual_clip": None}
    method, advantages = METHODS["chord"](METHODS["chord"].Config(**parameters)), _advantages(len(rows))
    experts = workload.expert_rows(model.vocab_size)
    prepare(model)

    def loss_of(samples: list[Sample], values: Tensor, term: str) -> Callable[[], Tensor]:
        tensors = collate(samples, PAD)
        expert = torch.full((len(samples),), term == "expert")

        def loss() -> Tensor:
            with _autocast(bf16):
                found = token_logps(
                    model, tensors["ids"], tensors["attention_mask"], tensors["mask"], entropy=True, top1=False
                )
            batch = TokenBatch(tensors["mask"], found.logps, found.entropies, advantages=values, expert=expert)
            part = method.loss(batch)[term]
            return part.value / part.count

        return loss

    return [loss_of(rows, advantages, "policy"), loss_of(experts, torch.zeros(len(experts)), "expert")]


def our_generation(model: PreTrainedModel, contexts: list[list[int]], group: int, new: int, *, greedy: bool) -> Any:
    """As the `online` shell samples; log-probs come with the tokens."""
    prepare(model)
    engine = TransformersEngine(model, stop_ids=[], pad_id=PAD, max_batch=256)
    sampling = Sampling(group, new, greedy=greedy)
    return lambda: [one.ids for own in engine.generate(contexts, sampling) for one in own]


# ------------------------------------------------------------------------------------------------------------- rollouts


def _rollouts(model: PreTrainedModel, workload: Workload, only: str | None) -> Sides:
    """A generation window: all completions at once, each of the full length."""
    contexts, sides = workload.contexts(model.vocab_size), Sides({}, {})
    for side, generation in (("trl", trl_generation), ("ours", our_generation)):
        if only not in (None, side):
            continue
        sides.models[side] = own = twin(model)
        sampled = generation(own, contexts, workload.group, workload.completion, greedy=False)
        sides.steps[side] = _counted(sampled, len(contexts) * workload.group * workload.completion)
        if only is None:
            exact = twin(model).double()
            sides.greedy[side] = generation(exact, contexts, 1, workload.completion, greedy=True)
    return sides


def _counted(generate: Callable[[], list[list[int]]], expected: int) -> Callable[[], Tensor]:
    """Number of tokens, which both sides must have sampled to be compared."""

    def step() -> Tensor:
        tokens = sum(map(len, generate()))
        if tokens != expected:
            raise RuntimeError(f"{tokens} tokens sampled, not {expected}")
        return torch.tensor(float(tokens))

    return step
