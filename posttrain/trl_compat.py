"""The one module that touches private names of TRL, the Trainer and FSDP2; tested against the pinned ranges.

It turns TRL's trainers into hosts for the shells: model preparation, PEFT, distributed wrapping and checkpoints are
TRL's; batches, losses and logging are the shells'. A host here comes before the TRL trainer among the bases of its
shell, which imports that trainer: the others are not imported at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.models.utils import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model

from posttrain.errors import StackError
from posttrain.models.restoring import put_back
from posttrain.models.sharing import EYES
from posttrain.models.token_logps import prepare
from posttrain.models.value import FILE as CRITIC_FILE
from posttrain.models.value import NAME as CRITIC
from posttrain.models.value import split_state
from posttrain.rollouts.weight_sync import whole_tensors
from posttrain.state.checkpoint import STAGING
from posttrain.trainers.host import Host
from posttrain.trainers.sharded_start import from_main, proven, share_buffers, shares_out, take_apart_by_zero3

OWN_ROUTER_LOSS = {"router_aux_loss_coef": 0.0}
"""The shells add the routers' loss. TRL would let every pass of a mixture of experts return router logits."""


class _HostMixin(Host):
    """Hooks that both hosts share. A shell comes before it in the method resolution order.

    Attributes:
        packs: whether passes over the policy are packed (`token_logps.prepare`).
        whole_on_main_rank: whether the other ranks have an outline of the policy still (`trainers.sharded_start`).
    """

    packs: bool = False
    whole_on_main_rank: bool = False
    _policy_is_whole: bool = False
    loss_is_scaled_for_ga = True  # compute_loss divides by the global count itself

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._refuse_fsdp1()
        self.whole_on_main_rank = shares_out(PartialState()) is not None
        if self.whole_on_main_rank and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise RuntimeError("the launcher asked for shards, and nothing takes the model apart")
        if self.whole_on_main_rank and self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # `_shards_of_main_rank` does it
        self._return_what_was_computed()
        self._make_ready(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    def _refuse_fsdp1(self) -> None:
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise StackError(
                "FSDP version 1 puts the weights of a layer into one flat tensor, which neither a rollout engine nor a "
                "checkpoint of ours can read",
                where="fsdp_version",
                hint="set fsdp_version: 2 in accelerate's file, as launch/accelerate/fsdp2.yaml does",
            )

    def _return_what_was_computed(self) -> None:
        """With bfloat16 accelerate tells FSDP2 to cast what a model returns, so log-probs and values too."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def _make_ready(self, policy: PreTrainedModel) -> None:
        """Give the trained model what the shell's forward pass needs."""
        proven(policy, PartialState())
        self.packs = prepare(policy, temperature=getattr(self, "temperature", 1.0))

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Under DeepSpeed the Trainer would cast masks, log-probs, advantages and rewards to the precision of the
        # weights. They are numbers of the loss, and go to the device as they are.
        return {name: value.to(self.args.device) for name, value in inputs.items()}

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # without TRL's model card

    def keep_checkpoint(self) -> None:
        """Write a checkpoint now, outside of the loop. Called on all ranks."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or isinstance(policy, PeftModel):  # they read what they wrote
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # the Trainer would look in the file for the names that the model has in memory
            put_back(policy, Path(resume_from_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call or not self.is_fsdp_enabled:  # within a checkpoint FSDP's own files hold the weights
            super().save_model(output_dir, _internal_call)
            return
        # The Trainer would write no weights at all where checkpoints are sharded. All ranks gather.
        state = {name: t.cpu() for name, t in whole_tensors(self.accelerator.unwrap_model(self.model))}
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        Trainer.log(self, logs, start_time)  # TRL would mix in metrics of the parts that are not used
        self._tr_loss.zero_()  # the loop resets it by subtraction, which keeps a NaN for good

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(Trainer._get_output_dir(self, trial)) / STAGING)  # `state.checkpoint.commit` moves it

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self.grad_norm = Trainer._get_grad_norm(self, model, grad_norm=grad_norm)
        return self.grad_norm

    def loss_since_log(self) -> dict[str, float]:
        """This rank's loss that is not logged yet, and the step of the last log entry."""
        return {"loss": float(self._tr_loss), "step": self._globalstep_last_logged}

    def restore_loss(self, state: dict[str, float]) -> None:
        """Put `loss_since_log` back; the loop resets both when it begins."""
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = int(state["step"])

    def _prepare_for_training(self, *arguments: Any, **keywords: Any) -> Any:
        with self._taking_apart(self.model):
            prepared = super()._prepare_for_training(*arguments, **keywords)
        self.whole_on_main_rank = False
        for part in self.model.modules() if self.is_deepspeed_enabled or self.is_fsdp_enabled else ():
            eyes = getattr(part, EYES, None)
            if eyes is not None:
                eyes.most = self._most
        return prepared

    def _most(self, number: int) -> int:
        """The largest of the ranks' numbers, while they go through the policy together."""
        if self._policy_is_whole or self.accelerator.num_processes == 1:
            return number
        mine = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    @contextmanager
    def _taking_apart(self, model: torch.nn.Module) -> Iterator[None]:
        """Around what makes shards of a model: they are the main rank's, where it alone has the weights."""
        if not self.whole_on_main_rank:
            yield
            return
        device = self.accelerator.device
        share_buffers(model, device)
        if self.is_deepspeed_enabled:
            take_apart_by_zero3(model, self.accelerator.state.deepspeed_plugin.deepspeed_config)
            yield
            return
        with _shards_of_main_rank(model, device):
            yield

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the compute ledger counts

    @contextmanager
    def whole_model(self, *frozen: torch.nn.Module) -> Iterator[None]:
        """A context in which the policy can be called, without gradient, by each rank for itself; collective under
        ZeRO-3 and FSDP2. Blocks may stand within each other.

        Args:
            frozen: models from `prepare_frozen` of which the same shall hold.
        """
        outermost = not self._policy_is_whole
        with ExitStack() as whole:
            for model in (self.model_wrapped, *frozen) if outermost else frozen:
                for block in self._whole(model):
                    whole.enter_context(block)
            self._policy_is_whole = True
            try:
                yield
            finally:
                self._policy_is_whole = not outermost

    def _whole(self, model: torch.nn.Module) -> list[AbstractContextManager]:
        """What to enter so that a model is whole."""
        if isinstance(model, FSDPModule):
            return [_unsharded(model)]
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            return []
        return [unwrap_model_for_generation(model, self.accelerator), _uncompared(model)]

    def settle_shards(self) -> None:
        """Have FSDP2 note the type of gradients by what is trained now: it would do so when the first pass begins, and
        that may be one without the adapter."""
        if isinstance(self.model_wrapped, FSDPModule):
            self.model_wrapped._get_fsdp_state()._lazy_init()

    def prepare_frozen(self, model: PreTrainedModel) -> torch.nn.Module:
        """A frozen model placed and sharded like the policy, ready for `token_logps`."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        proven(base, PartialState())
        prepare(base, temperature=getattr(self, "temperature", 1.0))
        with self._taking_apart(model):
            if self.is_deepspeed_enabled:
                return prepare_deepspeed(model, self.accelerator)
            if self.is_fsdp_enabled:
                return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def _shards_of_main_rank(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """FSDP2 cuts its part out of the tensors that a rank has; within the block the main rank sends each when it is
    cut. accelerate's own way (`fsdp_cpu_ram_efficient_loading`) fails at buffers that a checkpoint holds, and is
    for trained models alone."""
    cut = FSDPParam._init_sharded_param

    def cut_of_main(self: FSDPParam, parameter: torch.nn.Parameter, *arguments: Any, **keywords: Any) -> None:
        sent = from_main(parameter, device)
        if parameter.is_meta:
            parameter = torch.nn.Parameter(sent, requires_grad=parameter.requires_grad)
        else:
            parameter.data = sent
        cut(self, parameter, *arguments, **keywords)

    for number, parameter in enumerate(model.parameters(), 1):
        if parameter.is_meta:  # accelerate finds the optimizer's parameters again by their addresses, here all 0
            parameter.data_ptr = partial(int, -number)
    FSDPParam._init_sharded_param = cut_of_main
    try:
        yield
    finally:
        FSDPParam._init_sharded_param = cut


@contextmanager
def _uncompared(engine: torch.nn.Module) -> Iterator[None]:
    """ZeRO-3 compares over the ranks, when a pass begins, which parameters the pass before used. TRL leaves that hook
    in place while the weights are whole, and a rank that calls the model once more than the others waits for ever.

    Args:
        engine: from DeepSpeed, under ZeRO-3.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)  # without training it is that itself
    offload.fwd_pre_hook.remove()

    def compare(*_: Any) -> None:
        offload.get_param_coordinator().reset_step()

    try:
        yield
    finally:
        offload.fwd_pre_hook = offload.module.register_forward_pre_hook(compare, prepend=True)


