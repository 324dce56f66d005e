"""Trains recipes as if on an accelerator, on a machine without one: `pretended_device.py RECIPE ... FAULTY`

A tensor that is moved to the pretended device, or made there, is a wrapper around one on the CPU, and every operation
is done on what is inside. As on a real device, an operation that mixes both kinds is refused, and NumPy gets at none of
it. PyTorch has hooks for backends that are not its own; so `tensor.device` and the autograd engine know it too.

The last recipe is trained with mistakes of placement planted, for the test of this test.
"""

import os
import sys
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
DEVICE = f"{NAME}:0"
os.environ["ACCELERATE_TORCH_DEVICE"] = DEVICE
CPU = torch.device("cpu")
ATEN = torch.ops.aten
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}
"""A tensor on a device may be indexed by one on the CPU."""


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self):
        return True

    def manual_seed(self, seed):
        pass

    def get_rng_state(self, device=0):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=0):
        pass

    def empty_cache(self):
        pass

    def synchronize(self, device=0):
        pass

    def set_device(self, device):
        pass


class Mixed(RuntimeError):
    """Tensors of two devices met in one operation."""


class OnDevice(torch.Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **layout)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, how):
        return format(self.cpu(), how)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Constants(TorchFunctionMode):
    """`torch.tensor(..., device=...)` makes its tensor below the reach of a dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type != "cpu":
            return func(*args, **kwargs | {"device": CPU}).to(device)
        return func(*args, **kwargs)


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def bare(value):
    if isinstance(value, OnDevice):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == NAME else value


def dispatch(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
    target = kwargs.get("device")
    if there and here and not _may_mix(func, args, here):
        shapes = f"{[tuple(t.shape) for t in there]} on the device and {[tuple(t.shape) for t in here]} on the CPU"
        raise Mixed(f"{func}: {shapes}")
    if func is ATEN._fused_sdp_choice.default:
        return 0  # plain mathematics
    on_device = bool(there) if target is None else target.type == NAME
    if func in (ATEN.copy_.default, ATEN._foreach_copy_.default):
        on_device = isinstance(tree_leaves(args[0])[0], OnDevice)
    if not there and not on_device:
        return func(*args, **kwargs)
    found = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if func is ATEN._to_copy.default or not on_device or not there:
        return OnDevice(found) if on_device else found
    found = tree_map(lambda value: OnDevice(value) if isinstance(value, torch.Tensor) else value, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _may_mix(func, args, here):
    if func is ATEN.copy_.default:
        return True
    if func in INDEXED:
        return isinstance(args[0], OnDevice) and all(any(t is i for i in tree_leaves(args[1])) for t in here)
    return False


@contextmanager
def planted(fault):
    """A mistake that a machine without a device forgives."""
    from posttrain.models import scoring_pass
    from posttrain.trainers.shell import Shell

    plan, loss = scoring_pass.plan, Shell.compute_loss

    def plan_on_the_cpu(*args, **kwargs):
        return plan(*args, **kwargs | {"device": CPU})

    def loss_through_numpy(self, *args, **kwargs):
        found = loss(self, *args, **kwargs)
        self.step_losses[-1].numpy()
        return found

    if fault == "left on the CPU":
        scoring_pass.plan = plan_on_the_cpu
    else:
        Shell.compute_loss = loss_through_numpy
    try:
        yield
    finally:
        scoring_pass.plan, Shell.compute_loss = plan, loss


def train_one_step(path):
    from accelerate import PartialState
    from transformers import TrainingArguments

    from posttrain.config.loading import load_recipe
    from posttrain.methods import METHODS
    from posttrain.trainers.run import build

    set_up = TrainingArguments.device.fget

    def device(self):
        set_up(self)
        return torch.device(DEVICE)

    TrainingArguments.device = property(device)
    recipe = load_recipe(path, [], {name: cls.Config for name, cls in METHODS.items()})
    method = METHODS[recipe.method.name](recipe.method)
    built = build(recipe, method, PartialState(cpu=True))
    shell = built.shell
    try:
        shell.train()
        assert all(p.device.type == NAME for p in shell.model.parameters()), "the model is not there"
        assert shell.state.global_step == recipe.training.max_steps
        assert all(torch.isfinite(p.cpu()).all() for p in shell.model.parameters())
    finally:
        built.shell.parts.tracker.close(plots=False)
        built.shell.parts.engine.close()


def main(recipes, faulty):
    """Trains the recipes; and then `faulty` with each mistake planted, which must be caught."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # weights that are tied stay so when they move
    with Constants(), Pretend():
        for path in recipes:
            train_one_step(path)
            print(f"trained: {path}", flush=True)
        for fault in ("left on the CPU", "through NumPy"):
            try:
                with planted(fault):
                    train_one_step(faulty)
            except RuntimeError as error:
                print(f"caught: {fault}: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
