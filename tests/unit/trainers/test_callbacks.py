import os
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from posttrain.state.checkpoint import STAGING, complete_checkpoints, read_state
from posttrain.trainers import callbacks
from posttrain.trainers.callbacks import CompleteCheckpoints, OnSchedule, StopOnSignal


def step_end(stop, step):
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    stop.on_step_end(None, SimpleNamespace(global_step=step), control)
    return control.should_training_stop, control.should_save


def test_a_second_ctrl_c_stops_at_once_but_one_keypress_does_not_count_twice(monkeypatch):
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert step_end(stop, 1) == (True, True) and stop.signal == signal.SIGINT
        monkeypatch.setattr(callbacks, "SAME_KEYPRESS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def test_sigterm_after_sigterm_changes_nothing(monkeypatch):
    monkeypatch.setattr(callbacks, "SAME_KEYPRESS", 0.0)
    with StopOnSignal() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and not stop.stopped
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_rank_without_a_signal_stops_with_the_others():
    stop = StopOnSignal(agree=lambda mine: True)
    assert step_end(stop, 1) == (True, True) and stop.stopped and stop.signal is None


def test_a_checkpoint_is_committed_by_the_main_rank_between_two_barriers(tmp_path):
    seen = []
    folder = tmp_path / "checkpoints"
    (folder / STAGING / "checkpoint-3").mkdir(parents=True)
    (folder / STAGING / "checkpoint-3" / "model.safetensors").write_bytes(b"x")

    def wait():
        seen.append(len(complete_checkpoints(folder)))

    def save_files(staged):
        (staged / "rollouts.safetensors").write_bytes(b"y")
        seen.append("files")

    save = CompleteCheckpoints(lambda: {"method": {}}, save_files=save_files, wait=wait)
    arguments = SimpleNamespace(output_dir=str(folder))
    save.on_save(arguments, SimpleNamespace(global_step=3, is_world_process_zero=False), None)
    assert complete_checkpoints(folder) == []
    save.on_save(arguments, SimpleNamespace(global_step=3, is_world_process_zero=True), None)
    assert seen == ["files", 0, 0, "files", 0, 1]
    assert read_state(folder / "checkpoint-3")["step"] == 3 and not (folder / STAGING).exists()


@pytest.mark.parametrize(("every", "steps", "measured"), [(2, 5, [0, 2, 4, 5]), (2, 4, [0, 2, 4]), (9, 4, [0, 4])])
def test_evaluations_are_at_the_start_on_schedule_and_once_at_the_end(every, steps, measured):
    called = []
    schedule = OnSchedule(every, called.append)
    state, control = TrainerState(max_steps=steps), TrainerControl()
    schedule.on_train_begin(None, state, control)
    for step in range(1, steps + 1):
        state.global_step, control.should_log = step, False
        schedule.on_step_end(None, state, control)
        if control.should_log:
            schedule.on_log(None, state, control)
    assert called == measured