@contextmanager
def _unsharded(model: FSDPModule) -> Iterator[None]:
    """FSDP2 gathers a layer when a pass comes to it, which all ranks then have to, and lets it go again behind it.
    Within the block all layers stay gathered, so a pass asks nothing of other ranks."""
    model._get_fsdp_state()._lazy_init()  # else the first pass does it, and says which one is the root
    layers = [layer for layer in model.modules() if isinstance(layer, FSDPModule)]
    groups = [group for layer in layers if (group := layer._get_fsdp_state()._fsdp_param_group) is not None]
    let_go = [group.post_forward_mesh_info for group in groups]
    try:
        for layer in layers:
            layer.unshard()
        for group in groups:
            group.post_forward_mesh_info = None
        yield
    finally:
        for group, info in zip(groups, let_go, strict=True):
            group.post_forward_mesh_info = info
        for layer in layers:
            layer.reshard()


class _CriticMixin(Host):
    """Hooks of hosts whose policy may carry a critic (`models.value`). Comes before `_HostMixin`.

    Attributes:
        critic_learning_rate: None without a critic.
    """

    critic_learning_rate: float | None = None

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        known = self.optimizer
        optimizer = super().create_optimizer(model)
        if known is None and self.critic_learning_rate is not None:
            self._give_critic_its_rate(optimizer)
        return optimizer

    def _give_critic_its_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """The critic's parameters in groups of their own; `lr_factor` is what `training.learning_rate` is times."""
        factor = self.critic_learning_rate / self.args.learning_rate
        of_critic = {id(p) for name, p in self.model.named_parameters() if f".{CRITIC}." in f".{name}"}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in of_critic]
            rest = {key: value for key, value in group.items() if key != "params"}
            group["params"] = [p for p in group["params"] if id(p) not in of_critic]
            if mine:
                optimizer.add_param_group({**rest, "params": mine, "lr": group["lr"] * factor, "lr_factor": factor})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.critic_learning_rate is None:
            super()._save(output_dir, state_dict)
            return
        found = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        policy, critic = split_state(found)
        super()._save(output_dir, policy)
        if self.args.should_save and not self.is_deepspeed_enabled:  # DeepSpeed's own files hold it
            folder = Path(output_dir or self.args.output_dir)
            save_file({k: v.detach().cpu().contiguous() for k, v in critic.items()}, folder / CRITIC_FILE)


