"""Value-guided search over steps: sample several continuations of a step, keep those that a value model likes best.

As in OREO (arXiv 2412.16145): each of `width` unfinished texts is continued `width` times up to the end of a step, the
value model scores all texts, the best `width` different ones go on; finished ones stand apart, and the best of them is
the answer. A finished text is scored before its end token, where value models are trained. Where no step ends before
the text does, that is best of n: `width` whole samples, of which the value model chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from posttrain.config.schema import ModelConfig, ValueSearchConfig
from posttrain.data.rendering import Renderer
from posttrain.errors import EngineError, ModelError
from posttrain.models.value import ValueScorer, load_value_model
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine

Value = Callable[[Sequence[Sequence[int]]], list[float]]
"""Value of each row of token ids, prompt included: `models.value.ValueScorer`."""


@dataclass(frozen=True, slots=True)
class Partial:
    """A completion as far as it is written."""

    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    stopped: bool = False
    value: float = 0.0


def step_ends(text: Callable[[Sequence[int]], str], vocabulary: int, delimiter: str) -> list[int]:
    """Ids of the tokens that hold the delimiter.

    Raises:
        ModelError: there is none.
    """
    found = [token for token in range(vocabulary) if delimiter in text([token])]
    if not found:
        raise ModelError(
            f"no token of the vocabulary holds {delimiter!r}, so no step would end",
            where="value.delimiter",
            hint="give the last character of what ends a step",
        )
    return found


class ValueSearchEngine(TransformersEngine):
    """A `TransformersEngine` whose search (`Sampling.beams` > 1) is guided by a value model over steps. All else stays.

    Args:
        model, stop_ids, pad_id, max_batch: as there.
        value: scores texts.
        step_ids: tokens that end a step, from `step_ends`; none for best of n.
        max_steps: steps of a completion at most; what is unfinished then is cut.
        temperature: of the continuations.

    Attributes:
        tokens_drawn: tokens sampled by searches so far, those of dropped texts included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        max_batch: int,
        value: Value,
        step_ids: Sequence[int],
        max_steps: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, stop_ids=stop_ids, pad_id=pad_id, max_batch=max_batch)
        steps = [*self.stop_ids, *(token for token in step_ids if token not in set(self.stop_ids))]
        self._steps = TransformersEngine(model, stop_ids=steps, pad_id=pad_id, max_batch=max_batch)
        self.value, self.max_steps, self.temperature = value, max_steps, temperature
        self.tokens_drawn = 0

    def _search(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        if not sampling.n <= sampling.beams:
            raise EngineError(f"a search of width {sampling.beams} gives at most that many completions per prompt")
        going: dict[int, list[Partial]] = {number: [Partial()] for number in range(len(prompts))}
        done: dict[int, list[Partial]] = {number: [] for number in going}
        for step in range(self.max_steps):
            if not any(going.values()):
                break
            grown = self._continued(prompts, going, sampling, step)
            for number, texts in grown.items():
                best = sorted(texts, key=lambda text: -text.value)
                open_ones = [t for t in best if not t.stopped and len(t.ids) < sampling.max_new_tokens]
                done[number] += [t for t in best if t.stopped or len(t.ids) >= sampling.max_new_tokens]
                going[number] = open_ones[: sampling.beams]
        return [self._best(done[number] or going[number], going[number], sampling.n) for number in range(len(prompts))]

    def _continued(
        self, prompts: Sequence[Sequence[int]], going: dict[int, list[Partial]], sampling: Sampling, step: int
    ) -> dict[int, list[Partial]]:
        """Every unfinished text one step further, `beams` times, different ones only, with their values."""
        flat = [(number, place, text) for number, texts in going.items() for place, text in enumerate(texts)]
        contexts = [[*prompts[number], *text.ids] for number, _, text in flat]
        # Of each text alone, so that what stands beside it changes nothing. With its prompt that fits the positions.
        limits = [sampling.max_new_tokens - len(text.ids) for _, _, text in flat]
        seed = int(np.random.SeedSequence([sampling.seed, step]).generate_state(1, np.uint64)[0])
        drawn = Sampling(
            n=sampling.beams,
            max_new_tokens=max(limits),
            temperature=self.temperature,
            seed=seed,
            prompt_numbers=tuple(sampling.draw(number, 0)[0] * sampling.beams + place for number, place, _ in flat),
        )
        found: dict[int, dict[tuple[int, ...], Partial]] = {number: {} for number, texts in going.items() if texts}
        for (number, _, text), group in zip(flat, self._steps.generate(contexts, drawn, limits), strict=True):
            for one in group:
                self.tokens_drawn += len(one.ids)
                ids = (*text.ids, *one.ids)
                found[number].setdefault(ids, Partial(ids, (*text.logps, *one.logps), ids[-1] in self.stop_ids))
        return {number: self._valued(prompts[number], list(texts.values())) for number, texts in found.items()}

    def _valued(self, prompt: Sequence[int], texts: list[Partial]) -> list[Partial]:
        values = self.value([[*prompt, *(text.ids[:-1] if text.stopped else text.ids)] for text in texts])
        return [Partial(t.ids, t.logps, t.stopped, value) for t, value in zip(texts, values, strict=True)]

    def _best(self, finished: list[Partial], going: list[Partial], n: int) -> list[Completion]:
        """The n best; where fewer are finished, unfinished ones, and then the best again, fill up."""
        ranked = sorted(finished, key=lambda text: (not text.stopped, -text.value))
        ranked += [text for text in going if text not in ranked]
        chosen = (ranked * n)[:n]
        return [
            Completion(list(t.ids), list(t.logps), "stop" if t.stopped else "length", self.policy_version)
            for t in chosen
        ]


def search_engine(
    model: PreTrainedModel,
    config: ModelConfig,
    renderer: Renderer,
    value: ValueSearchConfig | None,
    *,
    pad_id: int,
    max_batch: int,
) -> TransformersEngine:
    """The engine of `posttrain eval` and `posttrain sample`: with a value model if there is one.

    Raises:
        ModelError: the value model cannot be loaded or does not fit, or no token ends a step.
    """
    common: dict[str, Any] = {"stop_ids": renderer.stop_ids, "pad_id": pad_id, "max_batch": max_batch}
    if value is None:
        return TransformersEngine(model, **common)
    vocabulary = model.get_input_embeddings().num_embeddings
    ends = [] if value.delimiter is None else step_ends(renderer.text, len(renderer.tokenizer), value.delimiter)
    loaded = load_value_model(value.path, like=config, vocabulary=vocabulary, where="value.path").to(model.device)
    return ValueSearchEngine(
        model,
        **common,
        value=ValueScorer(loaded.requires_grad_(False), pad_id=pad_id, max_batch=max_batch),
        step_ids=ends,
        max_steps=value.max_steps,
        temperature=value.temperature,
    )
