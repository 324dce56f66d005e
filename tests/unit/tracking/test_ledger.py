from __future__ import annotations

import json

import pytest

from posttrain.errors import StateError
from posttrain.tracking.ledger import ComputeLedger, Size
from posttrain.tracking.metrics import require


def ledger_of(parameters: int, **given) -> ComputeLedger:
    return ComputeLedger({"policy": Size(parameters, parameters)}, **given)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_aside_is_no_time_of_the_step() -> None:
    clock = Clock()
    ledger = ledger_of(10, clock=clock)
    clock.now += 1.0
    with ledger.aside():
        clock.now += 5.0
    clock.now += 2.0
    step = ledger.step()
    assert (step["step_seconds"], step["wall_seconds"]) == (3.0, 8.0)


def test_flops_by_hand() -> None:
    clock = Clock()
    ledger = ledger_of(1000, clock=clock)
    ledger.sampled(prompt_tokens=30, new_tokens=20)
    ledger.trained(50)
    ledger.scored(25, "policy")
    clock.now += 4.0
    first = ledger.step()
    # 2 * 1000 * (30 + 20 + 25) + 6 * 1000 * 50
    assert first["flops"] == first["flops_total"] == 450_000
    assert (first["tokens_prompt"], first["tokens_sampled"]) == (30, 20)
    assert (first["tokens_trained"], first["tokens_scored"]) == (50, 25)
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
    ledger = ledger_of(10, clock=clock)
    ledger.sampled(5, 7)
    ledger.step()
    ledger.trained(3)
    clock.now += 2.0
    state = json.loads(json.dumps(ledger.state_dict()))

    clock.now += 1000.0  # the pause between kill and resume is not the run's time
    resumed = ledger_of(10, clock=clock)
    resumed.load_state_dict(state)
    clock.now += 1.0
    metrics = resumed.step()
    assert (metrics["tokens_sampled_total"], metrics["tokens_prompt_total"]) == (7, 5)
    assert (metrics["tokens_trained"], metrics["flops"]) == (3, 180)
    assert metrics["wall_seconds"] == 3.0


def test_counts_are_summed_over_ranks() -> None:
    ledger = ledger_of(1, reduce=lambda counts: [2 * n for n in counts])
    ledger.sampled(1, 2)
    ledger.trained(3)
    metrics = ledger.step()
    assert (metrics["tokens_prompt"], metrics["tokens_sampled_total"], metrics["tokens_trained"]) == (2, 4, 6)
    assert metrics["flops"] == 2 * (2 + 4) + 6 * 6
    assert ledger.step()["tokens_trained_total"] == 6


def test_no_time_passed_gives_no_speed() -> None:
    ledger = ledger_of(1, clock=Clock())
    ledger.trained(5)
    assert "tokens_per_second" not in ledger.step()


def test_what_is_trained_decides_the_backward_pass() -> None:
    models = {
        "policy": Size(1000, 40),  # an adapter of 40 on 960
        "critic": Size(500, 500),
        "reference": Size(960),
    }
    ledger = ComputeLedger(models)
    ledger.trained(10)
    ledger.scored(10, "reference", "critic")
    step = ledger.step()
    # Forward, the gradient through, and of the trained weights; then two forward passes.
    assert step["flops"] == 10 * ((2000 + 2000 + 80) + (1000 + 1000 + 1000) + 1920 + 1000)
    assert (step["tokens_trained"], step["tokens_scored"]) == (10, 20)


def test_a_frozen_half_is_passed_forward_only_and_a_head_reads_no_tokens() -> None:
    frozen = ComputeLedger({"policy": Size(1000), "critic": Size(500, 500)})
    frozen.trained(10)
    step = frozen.step()
    assert (step["flops"], step["tokens_trained"], step["tokens_scored"]) == (10 * (2000 + 3000), 10, 10)
    shared = ComputeLedger({"policy": Size(1000, 1000), "critic": Size(4, 4, head_only=True)})
    shared.trained(10)
    shared.scored(10, "policy", "critic")
    step = shared.step()
    assert (step["flops"], step["tokens_trained"], step["tokens_scored"]) == (10 * 6024 + 10 * 2008, 10, 10)


def test_seconds_of_processor_and_gpu_leave_out_what_is_aside_and_pauses() -> None:
    clock, cpu = Clock(), Clock()
    ledger = ledger_of(10, gpu=True, clock=clock, cpu_clock=cpu)
    clock.now, cpu.now = clock.now + 2.0, cpu.now + 3.0
    with ledger.aside():
        clock.now, cpu.now = clock.now + 50.0, cpu.now + 70.0
    clock.now, cpu.now = clock.now + 1.0, cpu.now + 1.0
    state = json.loads(json.dumps(ledger.state_dict()))
    step = ledger.step()
    assert (step["cpu_seconds"], step["gpu_seconds"]) == (4.0, 3.0)
    clock.now, cpu.now = clock.now + 1000.0, cpu.now + 1000.0
    resumed = ledger_of(10, gpu=True, clock=clock, cpu_clock=cpu)
    resumed.load_state_dict(state)
    cpu.now += 0.5
    step = resumed.step()
    assert (step["cpu_seconds_total"], step["gpu_seconds_total"]) == (4.5, 3.0)
    assert "gpu_seconds" not in ledger_of(10).step()


def test_what_was_spent_in_words() -> None:
    ledger = ledger_of(1000, clock=Clock(), cpu_clock=Clock())
    ledger.trained(1234)
    ledger.step()
    assert ledger.summary() == "7.4e+06 FLOPs; tokens: 1,234 trained; 0 CPU seconds"
    ledger.sampled(1, 20)
    ledger.scored(30, "policy")
    ledger.step()
    assert "tokens: 1,234 trained, 20 sampled, 30 scored; " in ledger.summary()


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="of 0 parameters"):
        Size(0)
    with pytest.raises(ValueError, match="11 trained of 10"):
        Size(10, 11)
    with pytest.raises(ValueError, match="-1 trained"):
        ledger_of(1).trained(-1)
    with pytest.raises(StateError, match=r"10 parameters \(10 trained\) as policy, the run has 11"):
        ledger_of(11).load_state_dict(ledger_of(10).state_dict())
    with_critic = ComputeLedger({"policy": Size(10, 10), "critic": Size(5, 5)})
    with pytest.raises(StateError, match="no model as critic"):
        with_critic.load_state_dict(ledger_of(10).state_dict())
    with pytest.raises(StateError, match="earlier version"):
        ledger_of(1).load_state_dict({"parameters": 1})
