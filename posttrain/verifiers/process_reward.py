"""A process reward model as verifier: a score for each step of an answer, and one number of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

from pydantic import Field

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Problem
from posttrain.data.steps import StepCutter, last_tokens
from posttrain.errors import DataError
from posttrain.objectives.process import aggregated
from posttrain.verifiers.reward_model import ScorerConfig, as_trained, load_scorer
from posttrain.verifiers.verdict import Answer, Status, Verdict


class ProcessRewardVerifier:
    """The probability that each step is right, as the method `prm` trains it, put together by `aggregate`.

    Correct if the number is at least the threshold, else wrong. An answer without a step, white space alone, is not
    judged. Rows that are too long lose their beginning, and the steps that end there. Loaded at the first use; draws no
    random numbers. A score that is not finite is a crash.
    """

    name = "process_reward"
    outcome = True

    class Config(ScorerConfig):
        """A process reward model, as the method `prm` trains it, run in the trainer's process on whole batches."""

        type: Literal["process_reward"] = "process_reward"
        separator: str = Field("\n", min_length=1, description="text between two steps, as in its training")
        aggregate: Literal["min", "product", "last", "mean"] = Field(
            "min", description="of the probabilities that each step is right; it is the score"
        )
        threshold: float = Field(0.5, ge=0, le=1, description="scores of at least this much count as correct")

    def __init__(self, config: ProcessRewardVerifier.Config) -> None:
        self.config = config
        self.outcome = config.outcome
        self._loaded: tuple[Any, Any, Renderer] | None = None

    def verify(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer.

        Raises:
            ModelError: the classifier cannot be loaded or is none.
        """
        written = [place for place, answer in enumerate(answers) if self._has_steps(answer.text)]
        verdicts = [Verdict(Status.SKIPPED, None, "there is no step") for _ in answers]
        rows: list[tuple[int, list[int], list[int]]] = []
        for place in written:
            try:
                rows.append((place, *self._row(problems[place], answers[place].text)))
            except DataError as error:
                verdicts[place] = Verdict(Status.UNPARSEABLE, 0.0, error.what)
        for place, scores in self._scores(rows).items():
            verdicts[place] = self._verdict(scores)
        return verdicts

    def step_scores(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[list[float]]:
        """The probability that each step of an answer is right; empty where it has no step, cannot be read, is too long
        for all of them, or a score is not finite. Errors as for `verify`."""
        found: list[list[float]] = [[] for _ in texts]
        rows: list[tuple[int, list[int], list[int]]] = []
        for place, (problem, text) in enumerate(zip(problems, texts, strict=True)):
            if self._has_steps(text):
                with suppress(DataError):
                    ids, ends = self._row(problem, text)
                    rows += [(place, ids, ends)] * (min(ends, default=-1) >= 0)
        for place, scores in self._scores(rows).items():
            found[place] = [_probability(score) for score in scores] if all(map(math.isfinite, scores)) else []
        return found

    def close(self) -> None:
        """Give the memory of the model back."""
        self._loaded = None

    def _has_steps(self, text: str) -> bool:
        return bool(text.strip(f" {self.config.separator}\n\t"))

    def load(self) -> tuple[Any, Any, Renderer]:
        """The classifier, its tokenizer and a renderer with that; loaded once. Errors as for `verify`."""
        if self._loaded is None:
            self._loaded = load_scorer(self.config)
        return self._loaded

    def _row(self, problem: Problem, text: str) -> tuple[list[int], list[int]]:
        """Token ids of prompt and answer, and the places where steps end, below 0 for those that are cut off."""
        _, tokenizer, renderer = self.load()
        sample = renderer.conversation(Example(as_trained(problem, tokenizer), text))
        ends = last_tokens(sample, StepCutter(renderer.text, self.config.separator), renderer.stop_ids)
        cut = max(len(sample.ids) - self.config.max_length, 0)
        return sample.ids[cut:], [end - cut for end in ends]

    def _scores(self, rows: Sequence[tuple[int, list[int], list[int]]]) -> dict[int, list[float]]:
        """Scores of each row's steps, by its place."""
        found: dict[int, list[float]] = {}
        # Rows of about one length share a batch, so little is padding.
        rows = sorted(rows, key=lambda row: len(row[1]))
        for start in range(0, len(rows), self.config.batch_size):
            chosen = rows[start : start + self.config.batch_size]
            for (place, _, ends), scores in zip(chosen, self._outputs([ids for _, ids, _ in chosen]), strict=True):
                found[place] = [scores[end] for end in ends if end >= 0]
        return found

    def _outputs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """The score behind each token of some rows."""
        import torch

        model, tokenizer, _ = self.load()
        batch = tokenizer.pad({"input_ids": list(rows)}, padding_side="right", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            states = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            return model.score(states.last_hidden_state)[..., 0].float().tolist()

    def _verdict(self, scores: Sequence[float]) -> Verdict:
        if not all(map(math.isfinite, scores)):
            return Verdict(Status.CRASH, None, "a score of the process reward model is not finite")
        if not scores:
            return Verdict(Status.SKIPPED, None, "no step ends within max_length")
        rights = [_probability(score) for score in scores]
        number = aggregated(rights, self.config.aggregate)
        shown = " ".join(f"{right:.2f}" for right in rights[:12]) + " ..." * (len(rights) > 12)
        status = Status.CORRECT if number >= self.config.threshold else Status.WRONG
        return Verdict(status, number, f"{self.config.aggregate} of {len(rights)} steps: {shown}")


def _probability(score: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, score)))
