"""Value models: what a state (prompt and completion so far) is worth, one number per token and value head.

A value model is a sequence classifier with one output per value head: a backbone and a linear layer without bias. Most
have one head; of several each values rollouts of one kind (`of_heads`). Saved, it is an ordinary Hugging Face folder,
and a trained reward model can be the start of one. In training it is a part of the policy module (`attach`), so that
one forward pass gives log-probs and values, shared prompts are computed once for both, and whatever wraps the policy
(DDP, DeepSpeed, PEFT) wraps the critic with it. The policy's own files leave it out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.models.adapters import adapted_name, plain_name
from posttrain.models.heads import Head, Heads
from posttrain.models.loading import load_classifier
from posttrain.models.outline import without_memory
from posttrain.models.sharing import EYES, follow_layouts, sharing_obstacle
from posttrain.models.start_files import load_config
from posttrain.models.token_logps import prepare, token_values
from posttrain.models.value_proof import prove_values

NAME = "critic"
"""Name of the critic within the policy module."""

FILE = "critic.safetensors"
"""The critic's tensors within a checkpoint, by their names in `Critic`."""


class Critic(nn.Module):
    """The value model of a run.

    Args:
        classifier: of the policy's family or another with the same vocabulary.
        separate: whether it has a backbone of its own; else `classifier` gives the head only, which sits on the
            policy's.
    """

    def __init__(self, classifier: PreTrainedModel, *, separate: bool) -> None:
        super().__init__()
        self.separate = separate
        self.shares = True
        self.config = classifier.config
        self.architecture, self.prefix = type(classifier).__name__, classifier.base_model_prefix
        if separate:
            self.shares = sharing_obstacle(classifier) is None
            if self.shares:
                follow_layouts(classifier)
            self.backbone = classifier.base_model
        head = head_of(classifier)
        prove_values(classifier, head)
        head = Head(head) if head.out_features == 1 else Heads(head)
        self.head = head.to(torch.promote_types(head.weight.dtype, torch.float32))

    def forward(self, arguments: Mapping[str, Any], places: Tensor, hidden: Tensor | None) -> Tensor:
        """(N,) values of the states at `places` of a pass; (heads, N) with several heads.

        Args:
            arguments: of the backbone's forward.
            places: (N,) in the flattened pass.
            hidden: (N, H) of the policy there; read by a shared trunk only.
        """
        if self.separate:
            hidden = self.backbone(**arguments).last_hidden_state.flatten(0, 1)[places]
        values = self.head(hidden)
        return values if isinstance(self.head, Heads) else values.squeeze(-1)

    def add_adapter(self, config: LoraConfig) -> None:
        """Train low-rank adapters of the backbone, and the head as a whole.

        The adapters are in float32 whatever the backbone is in, as PEFT makes those of the policy: it would raise these
        too when it loads the policy's from a checkpoint, and a resumed run would be another.
        """
        if self.separate:
            self.backbone.requires_grad_(False)
            inject_adapter_in_model(config, self.backbone)
            for name, parameter in self.backbone.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def of_heads(values: Tensor, heads: Tensor) -> Tensor:
    """(B, T): of values (heads, B, T) those of the head that `heads` (B,) names for each row."""
    return values.gather(0, heads.view(1, -1, 1).expand(1, *values.shape[1:])).squeeze(0)


def head_of(classifier: PreTrainedModel) -> nn.Linear:
    """The output layer of a sequence classifier, without bias.

    Raises:
        ModelError: it has another kind of head.
    """
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(
            f"classifiers of type {classifier.config.model_type!r} have no linear head without bias",
            where="critic.path",
            hint="use a decoder family such as llama, qwen2, qwen3, mistral, gemma",
        )
    return head


