"""Advantages of steps by a process reward model (`companions.StepScorer`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem, Sample
from posttrain.data.steps import StepCutter
from posttrain.methods.companions import StepScorer
from posttrain.objectives.process import step_progress
from posttrain.trainers.rollout_step import answer_ids
from posttrain.verifiers.process_reward import ProcessRewardVerifier


class StepScores:
    """Scores the steps of completions; the model is loaded with it.

    Args:
        wanted: which model, and what it is read as.
        renderer: of the policy.
        problems: by id.

    Raises:
        ModelError: the model cannot be loaded or is none.
    """

    def __init__(self, wanted: StepScorer, renderer: Renderer, problems: Mapping[str, Problem]) -> None:
        self.wanted, self.renderer, self.problems = wanted, renderer, problems
        self.judge = ProcessRewardVerifier(wanted.config)
        self.judge.load()
        self.cutter = StepCutter(renderer.text, wanted.config.separator)

    def progress(self, rows: Sequence[Sample], width: int) -> tuple[Tensor, int]:
        """(B, width) what each token's step has changed, 0 outside of completions; and how many rows have no score.

        The steps are those of the whole answer, a prefix included. The model reads its text, in its own tokens.
        """
        answers = [answer_ids(row) for row in rows]
        texts = [self.renderer.text(answer) for answer in answers]
        scores = self.judge.step_scores([self.problems[row.problem_id] for row in rows], texts)
        found = torch.zeros(len(rows), width)
        for number, (row, answer, known) in enumerate(zip(rows, answers, scores, strict=True)):
            changes = step_progress(known, self.cutter.numbers(answer), self.wanted.before)
            found[number, row.prompt_length : len(row.ids)] = torch.tensor(changes)
        return found, sum(not known for known in scores)
