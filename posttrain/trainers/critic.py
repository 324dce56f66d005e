"""The critic in a run: built and put into the policy module, read from checkpoints, left beside the trained model; and
what an actor-critic method makes of rewards and values before it trains on a rollout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module
from transformers import PreTrainedModel

from posttrain.config.needs import Needs
from posttrain.config.schema import CriticConfig, Recipe
from posttrain.errors import NeedsError
from posttrain.methods.base import ActorCriticMethod, Regression
from posttrain.methods.companions import ValueHeads
from posttrain.models.adapters import adapter_to_train, continued, for_model
from posttrain.models.collate import Tensors, actions, token_batch
from posttrain.models.loading import load_policy
from posttrain.models.saving import SavePlan
from posttrain.models.value import FILE, Critic, attach, load_value_model, save_value_model, value_model
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.returns import explained_variance, moments, whiten
from posttrain.rollouts.weight_sync import whole_tensors
from posttrain.safe_files import folder_atomic
from posttrain.tracking.metrics import Add

if TYPE_CHECKING:
    from posttrain.trainers.shell import Shell


def build_critic(recipe: Recipe, needs: Needs, model: PreTrainedModel, *, pad_id: int) -> Critic:
    """The recipe's critic. Call before an adapter is put into the policy.

    Raises:
        ModelError: `critic.path` cannot be loaded or does not fit the policy.
        NeedsError: the method needs a trained critic and there is no `critic.path`.
    """
    config, several = recipe.critic or CriticConfig(), needs.companion(ValueHeads)
    heads = 1 if several is None else several.number
    if needs.trains == "policy" and config.path is None:
        raise NeedsError(
            "this method takes a trained critic and none is named",
            where="critic.path",
            hint="add, for example:\n    critic:\n      path: runs/critic/critic",
        )
    if config.path is None:
        if continued(recipe.model) is not None:  # it begins as the policy, which has an adapter already
            merged = {"adapter": recipe.model.adapter.model_copy(update={"mode": "merge"})}
            policy, _ = load_policy(recipe.model.model_copy(update=merged), seed=recipe.seed)
            model = policy.to(model.device)
        classifier = value_model(model, pad_token_id=pad_id, heads=heads)
    else:
        vocabulary = model.get_input_embeddings().num_embeddings
        further = {"vocabulary": vocabulary, "heads": heads}
        classifier = load_value_model(config.path, like=recipe.model, **further).to(model.device)
    critic = Critic(classifier, separate=config.trunk == "separate")
    if needs.trains == "policy":
        critic.requires_grad_(False)
    elif recipe.model.adapted:
        adapter = for_model(adapter_to_train(recipe.model), classifier)
        if adapter.use_dora or adapter.modules_to_save or adapter.bias != "none":
            raise NeedsError("the critic's adapter has no DoRA, modules_to_save or bias", where="model.adapter")
        start = f"{critic.prefix}."  # PEFT writes whole names, and the critic's backbone stands by itself
        if not isinstance(adapter.target_modules, str):
            adapter.target_modules = {name.removeprefix(start) for name in adapter.target_modules}
        if recipe.model.pictures is not None:
            from posttrain.models.eyes import frozen_modules

            blind = [name.removeprefix(start) for name in frozen_modules(classifier, recipe.model.pictures.train)]
            adapter.exclude_modules = [*(adapter.exclude_modules or ()), *blind]
        with torch.random.fork_rng(devices=[]):  # the same adapter whatever this process has drawn before
            torch.manual_seed(recipe.seed)
            critic.add_adapter(adapter)
    return critic.train()


def add_critic(recipe: Recipe, needs: Needs, shell: Shell, critic: Critic) -> None:
    """Make it a part of the shell's policy, before anything wraps that for several ranks."""
    if needs.trains == "critic":
        shell.model.requires_grad_(False)
    attach(base_of(shell.model), critic.to(shell.model.device))
    config = recipe.critic or CriticConfig()
    shell.critic_learning_rate = config.learning_rate or shell.args.learning_rate