def value_model(policy: PreTrainedModel, *, pad_token_id: int, heads: int = 1) -> PreTrainedModel:
    """A value model that starts as a copy of the policy's backbone, with heads of zeros: all values are 0."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.pad_token_id = heads, pad_token_id
    config.get_text_config().pad_token_id = pad_token_id
    make = AutoModelForSequenceClassification.from_config
    if hasattr(policy, EYES):
        from posttrain.models.picture_classifier import classifier_class

        make = classifier_class(config)._from_config
    with torch.random.fork_rng(devices=[]), without_memory():
        model = make(config, dtype=policy.dtype)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    nn.init.zeros_(head_of(model).weight)
    if hasattr(policy, EYES):
        from posttrain.models.eyes import open_alike

        open_alike(model, policy)
    return model.to(policy.device)


def load_value_model(
    path: str, *, like: ModelConfig, vocabulary: int, heads: int = 1, where: str = "critic.path"
) -> PreTrainedModel:
    """A value model from a folder or the Hub: a classifier keeps its heads, a language model gets some of zeros.

    Args:
        like: dtype, attention and trust are taken from here.
        vocabulary: number of embeddings of the policy.
        heads: number of value heads.

    Raises:
        ModelError: it cannot be loaded, or has another number of heads or another vocabulary.
    """
    config = like.of_folder(path)
    try:
        model, _ = load_classifier(config, seed=0, outputs=heads)
    except ModelError as error:
        raise ModelError(error.what, where=where, hint=error.hint) from error
    if model.get_input_embeddings().num_embeddings != vocabulary:
        raise ModelError(
            f"{path!r} has {model.get_input_embeddings().num_embeddings} embeddings and the policy {vocabulary}",
            where=where,
            hint="a value model reads the policy's tokens: take one with the same tokenizer",
        )
    known = load_config(like.model_copy(update={"path": path, "revision": None})).architectures or ()
    if not any("SequenceClassification" in name for name in known):
        nn.init.zeros_(head_of(model).weight)
    return model


def attach(policy: PreTrainedModel, critic: Critic) -> None:
    """Make the critic a part of the policy; `token_logps.token_values` then gives its values."""
    policy.add_module(NAME, critic)


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a policy with a critic, as (policy's, critic's by their names in `Critic`)."""
    policy: dict[str, Tensor] = {}
    critic: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, found, after = f".{name}".partition(f".{NAME}.")
        (critic if found else policy)[after if found else before[1:]] = tensor
    return policy, critic


def save_value_model(
    critic: Critic, state: Mapping[str, Tensor], policy: Mapping[str, Tensor], folder: Path, *, dtype: torch.dtype
) -> None:
    """Write the value model as a Hugging Face folder, adapters merged. The folder is there.

    Args:
        critic: says what the tensors are; its own may be sharded.
        state: its tensors, from `split_state`.
        policy: tensors of the trained policy by their names in memory; its backbone is the value model's where the
            trunk is shared.
        folder: to write into.
        dtype: of the saved backbone; the head keeps its digits.
    """
    if critic.separate:
        backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
        backbone = _merged(backbone, critic.backbone)
    else:
        start = f"{critic.prefix}."
        backbone = {name.removeprefix(start): t for name, t in policy.items() if name.startswith(start)}
    # Written by hand, because to build a model is a matter of all ranks where DeepSpeed shards weights.
    found = {
        f"{critic.prefix}.{name}": tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in backbone.items()
    }
    found["score.weight"] = state["head.weight"]
    config = copy.deepcopy(critic.config)
    config.architectures, config.dtype = [critic.architecture], dtype
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _merged(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The backbone's weights with its adapters added."""
    merged = {plain_name(name): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, layer in backbone.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (state[f"{name}.lora_{side}.default.weight"].float() for side in "AB")
            target = adapted_name(name, layer)
            weight = merged[target].float()
            if weight.dim() == 3:  # experts, in PEFT's order: (experts rank, in) and (out, rank experts)
                down, up = down.unflatten(0, (len(weight), -1)), up.unflatten(1, (-1, len(weight)))
                last = "io" if getattr(layer.get_base_layer(), "is_transposed", False) else "oi"
                delta = torch.einsum(f"ore,eri->e{last}", up, down)
            else:
                delta = (up @ down).T if layer.fan_in_fan_out else up @ down
            merged[target] = (weight + layer.scaling["default"] * delta).to(merged[target].dtype)
    return merged


class ValueScorer:
    """Values of token sequences after their last token, for search at test time.

    Args:
        model: a value model, from `load_value_model`.
        pad_id: any id of the vocabulary.
        max_batch: sequences per forward pass.
    """

    def __init__(self, model: PreTrainedModel, *, pad_id: int, max_batch: int = 256) -> None:
        self.pad_id, self.max_batch = pad_id, max_batch
        critic = Critic(model, separate=True).eval()
        prepare(model)
        attach(model, critic)
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One value per row of token ids."""
        found: list[float] = []
        for start in range(0, len(rows), self.max_batch):
            chunk = rows[start : start + self.max_batch]
            # One more token, whose value is that of the state before it.
            width = max(map(len, chunk)) + 1
            ids = torch.full((len(chunk), width), self.pad_id)
            mask, attending = torch.zeros(len(chunk), width), torch.zeros(len(chunk), width, dtype=torch.long)
            for row, tokens in enumerate(chunk):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                attending[row, : len(tokens) + 1] = 1
                mask[row, len(tokens)] = 1
            device = self.model.device
            values = token_values(self.model, ids.to(device), attending.to(device), mask.to(device))
            found += values.sum(dim=1).tolist()
        return found
