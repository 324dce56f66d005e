"""The worker pool, with real processes that hang, die and are killed."""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from posttrain.config.schema import TaskSource, VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.data.tasks import generate_examples
from posttrain.errors import StackError
from posttrain.verifiers import VERIFIERS
from posttrain.verifiers import pool as pool_module
from posttrain.verifiers.format import FormatVerifier
from posttrain.verifiers.pool import VerifierPool

HERE = Path(__file__).parent
PROBLEM = Problem("p", "prompt")


@pytest.fixture
def naughty(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("pool_verifiers")


@pytest.fixture
def make(naughty):
    pools = []

    def make_pool(verifiers=None, **config) -> VerifierPool:
        pools.append(VerifierPool(verifiers or [naughty.Obeys()], VerifierPoolConfig(**config)))
        return pools[-1]

    yield make_pool
    for pool in pools:
        pool.close()


def verify(pool: VerifierPool, completions: list[str]):
    return [verdict for (verdict,) in pool.verify([PROBLEM] * len(completions), completions)]


def statuses(pool: VerifierPool, completions: list[str]) -> list[str]:
    return [verdict.status.value for verdict in verify(pool, completions)]


def process_of(verdict) -> int:
    return int(verdict.detail.split()[0])


def alive(process: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for does not."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_are_in_order(make, workers: int) -> None:
    rng = random.Random(0)
    orders = [f"sleep {rng.random() * 0.003:.4f} {i}" if i % 3 == 0 else f"n {i}" for i in range(150)]
    orders = [order.rsplit(" ", 1)[0] if order.startswith("sleep") else order for order in orders]
    verdicts = verify(make(workers=workers), orders)
    assert [verdict.detail.partition(" ")[2] for verdict in verdicts] == orders


def test_several_verifiers_each_judge_every_completion(make, naughty) -> None:
    shape = VERIFIERS["format"](FormatVerifier.Config(type="format", pattern="n .*"))
    rows = make([naughty.Obeys(), shape], workers=2).verify([PROBLEM] * 3, ["n 1", "raise it", "n 2"])
    assert [[verdict.status for verdict in row] for row in rows] == [
        ["correct", "correct"],
        ["crash", "wrong"],
        ["correct", "correct"],
    ]


def test_a_hanging_verifier_times_out_alone(make) -> None:
    pool = make(workers=1, timeout=0.5)
    verdicts = verify(pool, ["n 1", "n 2", "sleep 600", "n 3", "sleep 600", "n 4"])
    assert [verdict.status for verdict in verdicts] == [
        "correct",
        "correct",
        "timeout",
        "correct",
        "timeout",
        "correct",
    ]
    assert verdicts[2].score is None and "0.5 s" in verdicts[2].detail
    assert process_of(verdicts[0]) == process_of(verdicts[1]) != process_of(verdicts[3])
    assert not alive(process_of(verdicts[0]))


def test_native_code_that_holds_the_lock_times_out(make, tmp_path: Path) -> None:
    assert statuses(make(workers=1, timeout=0.5), [f"regex {tmp_path / 'pid'}", "n 1"]) == ["timeout", "correct"]


def test_the_limit_is_for_one_completion_not_for_a_batch(make) -> None:
    pool = make(workers=1, timeout=0.9)
    assert statuses(pool, ["sleep 0.15"] * 12 + ["n 1"] * 36) == ["correct"] * 48  # the first 12 travel together


@pytest.mark.parametrize(
    ("order", "detail"),
    [
        ("exit 7", "exit status 7"),
        ("exit 0", "exit status 0"),
        ("kill", "exit status -9"),
        ("quit", "exit status 3"),
        ("hangup", "closed its connection"),
    ],
)
def test_a_worker_that_dies_crashes_its_completion_alone(make, order: str, detail: str) -> None:
    verdicts = verify(make(workers=1), ["n 1", order, "n 2"])
    assert [verdict.status for verdict in verdicts] == ["correct", "crash", "correct"]
    assert verdicts[1].score is None and detail in verdicts[1].detail


def test_a_worker_killed_from_outside_while_busy(make, tmp_path: Path) -> None:
    pool, file = make(workers=1, timeout=600), tmp_path / "pid"

    def kill() -> None:
        assert wait_until(lambda: file.exists() and file.read_text())
        os.kill(int(file.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert statuses(pool, ["n 1", f"regex {file}", "n 2"]) == ["correct", "crash", "correct"]
    killer.join()


def test_a_worker_killed_from_outside_while_idle_is_replaced(make) -> None:
    pool = make(workers=1)
    first = process_of(verify(pool, ["n 1"])[0])
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: not alive(first))
    verdict = verify(pool, ["n 2"])[0]
    assert verdict.status == "correct" and process_of(verdict) != first


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_verifier_raises_or_returns(make, workers: int) -> None:
    verdicts = verify(make(workers=workers), ["raise it", "float", "long", "print", "n 1"])
    assert [verdict.status for verdict in verdicts] == ["crash", "crash", "wrong", "correct", "correct"]
    assert verdicts[0].detail == "KeyError: 'it'" and "not a Verdict" in verdicts[1].detail
    assert len(verdicts[2].detail) == 300


def test_workers_do_not_write_to_standard_output(make, capfd: pytest.CaptureFixture[str]) -> None:
    assert statuses(make(workers=1), ["print"]) == ["correct"]
    assert capfd.readouterr().out == ""


def test_workers_are_kept_and_used_from_any_thread(make) -> None:
    """The kernel's tie between parent and child is to a thread; that of the pool must outlive those that use it."""
    pool, seen = make(workers=1), []
    for _ in range(3):
        thread = threading.Thread(target=lambda: seen.append(process_of(verify(pool, ["n 1"])[0])))
        thread.start()
        thread.join()
    assert len(set(seen)) == 1 and alive(seen[0])


def test_threads_that_use_it_together_get_their_own_results(make) -> None:
    pool, results = make(workers=2), {}
    threads = [
        threading.Thread(target=lambda k=k: results.__setitem__(k, verify(pool, [f"n {k}.{i}" for i in range(40)])))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, verdicts in results.items():
        assert [verdict.detail.split()[-1] for verdict in verdicts] == [f"{k}.{i}" for i in range(40)]
    assert len(results) == 4


def test_an_interrupt_leaves_no_verdicts_behind(make) -> None:
    pool = make(workers=1, timeout=600)
    verify(pool, ["n 1"])
    with pytest.raises(KeyboardInterrupt):
        verify(pool, ["n 2", "interrupt", "n 3"])
    assert [verdict.detail.split(" ", 1)[1] for verdict in verify(pool, ["n 4", "n 5"])] == ["n 4", "n 5"]


def test_workers_start_at_the_first_use_and_no_more_than_are_useful(make) -> None:
    pool = make(workers=4)
    assert pool._workers == []
    assert pool.verify([], []) == [] and pool._workers == []
    verify(pool, ["n 1"])
    assert len(pool._workers) == 1


def test_close_stops_workers_and_may_be_repeated(make) -> None:
    pool = make(workers=2)
    processes = {process_of(verdict) for verdict in verify(pool, ["sleep 0.01"] * 20)}
    pool.close()
    pool.close()
    assert not any(alive(process) for process in processes)
    with pytest.raises(ValueError, match="closed"):
        verify(pool, ["n 1"])


def test_a_pool_that_is_forgotten_stops_its_workers(naughty) -> None:
    pool = VerifierPool([naughty.Obeys()], VerifierPoolConfig())
    process = process_of(verify(pool, ["n 1"])[0])
    assert alive(process)
    del pool
    assert wait_until(lambda: not alive(process))


def test_verifiers_are_prepared_before_the_clock(make, naughty) -> None:
    for workers in (0, 1):
        assert statuses(make([naughty.Prepared()], workers=workers), ["n 1"]) == ["correct"]


def test_a_worker_that_cannot_start_says_so(make, naughty, capfd: pytest.CaptureFixture[str]) -> None:
    pool = make([naughty.CannotPrepare()], workers=1)
    for _ in range(2):
        with pytest.raises(StackError, match="did not start"):
            verify(pool, ["n 1"])
    assert "no such package" in capfd.readouterr().err


def test_a_worker_that_takes_too_long_to_start(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "START_LIMIT", 0.0)
    with pytest.raises(StackError, match="did not start"):
        verify(make(workers=1), ["n 1"])


def test_unequal_numbers_are_refused(make) -> None:
    with pytest.raises(ValueError, match="2 problems but 1 completions"):
        make(workers=1).verify([PROBLEM, PROBLEM], ["n 1"])


def test_workers_load_no_heavy_package() -> None:
    heavy = ["torch", "transformers", "datasets", "sympy", "reasoning_gym", "numpy"]
    code = f"import sys, posttrain.verifiers.worker; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("first", ["posttrain.data.tasks", "posttrain.verifiers", "posttrain.verifiers.procedural"])
def test_either_package_can_be_imported_first(first: str) -> None:
    code = f"import {first}; from posttrain.verifiers import VERIFIERS; from posttrain.data.tasks import TASKS"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the tie to the parent is Linux's")
@pytest.mark.parametrize("order", ["idle", "busy"])
def test_the_death_of_the_parent_leaves_no_orphan(tmp_path: Path, order: str) -> None:
    """Busy means stuck in native code, where a worker could not notice anything by itself."""
    file = tmp_path / "pid"
    script = tmp_path / "parent.py"
    script.write_text(
        f"""
import sys, threading, time
sys.path[:0] = [{str(HERE)!r}, {str(Path(pool_module.__file__).parents[2])!r}]
from pathlib import Path
from pool_verifiers import Obeys
from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.pool import VerifierPool

pool = VerifierPool([Obeys()], VerifierPoolConfig(timeout=600))
if {order!r} == "busy":
    pool.verify([Problem("p", "")], ["regex {file}"])
((verdict,),) = pool.verify([Problem("p", "")], ["n 1"])
Path({str(file)!r}).write_text(verdict.detail.split()[0])
time.sleep(600)
"""
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        assert wait_until(lambda: file.exists() and file.read_text())
        worker = int(file.read_text())
        assert alive(worker)
    finally:
        parent.kill()
        parent.wait()
    died = wait_until(lambda: not alive(worker), seconds=10.0)
    if not died:
        os.kill(worker, signal.SIGKILL)
    assert died


def test_real_verifiers_agree_inside_and_outside_of_workers() -> None:
    from posttrain.verifiers.procedural import ProceduralVerifier

    source = TaskSource(task="chain_sum", levels=[2, 5], size=300, annotator="weak")
    examples = generate_examples(source, "x")
    results = []
    for workers in (0, 2):
        pool = VerifierPool(
            [VERIFIERS["procedural"](ProceduralVerifier.Config(type="procedural"))], VerifierPoolConfig(workers=workers)
        )
        results.append(pool.verify([e.problem for e in examples], [e.completion for e in examples]))
        pool.close()
    assert results[0] == results[1]
    assert {verdict.status for (verdict,) in results[0]} == {"correct", "wrong"}


def test_what_takes_too_long_is_unknown_or_wrong_as_asked(make) -> None:
    for word, status, score in (("unknown", "timeout", None), ("wrong", "wrong", 0.0)):
        late, fine = verify(make(timeout=0.5, on_timeout=word), ["sleep 60", "fine"])
        assert (late.status, late.score) == (status, score) and "longer than 0.5 s" in late.detail
        assert fine.status == "correct"
