"""The reasoner of a run (`companions.Reasoner`): a frozen language model that goes on from what the policy describes.

The two models share no vocabulary, so text goes from one to the other: the description as the policy's tokenizer reads
it, in a prompt of the reasoner's own template, and back the reasoning, as the policy's tokenizer writes it behind the
description, whose ids stay as they were sampled. Draws are functions of (seed, rollout, prompt, completion).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.schema import Recipe
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.errors import DataError
from posttrain.methods.base import Start
from posttrain.methods.companions import DESCRIPTION, Reasoner, Writer
from posttrain.models.loading import load_policy
from posttrain.models.reasoned import WHERE, of_text, question
from posttrain.models.vocabulary import blamed_on
from posttrain.rollouts.engine import Completion, Engine, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.writer import ROLL_OUT_STREAM, Ended, Spent, WritingModel


def load_reasoner(recipe: Recipe, wanted: Reasoner) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reasoner and its tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    with blamed_on(WHERE):
        return load_policy(of_text(recipe, wanted), seed=recipe.seed)


class ReasoningModel(WritingModel):
    """A frozen language model that ends completions from their text.

    Args:
        engine: samples from it.
        wanted: how.
        policy, own: render for the policy and for the reasoner.
        seed: of the run.
    """

    def __init__(
        self, engine: TransformersEngine, wanted: Reasoner, policy: Renderer, own: Renderer, seed: int
    ) -> None:
        super().__init__(engine, Writer(wanted.path, wanted.top_p, begins=False), seed)
        self.wanted, self.policy, self.own = wanted, policy, own

    def shares(self, sampling: Sampling, limits: Sequence[int]) -> tuple[Sampling, list[int]]:
        """A description for every so many completions."""
        most = self.wanted.description_tokens or sampling.max_new_tokens
        return replace(sampling, n=sampling.n // self.wanted.number), [min(limit, most) for limit in limits]

    def end(
        self,
        window: int,
        problems: Sequence[Problem],
        starts: Sequence[Start],
        contexts: Sequence[list[int]],
        completions: Sequence[Sequence[Completion]],
        sampling: Sampling,
        limits: Sequence[int],
        policy: Engine | None = None,
    ) -> tuple[list[list[Ended]], Spent]:
        """`sampling.n` completions for each context: every description with its reasonings, one after another.

        A description that the reasoner cannot read, because it is empty or too long for it, stays without one.
        """
        number, positions = self.wanted.number, self.engine.positions
        ended: list[list[Ended]] = []
        places, prompts, numbers, left = [], [], [], []
        for local, (problem, group) in enumerate(zip(problems, completions, strict=True)):
            ended.append([])
            for i, completion in enumerate(group):
                kept, text = self._described(completion)
                begun = replace(completion, ids=completion.ids[:kept], logps=completion.logps[:kept], finish="length")
                asked = self._asked(problem, text)
                room = limits[local] - kept
                if positions is not None:
                    room = min(room, positions - len(asked))
                if asked and room >= 1:
                    places.append((local, len(ended[local])))
                    prompts.append(asked)
                    numbers.append((sampling.first_prompt + local) * len(group) + i)
                    left.append(room)
                first = begun if asked and room >= 1 else completion
                ended[local] += [Ended(first, info={DESCRIPTION: float(i)})] * number
        if not prompts:
            return ended, Spent()
        own = replace(self._own(sampling, window, ROLL_OUT_STREAM), n=number, prompt_numbers=tuple(numbers))
        written = self.engine.generate(prompts, own, limits=left)
        for (local, at), reasonings in zip(places, written, strict=True):
            for i, reasoning in enumerate(reasonings):
                start = ended[local][at + i]
                joined = self._joined(start.completion, reasoning, problems[local], limits[local])
                ended[local][at + i] = replace(joined, info=start.info)
        sampled = sum(len(reasoning.ids) for group in written for reasoning in group)
        return ended, Spent(self.engine.read_tokens(prompts, own), sampled)

    def _described(self, completion: Completion) -> tuple[int, str]:
        """How many tokens of a completion are its description, and its text without what ends it."""
        ids, mark = completion.ids[: len(completion.ids) - (completion.finish == "stop")], self.wanted.description_end
        text = self.policy.text(ids)
        if mark not in text:
            return len(ids), text
        kept = bisect_left(range(len(ids)), True, key=lambda k: mark in self.policy.text(ids[:k]))
        return kept, text[: text.index(mark)]

    def _asked(self, problem: Problem, description: str) -> list[int]:
        """Ids of the reasoner's prompt; none where it would be empty, or not what a prompt may be."""
        if not description.strip():
            return []
        try:
            return self.own.prompt_ids(question(problem, description, self.wanted.template))
        except DataError:  # a description may spell what no prompt may hold; that one can hold any, the start has shown
            return []

    def _joined(self, begun: Completion, reasoning: Completion, problem: Problem, limit: int) -> Ended:
        """A description with a reasoning in the policy's tokens behind it."""
        ids = self.policy.encoder.behind(self.own.text(reasoning.ids))
        ids = ids[: next((i for i, token in enumerate(ids) if token in self.policy.stop_ids), len(ids))]
        if reasoning.finish == "stop":
            ids.append(self._end(problem))
        room = limit - len(begun.ids)
        finish = reasoning.finish if len(ids) <= room else "length"
        ids = ids[:room]
        whole = replace(begun, ids=begun.ids + ids, logps=begun.logps + [0.0] * len(ids), finish=finish)
        return Ended(whole, len(ids))

    def _end(self, problem: Problem) -> int:
        """The token that ends a reply of the policy's."""
        template = self.policy.template
        plain = template is None or (isinstance(problem.prompt, str) and problem.chat is False)
        end = None if plain else template.turn_end
        return self.policy.tokenizer.eos_token_id if end is None else end.id