def base_of(model: Module) -> PreTrainedModel:
    """The policy itself, without an adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_critic(shell: Shell, folder: Path) -> None:
    """Write the critic into a checkpoint that is being filled, where nobody else does: of a run with an adapter FSDP2's
    own files hold the adapter alone. Called on all ranks."""
    policy = shell.accelerator.unwrap_model(shell.model)
    if not (shell.method.needs.critic and shell.is_fsdp_enabled and isinstance(policy, PeftModel)):
        return
    state = {name: tensor.cpu().contiguous() for name, tensor in whole_tensors(base_of(policy).critic)}
    if shell.accelerator.is_main_process:
        save_file(state, folder / FILE)


@torch.no_grad()
def load_critic(shell: Shell, checkpoint: Path) -> None:
    """Put the critic of a checkpoint into the policy, where it has a file of its own. Called on all ranks."""
    if not (checkpoint / FILE).is_file():
        return
    critic = base_of(shell.accelerator.unwrap_model(shell.model)).critic
    state = load_file(checkpoint / FILE)
    for name, tensor in critic.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor):  # FSDP2's, of which every rank takes its part
            state[name] = distribute_tensor(state[name].to(tensor.device), tensor.device_mesh, tensor.placements)
    critic.load_state_dict(state)


def take_critic(shell: Shell) -> Critic:
    """The critic, taken out of the policy, so that what is saved or merged next is the policy alone."""
    policy = base_of(shell.accelerator.unwrap_model(shell.model))
    critic = policy.critic
    del policy.critic
    return critic


def leave_critic(
    critic: Critic, state: Mapping[str, Tensor], policy: Mapping[str, Tensor], folder: Path, plan: SavePlan
) -> None:
    """Write the trained value model as a folder of its own; call on the main rank.

    Args:
        critic: that of the run.
        state: its whole tensors.
        policy: whole tensors of the trained policy.
        folder: of the value model.
        plan: of the policy: type and tokenizer.
    """
    with folder_atomic(folder) as beside:
        save_value_model(critic, state, policy, beside, dtype=getattr(torch, plan.dtype))
        plan.tokenizer.save_pretrained(beside)
        plan.write_processor(beside)


def weigh(method: ActorCriticMethod, batches: Sequence[Tensors], add: Add, *, main: bool) -> None:
    """Turn the rewards in the micro-batches of a rollout into advantages and returns per token.

    Args:
        batches: this rank's; with rewards of whole completions as `advantages`, and `old_values`.
        add: adds (name, sum, count) to the means of the log entry.
        main: whether this rank logs.
    """
    views = [token_batch(tensors) for tensors in batches]
    rewards = [method.token_rewards(view) for view in views]
    if method.whitens_rewards:
        of = _over_ranks([moments(each, view.mask) for each, view in zip(rewards, views, strict=True)])
        # Their mean stays: the sign of a reward means something.
        rewards = [whiten(each, view.mask, of, shift=False) for each, view in zip(rewards, views, strict=True)]
    found = [method.estimate(view, each) for view, each in zip(views, rewards, strict=True)]
    acted = [actions(tensors) for tensors in batches]
    advantages = _over_ranks([moments(e.advantages, mask) for e, mask in zip(found, acted, strict=True)])
    explained = _explained_variance(
        (e.returns, tensors["old_values"], _value_masks(method, view))
        for e, tensors, view in zip(found, batches, views, strict=True)
    )
    for tensors, estimates, mask in zip(batches, found, acted, strict=True):
        tensors["advantages"], tensors["returns"] = estimates.advantages, estimates.returns
        if method.whitens:
            tensors["advantages"] = whiten(estimates.advantages, mask, advantages)
    if main:
        add("critic/explained_variance", explained, 1)
    kls = [
        moments(e.kl, tensors["mask"].amax(dim=1))
        for e, tensors in zip(found, batches, strict=True)
        if e.kl is not None
    ]
    if kls:
        n, total, _ = _over_ranks(kls).tolist()
        if main:
            add("kl_reward", total, n)
        method.settle(total / max(n, 1.0), int(n))


def fitted(regressions: Sequence[Regression], add: Add, *, main: bool) -> None:
    """Record how well the critic fits its targets in the micro-batches of a step; on all ranks.

    Args: as in `weigh`.
    """
    explained = _explained_variance((each.targets, each.values, [each.mask]) for each in regressions)
    if main:
        add("critic/explained_variance", explained, 1)


def _value_masks(method: ActorCriticMethod, batch: TokenBatch) -> list[Tensor]:
    """(B, T) for each of the critic's heads: the tokens whose states it learns."""
    mask, heads = method.value_mask(batch), method.needs.companion(ValueHeads)
    if heads is None or heads.of_rows is None:
        return [mask]
    of_rows = heads.of_rows(batch).unsqueeze(1)
    return [mask & (of_rows == head) for head in range(heads.number)]


def _explained_variance(parts: Iterable[tuple[Tensor, Tensor, list[Tensor]]]) -> float:
    """Over all ranks, of (targets, values, masks of the heads) of each micro-batch."""
    sums = [
        torch.stack([torch.stack([moments(targets - values, mask), moments(targets, mask)]) for mask in masks])
        for targets, values, masks in parts
    ]
    residuals, targets = _over_ranks(sums).unbind(1)
    return float(explained_variance(residuals, targets))


def _over_ranks(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all ranks' parts, in the order of ranks."""
    total = torch.stack(list(parts)).sum(dim=0)
    return torch.tensor(gather_object([total.tolist()]), dtype=torch.float64).sum(dim=0)
