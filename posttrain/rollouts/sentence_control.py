"""Answers whose sentences are each asked for levels of their own, by a policy that was trained with `ldc`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from posttrain.config.sentences import SentenceControl
from posttrain.data.controllers import controllers
from posttrain.data.rendering import Renderer
from posttrain.rollouts.engine import Completion, Engine, Sampling


@dataclass(slots=True)
class Controlled:
    """An answer, with the controllers before each of its sentences.

    Attributes:
        ids: all of it.
        ends: tokens of `ids` up to the end of each sentence.
        finished: whether it ended by a stop token.
        read: tokens that the engine read for it.
        drawn: tokens that the policy wrote, those behind the ends of sentences included, which are thrown away.
    """

    ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    finished: bool = False
    read: int = 0
    drawn: int = 0


def controlled(
    engine: Engine, renderer: Renderer, prompts: Sequence[Sequence[int]], sampling: Sampling, config: SentenceControl
) -> list[list[Controlled]]:
    """`sampling.n` answers for each prompt, written sentence by sentence.

    Before each sentence its controllers are written, so the policy goes on by them; what it writes behind the end of
    the sentence is thrown away, but behind the last controllers. An answer has fewer sentences where it ends early, or
    where the model has no room for one more.

    Args:
        engine: of the policy.
        renderer: with its tokenizer.
        prompts: token ids of each.
        sampling: `max_new_tokens` is for a sentence. The draws of a sentence depend on (seed, its number, prompt,
            completion) alone.
        config: the levels. Where a token holds more than the end of a sentence, the whole token belongs to it.

    Raises:
        EngineError: a prompt with its first controllers leaves no room for a sentence.
    """
    answers = [[Controlled() for _ in range(sampling.n)] for _ in prompts]
    numbers = [sampling.draw(place, 0)[0] for place in range(len(prompts))]
    longest = None if engine.positions is None else engine.positions - sampling.max_new_tokens
    for number, levels in enumerate(config.levels):
        asked = renderer.tokenizer(controllers(levels, config.template), add_special_tokens=False)["input_ids"]
        how = replace(sampling, seed=sentence_seed(sampling.seed, number))
        if number == 0:
            begun = [[*prompt, *asked] for prompt in prompts]
            found = engine.generate(begun, replace(how, prompt_numbers=tuple(numbers)))
            for read, group, completions in zip(begun, answers, found, strict=True):
                group[0].read += len(read)
                for answer, completion in zip(group, completions, strict=True):
                    _take(answer, asked, completion, renderer, config, number)
            continue
        # The completions of one number together: numbers of a draw are those of problem and completion.
        for sample in range(sampling.n):
            going = [
                place
                for place, group in enumerate(answers)
                if not group[sample].finished
                and (longest is None or len(prompts[place]) + len(group[sample].ids) + len(asked) <= longest)
            ]
            if not going:
                continue
            reads = [[*prompts[place], *answers[place][sample].ids, *asked] for place in going]
            one = replace(
                how,
                n=1,
                first_sample=sampling.first_sample + sample,
                prompt_numbers=tuple(numbers[place] for place in going),
            )
            for place, read, (completion,) in zip(going, reads, engine.generate(reads, one), strict=True):
                answers[place][sample].read += len(read)
                _take(answers[place][sample], asked, completion, renderer, config, number)
    return answers


def sentence_seed(seed: int, number: int) -> int:
    """Seed of the draws of a sentence, from 0; that of the first is the run's."""
    if number == 0:
        return seed
    digest = hashlib.sha256(f"sentence {number} of {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def up_to_the_end(ids: Sequence[int], renderer: Renderer, sentence_end: str) -> list[int]:
    """The tokens up to the first that completes the end of a sentence; all where none does."""
    for length in range(1, len(ids) + 1):
        if sentence_end in renderer.text(ids[:length]):
            return list(ids[:length])
    return list(ids)


def _take(
    answer: Controlled,
    asked: Sequence[int],
    completion: Completion,
    renderer: Renderer,
    config: SentenceControl,
    number: int,
) -> None:
    last = number == len(config.levels) - 1
    kept = completion.ids if last else up_to_the_end(completion.ids, renderer, config.end)
    answer.ids += [*asked, *kept]
    answer.ends.append(len(answer.ids))
    answer.drawn += len(completion.ids)
    answer.finished = len(kept) == len(completion.ids) and completion.finish == "stop"
