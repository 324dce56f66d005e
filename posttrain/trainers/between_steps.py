"""What is measured between the steps of a run: benchmarks, episodes and held-out pairs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from posttrain.evaluation.runner import evaluate
from posttrain.trainers.held_out import HeldOut
from posttrain.trainers.played_evaluation import PlayedEvaluation
from posttrain.trainers.shell import Shell


def evaluation(shell: Shell, held_out: HeldOut | None) -> Callable[[int], None]:
    """Evaluation between steps, by the main rank while the others wait; it draws from no generator of the training.

    Args:
        shell: bound; its recipe evaluates `every` so often.
        held_out: pairs that are measured too.
    """
    parts = shell.parts
    recipe, settings = parts.recipe, parts.recipe.evaluation
    assert settings is not None
    played = None if settings.episodes is None else PlayedEvaluation(parts)

    def evaluate_between_steps(step: int) -> None:
        shell.settle()
        with parts.ledger.aside():
            parts.engine.sync(step)
            with parts.engine.together(), nullcontext() if held_out is None else held_out.together():
                if shell.accelerator.is_main_process:
                    metrics: dict[str, float] = {}
                    if settings.benchmarks:
                        parts.tracker.message(f"step {step}: evaluating")
                        how = (parts.renderer, recipe.verifier_pool, settings)
                        report = evaluate(parts.engine, *how, model_label=f"step {step}")
                        report.save(parts.run_dir / "evaluation" / f"step-{step:06d}.json")
                        metrics |= report.metrics()
                    if played is not None:
                        parts.tracker.message(f"step {step}: playing")
                        metrics |= played.measure(parts.run_dir / "evaluation" / f"episodes-{step:06d}.jsonl")
                    if held_out is not None:
                        parts.tracker.message(f"step {step}: measuring held-out pairs")
                        found = held_out.measure(step)
                        found.save(parts.run_dir / "held_out")
                        parts.tracker.message(f"step {step}: {found.summary()}")
                        metrics |= found.metrics()
                    parts.tracker.log(step, metrics)
            shell.accelerator.wait_for_everyone()

    return evaluate_between_steps
