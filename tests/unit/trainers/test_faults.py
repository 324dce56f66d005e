import errno
import json
import os
import subprocess

import pytest
import torch

from posttrain.config.memory import MemoryEstimate
from posttrain.errors import LostRankError, ResourceError
from posttrain.state.checkpoint import STAGING, complete_checkpoints, damage
from posttrain.trainers.faults import CUTS, PHASES, explained
from posttrain.trainers.run import train

ESTIMATE = MemoryEstimate(
    parameters=10,
    trainable=10,
    fixed=[("weights", 4 << 30, "a"), ("optimizer", 8 << 30, "b")],
    training=[("activations", 6 << 30, "c"), ("head", 1 << 30, "d")],
    sampling=[("KV cache", 2 << 30, "e")],
    notes=[],
)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_told_as_one(error, tmp_path):
    (tmp_path / "checkpoints" / STAGING / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ResourceError, match="the disk is full or cannot be written to") as caught:
        with explained(tmp_path, lambda: ESTIMATE):
            raise error
    assert caught.value.__cause__ is error and "no checkpoint yet" in caught.value.what
    assert not (tmp_path / "checkpoints" / STAGING).exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_exhausted_memory_names_the_terms_and_what_to_cut(error, tmp_path):
    with pytest.raises(ResourceError, match="out of memory while training") as caught:
        with explained(tmp_path, lambda: ESTIMATE):
            raise error
    text = str(caught.value)
    assert "activations" in text and "6.00 GiB" in text and "KV cache" not in text
    assert "cut activations by: batch.micro_batch" in text and "or optimizer by: model.peft" in text


def test_memory_that_ran_out_while_sampling_blames_sampling(tmp_path, monkeypatch):
    from posttrain.rollouts import sampling

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sampling.np.random, "Philox", exhausted)
    with pytest.raises(ResourceError, match="out of memory while sampling") as caught:
        with explained(tmp_path, lambda: ESTIMATE):
            sampling.uniforms(0, 0, 0, 1)
    assert "cut KV cache by: rollouts.max_batch" in str(caught.value)


def test_without_an_estimate_it_still_says_what_happened(tmp_path):
    nothing = MemoryEstimate(None, None, [], [], [], [])
    with pytest.raises(ResourceError, match="out of memory while training"), explained(tmp_path, lambda: nothing):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    "text",
    [
        "[.../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20123",
        "[Rank 0]: NCCL communicator was aborted: remote process exited or there was a network error",
    ],
)
def test_a_rank_that_has_gone_is_told_as_one(text, tmp_path, capsys):
    with pytest.raises(ResourceError, match="another rank has ended") as caught:
        with explained(tmp_path, lambda: ESTIMATE):
            raise RuntimeError(text)
    assert "--resume auto" in str(caught.value) and str(caught.value) in capsys.readouterr().err


LOST = "[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20123"


def test_the_phase_is_that_of_the_outermost_function(tmp_path, monkeypatch):
    from posttrain.rollouts import sampling

    def lost(*_, **__):
        raise RuntimeError(LOST)

    def sample():
        sampling.uniforms(0, 0, 0, 1)

    def evaluate_between_steps():
        sample()

    def _save_checkpoint():
        lost()

    def get_batch_samples():
        lost()

    monkeypatch.setattr(sampling.np.random, "Philox", lost)
    phases = {
        sample: "sampling",
        get_batch_samples: "preparing a step",
        evaluate_between_steps: "evaluating",
        _save_checkpoint: "saving a checkpoint",
    }
    for function, phase in (phases | {lost: "training"}).items():
        with pytest.raises(LostRankError, match=f"has ended while this one was {phase}.*, so it cannot go on"):
            with explained(tmp_path, lambda: ESTIMATE):
                function()


def test_the_functions_that_name_a_phase_are_there():
    from posttrain.trainers import between_steps, callbacks, ranks, run, saving
    from posttrain.trl_compat import SFTHost

    assert ranks.on_main_rank and run.build and saving.save_model
    assert SFTHost._save_checkpoint and callbacks.CompleteCheckpoints.on_save
    assert "evaluate_between_steps" in between_steps.evaluation.__code__.co_varnames
    named = {"on_main_rank", "build", "save_model", "_save_checkpoint", "on_save", "evaluate_between_steps"}
    assert set(PHASES) == named


def test_a_lost_rank_is_told_once(tmp_path, capsys, monkeypatch):
    from posttrain.cli import main as cli

    def lose():
        with explained(tmp_path, lambda: ESTIMATE):
            raise RuntimeError(LOST)

    monkeypatch.setattr(cli, "app", lose)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("another rank has ended") == 1


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.ENOENT, "no"), ValueError("x")])
def test_other_errors_pass(error, tmp_path):
    with pytest.raises(type(error)) as caught, explained(tmp_path, lambda: ESTIMATE):
        raise error
    assert caught.value is error


def test_every_term_of_the_estimate_has_a_cut(load):
    from posttrain.config.memory import estimate_memory
    from posttrain.methods import METHODS

    lora = {"model.peft": {"type": "lora", "r": 4}, "training.bf16": True}
    for changes in ({"training.bf16": True}, lora):
        recipe = load({"name": "grpo", "beta": 0.1}, changes)
        needs = METHODS["grpo"](recipe.method).needs
        found = estimate_memory(recipe, needs, sequence_tokens=64, sequences_per_rank=16, device="cpu")
        terms = {name for name, _, _ in (*found.fixed, *found.training, *found.sampling)}
        assert "KV cache" in terms and terms <= set(CUTS)


def test_a_real_allocation_that_fails_is_told_in_terms_of_the_recipe(load, monkeypatch):
    from posttrain.methods.sft import SFT

    monkeypatch.setattr(SFT, "loss", lambda self, batch: torch.empty(1 << 60))
    with pytest.raises(ResourceError, match="out of memory while training") as caught:
        train(load({"name": "sft"}))
    assert "activations" in str(caught.value)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_no_checkpoint(small_disk, load):
    run = small_disk / "run"
    changes = {"training.max_steps": 200, "training.save_steps": 2, "output": str(run)}
    with pytest.raises(ResourceError, match="the disk is full or cannot be written to") as caught:
        train(load({"name": "sft"}, changes))
    kept = complete_checkpoints(run / "checkpoints")
    assert len(kept) >= 2 and all(damage(path) is None for path in kept)
    assert f"{kept[-1].name} and older ones are intact" in caught.value.what
    assert not (run / "checkpoints" / STAGING).exists()

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    last = int(kept[-1].name.split("-")[1]) + 4
    assert train(load({"name": "sft"}, {**changes, "training.max_steps": last}), resume="auto").steps == last
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, last + 1))