class SFTHost(_HostMixin):
    """Comes before TRL's SFTTrainer."""

    @staticmethod
    def extra_arguments(**_: Any) -> dict[str, Any]:
        return {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, **OWN_ROUTER_LOSS}


class OfflineHost(_CriticMixin, SFTHost):
    """Comes before TRL's SFTTrainer, for rewarded traces."""


@contextmanager
def _no_reference_of_trl(dpo_trainer: Any) -> Iterator[None]:
    """TRL's DPOTrainer hashes the model for log-probs that are never asked for, and under FSDP2 loads a reference for
    them, whole on every rank."""
    kept = dpo_trainer.create_model_from_path, dpo_trainer.hash_module
    dpo_trainer.create_model_from_path = dpo_trainer.hash_module = lambda *_, **__: None
    try:
        yield
    finally:
        dpo_trainer.create_model_from_path, dpo_trainer.hash_module = kept


class PreferenceHost(_HostMixin):
    """Comes before TRL's DPOTrainer: its data preparation, reference and losses are never entered."""

    @staticmethod
    def extra_arguments(**_: Any) -> dict[str, Any]:
        # Without this TRL loads a reference from the path in the model's config; the shell holds an explicit one.
        return {"precompute_ref_log_probs": True, "max_length": None, "disable_dropout": False, **OWN_ROUTER_LOSS}

    def __init__(self, *, model: PreTrainedModel, **arguments: Any) -> None:
        disable_dropout_in_model(model)  # TRL's own switch would take away an adapter's dropout too
        from trl.trainer import dpo_trainer  # imported by the shell alone

        with _no_reference_of_trl(dpo_trainer):
            super().__init__(model=model, **arguments)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset


class RewardHost(_HostMixin):
    """Comes before TRL's RewardTrainer: its data preparation and loss are never entered."""

    @staticmethod
    def extra_arguments(**_: Any) -> dict[str, Any]:
        return {"max_length": None, "disable_dropout": False}

    def __init__(self, *, model: PreTrainedModel, **arguments: Any) -> None:
        disable_dropout_in_model(model)  # as in `PreferenceHost`
        super().__init__(model=model, **arguments)

    def _make_ready(self, policy: PreTrainedModel) -> None:
        """Nothing: the shell calls the classifier's own forward."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def _unused_reward(**_: Any) -> list[float]:
    raise RuntimeError("TRL's reward path was entered; the shell scores rollouts itself")


class OnlineHost(_CriticMixin, _HostMixin):
    """Comes before TRL's GRPOTrainer: its generation, reward and loss paths are never entered."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(reward_funcs=[_unused_reward], **arguments)  # TRL refuses to start without one

    @staticmethod
    def extra_arguments(
        *, temperature: float, max_new_tokens: int, samples_per_prompt: int, accumulation_steps: int
    ) -> dict[str, Any]:
        # TRL refuses groups of 1, and an odd number of rows that do not divide into 2; its own grouping is not used.
        pairs = {} if samples_per_prompt > 1 else {"steps_per_generation": 2 * accumulation_steps}
        return {
            "temperature": temperature,
            "max_completion_length": max_new_tokens,
            "num_generations": max(samples_per_prompt, 2),
            "beta": 0.0,  # the shell holds the reference
            **OWN_ROUTER_LOSS,
            **pairs,
        }


def quiet_arguments(kind: type[TrainingArguments], output_dir: Path, **arguments: Any) -> TrainingArguments:
    """Training arguments of a TRL trainer with the settings that every shell shares."""
    return kind(
        output_dir=str(output_dir),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        ignore_data_skip=True,  # the batch of a step is a function of the step
        logging_nan_inf_filter=False,
        eval_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        **arguments,
    )
