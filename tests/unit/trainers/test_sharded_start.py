"""Who reads the weights, by the launcher's settings alone."""

import json

import pytest
from accelerate import PartialState
from accelerate.utils import DistributedType

from posttrain.errors import NeedsError
from posttrain.models.outline import outlining
from posttrain.trainers.sharded_start import read_by_one_rank, refuse_quantised, shares_out

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


class Ranks(PartialState):
    """Two of them on GPUs, as far as these functions look."""

    def __init__(self, index=0, count=2, kind=DistributedType.MULTI_GPU):
        self.__dict__ = {"process_index": index, "num_processes": count, "distributed_type": kind}


@pytest.mark.parametrize(
    ("launched", "ranks", "found"),
    [
        ({}, {}, None),
        (FSDP, {}, "FSDP2"),
        (FSDP, {"count": 1}, None),
        (FSDP, {"kind": DistributedType.MULTI_CPU}, None),  # trains with DDP
        (FSDP | {"FSDP_VERSION": "1"}, {}, None),  # refused later
        (ZERO, {}, "ZeRO-3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, None),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": 3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "ZeRO-3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": 1}, {}, None),
    ],
)
def test_what_shares_out_the_weights(launched, ranks, found, tmp_path, monkeypatch):
    for name, value in launched.items():
        if isinstance(value, int):
            (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": value}}))
            value = str(tmp_path / "zero.json")
        monkeypatch.setenv(name, value)
    assert shares_out(Ranks(**ranks)) == found
    for index in (0, 1):
        with read_by_one_rank(Ranks(index, **ranks)):
            assert outlining() == (found is not None and index == 1)


@pytest.mark.parametrize(("launched", "name"), [(FSDP, "FSDP2"), (ZERO, "ZeRO-3")])
def test_packed_weights_are_refused_before_they_are_loaded(launched, name, load, monkeypatch):
    recipe = load({"name": "sft"}, {"model.quantization": {"bits": 4}, "model.peft": {"type": "lora"}})
    refuse_quantised(recipe, Ranks())
    for key, value in launched.items():
        monkeypatch.setenv(key, value)
    for count in (1, 2):
        with pytest.raises(NeedsError, match=f"{name} shards weights over the ranks") as caught:
            refuse_quantised(recipe, Ranks(count=count))
        assert caught.value.where == "model.quantization"
