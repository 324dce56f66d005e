"""What shells, and the hooks of `trl_compat`, take from the trainer that they are mixed into, by name and type.

For the type checker alone: at run time these are attributes of TRL's trainer and of the hooks before it, and a class
with stubs of them would stand before theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Host:
        """A Hugging Face Trainer, after our hooks.

        Attributes:
            model: what is trained; `model_wrapped` is that in the wrapper of the launch.
            control: what the loop does next, by its callbacks.
            packs: whether passes over the policy are packed.
            temperature: of the policy that the log-probs are of (hosts of online methods).
        """

        model: Any
        model_wrapped: Any
        accelerator: Accelerator
        args: TrainingArguments
        state: TrainerState
        control: TrainerControl
        callback_handler: Any
        optimizer: torch.optim.Optimizer
        lr_scheduler: Any
        is_deepspeed_enabled: bool
        is_fsdp_enabled: bool
        grad_norm: Any
        critic_learning_rate: float | None
        whole_on_main_rank: bool
        packs: bool
        settle_shards: Callable[[], None]
        prepare_frozen: Callable[[torch.nn.Module], Any]
        whole_model: Callable[..., AbstractContextManager[Any]]
        _tr_loss: Tensor
        _globalstep_last_logged: int

        def __init__(self, **arguments: Any) -> None: ...
        def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None: ...
        def train(self, resume_from_checkpoint: str | None = None) -> Any: ...
        def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...
        def keep_checkpoint(self) -> None: ...
        def loss_since_log(self) -> dict[str, float]: ...
        def restore_loss(self, state: dict[str, float]) -> None: ...
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer: ...
        def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> Any: ...
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None: ...
        def _prepare_for_training(self, *arguments: Any, **keywords: Any) -> Any: ...
        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None: ...
else:
    Host = object
