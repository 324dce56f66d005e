"""Weights that FSDP2 shards, made whole for a while (`trl_compat`); on one rank. With two: e2e/test_launch.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from posttrain.errors import StackError
from posttrain.trl_compat import SFTHost, _unsharded


@pytest.fixture
def sharded():
    """Two layers, of which one lets its weights go after a pass and one keeps them, in a root that holds a third."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
        fully_shard(model[0], mesh=mesh, reshard_after_forward=True)
        fully_shard(model[1], mesh=mesh, reshard_after_forward=False)
        yield fully_shard(model, mesh=mesh)
    finally:
        torch.distributed.destroy_process_group()


def shards(model):
    """Of each parameter, whether it is a shard."""
    return [isinstance(parameter, DTensor) for parameter in model.parameters()]


@pytest.mark.parametrize("passes_before", [0, 1])
def test_within_the_block_every_layer_stays_whole(sharded, passes_before):
    rows = torch.ones(3, 4)
    for _ in range(passes_before):
        sharded(rows).sum().backward()
    with torch.no_grad():
        expected = sharded(rows)
        after_a_pass = shards(sharded)
        with _unsharded(sharded):
            assert not any(shards(sharded))
            assert torch.equal(sharded(rows), expected)
            assert not any(shards(sharded))
        assert all(shards(sharded))
        sharded(rows)
        assert shards(sharded) == after_a_pass == [True] * 2 + [False] * 4


def test_training_goes_on_behind_it(sharded):
    rows = torch.ones(3, 4)
    with torch.no_grad(), _unsharded(sharded):  # before any pass
        sharded(rows)
    sharded(rows).sum().backward()
    assert all(isinstance(parameter.grad, DTensor) for parameter in sharded.parameters())
    assert all(shards(sharded))


def test_fsdp_version_1_is_refused():
    host = SimpleNamespace(is_fsdp_enabled=True, accelerator=SimpleNamespace(is_fsdp2=False))
    with pytest.raises(StackError, match="FSDP version 1") as raised:
        SFTHost._refuse_fsdp1(host)
    assert "fsdp_version: 2" in raised.value.hint
    host.accelerator.is_fsdp2 = True
    SFTHost._refuse_fsdp1(host)
