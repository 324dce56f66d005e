"""Answers whose sentences are each asked for levels of their own, by a policy that was trained with `ldc`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from posttrain.data.controllers import TEMPLATE, controllers
from posttrain.data.rendering import Renderer
from posttrain.rollouts.engine import Engine, Sampling


def controlled(
    engine: Engine,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    schedule: Sequence[Mapping[str, float]],
    sampling: Sampling,
    *,
    sentence_end: str,
    template: str = TEMPLATE,
) -> list[list[str]]:
    """Sentences of one answer per prompt, without the controllers that stand before each.

    Before sentence k the controllers of `schedule[k]` are written, so the policy goes on by them; what it writes behind
    the end of a sentence is thrown away, but for the last entry, which the rest of the answer is written by. An answer
    that ends early has fewer sentences.

    Args:
        engine: of the policy.
        renderer: with its tokenizer.
        prompts: token ids of each.
        schedule: quality -> level for each sentence.
        sampling: `n` is read as 1, `max_new_tokens` is for a sentence; draws differ from one sentence to the next.
        sentence_end: text that ends a sentence; where a token holds more, the whole token belongs to it.
        template: of the controllers, as in training.

    Raises:
        EngineError: a prompt with what was written leaves no room for a sentence.
    """
    read = [list(prompt) for prompt in prompts]
    answers: list[list[str]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for number, levels in enumerate(schedule):
        if not going:
            break
        ids = renderer.tokenizer(controllers(levels, template), add_special_tokens=False)["input_ids"]
        for place in going:
            read[place] += ids
        how = replace(sampling, n=1, first_sample=sampling.first_sample + number, prompt_numbers=tuple(going))
        found = engine.generate([read[place] for place in going], how)
        going_on = []
        for place, (completion,) in zip(going, found, strict=True):
            last = number == len(schedule) - 1
            written = completion.ids if last else up_to_the_end(completion.ids, renderer, sentence_end)
            read[place] += written
            answers[place].append(renderer.text(written))
            if len(written) < len(completion.ids) or completion.finish == "length":
                going_on.append(place)
        going = going_on
    return answers


def up_to_the_end(ids: Sequence[int], renderer: Renderer, sentence_end: str) -> list[int]:
    """The tokens up to the first that completes the end of a sentence; all where none does."""
    for length in range(1, len(ids) + 1):
        if sentence_end in renderer.text(ids[:length]):
            return list(ids[:length])
    return list(ids)
