from __future__ import annotations

import json

import pytest

from posttrain.errors import StateError
from posttrain.tracking.ledger import ComputeLedger
from posttrain.tracking.metrics import require


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_aside_is_no_time_of_the_step() -> None:
    clock = Clock()
    ledger = ComputeLedger(10, clock=clock)
    clock.now += 1.0
    with ledger.aside():
        clock.now += 5.0
    clock.now += 2.0
    step = ledger.step()
    assert (step["step_seconds"], step["wall_seconds"]) == (3.0, 8.0)


def test_flops_by_hand() -> None:
    clock = Clock()
    ledger = ComputeLedger(1000, clock=clock)
    ledger.sampled(prompt_tokens=30, new_tokens=20)
    ledger.trained(50)
    ledger.trained(25, backward=False)
    clock.now += 4.0
    first = ledger.step()
    # 2 * 1000 * (30 + 20 + 25) + 6 * 1000 * 50
    assert first["flops"] == first["flops_total"] == 450_000
    assert (first["tokens_prompt"], first["tokens_sampled"]) == (30, 20)
    assert (first["tokens_trained"], first["tokens_forward"]) == (50, 25)
    assert (first["step_seconds"], first["wall_seconds"], first["tokens_per_second"]) == (4.0, 4.0, 12.5)

    ledger.trained(10)
    clock.now += 1.0
    second = ledger.step()
    assert (second["flops"], second["flops_total"]) == (60_000, 510_000)
    assert (second["tokens_trained"], second["tokens_trained_total"]) == (10, 60)
    assert (second["tokens_sampled"], second["tokens_sampled_total"]) == (0, 20)
    assert (second["step_seconds"], second["wall_seconds"]) == (1.0, 5.0)
    for name in second:
        require(name)


def test_state_restores_totals_and_what_is_pending() -> None:
    clock = Clock()
    ledger = ComputeLedger(10, clock=clock)
    ledger.sampled(5, 7)
    ledger.step()
    ledger.trained(3)
    clock.now += 2.0
    state = json.loads(json.dumps(ledger.state_dict()))

    clock.now += 1000.0  # the pause between kill and resume is not the run's time
    resumed = ComputeLedger(10, clock=clock)
    resumed.load_state_dict(state)
    clock.now += 1.0
    metrics = resumed.step()
    assert (metrics["tokens_sampled_total"], metrics["tokens_prompt_total"]) == (7, 5)
    assert (metrics["tokens_trained"], metrics["flops"]) == (3, 180)
    assert metrics["wall_seconds"] == 3.0


def test_counts_are_summed_over_ranks() -> None:
    ledger = ComputeLedger(1, reduce=lambda counts: [2 * n for n in counts])
    ledger.sampled(1, 2)
    ledger.trained(3)
    metrics = ledger.step()
    assert (metrics["tokens_prompt"], metrics["tokens_sampled_total"], metrics["tokens_trained"]) == (2, 4, 6)
    assert metrics["flops"] == 2 * (2 + 4) + 6 * 6
    assert ledger.step()["tokens_trained_total"] == 6


def test_no_time_passed_gives_no_speed() -> None:
    ledger = ComputeLedger(1, clock=Clock())
    ledger.trained(5)
    assert "tokens_per_second" not in ledger.step()


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters"):
        ComputeLedger(0)
    with pytest.raises(ValueError, match="-1 trained"):
        ComputeLedger(1).trained(-1)
    with pytest.raises(StateError, match="10 parameters, the model has 11"):
        ComputeLedger(11).load_state_dict(ComputeLedger(10).state_dict())
