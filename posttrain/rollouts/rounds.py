"""Sampling in rounds: prompts to traces, with an engine and a judge. One process does it here, or several workers.

Completion k of problem p is drawn with the numbers (seed, p, k), whatever stands beside it in a batch; a problem is
sampled in rounds, and whether it needs more is decided at the end of a round from the verdicts so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.config.collection import SampleSettings
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.traces import Earlier, Manifest, Trace
from posttrain.rollouts.engine import Completion, Engine, Sampling
from posttrain.rollouts.provenance import judged
from posttrain.rollouts.revise import Chain, revise
from posttrain.rollouts.sentence_control import Controlled, controlled
from posttrain.tracking.ledger import Looks, Size
from posttrain.verifiers.verdict import Judge, Judgement


@dataclass(slots=True)
class RoundProgress:
    """A problem with its number and prompt, and how far it is: completions so far, and correct ones among them."""

    number: int
    problem: Problem
    ids: list[int]
    samples: int = 0
    correct: int = 0

    def count(self, trace: Trace) -> None:
        """Take note of a completion."""
        self.samples += 1
        self.correct += trace.correct


def wants_more(config: SampleSettings, state: RoundProgress) -> bool:
    """Whether a problem needs further completions."""
    if state.samples >= config.rollouts.samples_per_prompt:
        return False
    enough = config.stop_at_correct
    between_rounds = state.samples % config.round_size == 0
    return not (enough is not None and between_rounds and state.correct >= enough)


class Rounds:
    """Samples and verifies.

    Args:
        config: how.
        manifest: of the traces.
        engine: samples from the policy.
        judge: verifies.
        renderer: gives the text of completions, and the prompts of revisions.
        looks: what of the policy looks at pictures, as compute is counted; None for one of text.
    """

    def __init__(
        self,
        config: SampleSettings,
        manifest: Manifest,
        engine: Engine,
        judge: Judge,
        renderer: Renderer,
        looks: Looks | None = None,
    ) -> None:
        self.config, self.manifest = config, manifest
        self.engine, self.judge, self.renderer = engine, judge, renderer
        self.size = Size(manifest.parameters or 1, looks=looks)

    def run(self, chunk: Sequence[RoundProgress]) -> Iterator[list[Trace]]:
        """All that the problems still need, the traces of one call of the engine at a time. `chunk` is kept up."""
        going = [state for state in chunk if wants_more(self.config, state)]
        while going:
            for group in _alike(going, self._round_end):
                yield self._sample(group)
            going = [state for state in going if wants_more(self.config, state)]

    def _round_end(self, state: RoundProgress) -> int:
        size = self.config.round_size
        return min((state.samples // size + 1) * size, self.config.rollouts.samples_per_prompt)

    def _sample(self, group: Sequence[RoundProgress]) -> list[Trace]:
        rollouts, first = self.config.rollouts, group[0].samples
        sampling = Sampling(
            n=self._round_end(group[0]) - first,
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            top_p=rollouts.top_p,
            top_k=rollouts.top_k,
            seed=self.config.seed,
            first_sample=first,
            prompt_numbers=tuple(state.number for state in group),
        )
        if self.config.sentences is not None:
            chains = self._controlled(group, sampling)
        else:
            chains = self._chains(group, sampling)
        if self.config.revisions:
            revise(self.engine, self.renderer, chains, self.config)
        verified = self._judged(chains)
        traces = []
        for state in group:
            for _ in range(sampling.n):
                traces.append(self._trace(state, *next(verified)))
                state.count(traces[-1])
        return traces

    def _chains(self, group: Sequence[RoundProgress], sampling: Sampling) -> list[Chain]:
        answers, first, rollouts = self._answers(group, sampling), sampling.first_sample, self.config.rollouts
        readings = -(-sampling.n // rollouts.max_batch)  # the engine reads a prompt once for each batch it is in
        return [
            Chain(state.number, first + index, state.problem, state.ids, completion, 0 if index else readings)
            for state, answer in zip(group, answers, strict=True)
            for index, completion in enumerate(answer)
        ]

    def _controlled(self, group: Sequence[RoundProgress], sampling: Sampling) -> list[Chain]:
        """Without log-probs: controllers are no samples."""
        assert self.config.sentences is not None  # or nobody asks
        prompts = [state.ids for state in group]
        found = controlled(self.engine, self.renderer, prompts, sampling, self.config.sentences)
        chains = []
        for state, answers in zip(group, found, strict=True):
            for index, answer in enumerate(answers):
                finish: Literal["stop", "length"] = "stop" if answer.finished else "length"
                completion = Completion(answer.ids, [], finish, self.engine.policy_version)
                chain = Chain(state.number, sampling.first_sample + index, state.problem, state.ids, completion, 0)
                chain.read_tokens, chain.sentences = answer.read, answer
                chains.append(chain)
        return chains

    def _step_ends(self, answer: Controlled) -> list[int]:
        """Characters up to the end of each sentence that adds any."""
        ends = [len(self.renderer.text(answer.ids[:end])) for end in answer.ends]
        return [end for before, end in zip([0, *ends], ends, strict=False) if end > before]

    def _answers(self, group: Sequence[RoundProgress], sampling: Sampling) -> list[list[Completion]]:
        prompts = [state.ids for state in group]
        if self.config.beams is None:
            return self.engine.generate(prompts, sampling)
        # A search gives all completions at once, so one that was broken off among them is made again.
        first, whole = sampling.first_sample, sampling.first_sample + sampling.n
        search = replace(sampling, n=whole, first_sample=0, beams=self.config.beams)
        return [found[first:] for found in self.engine.generate(prompts, search)]

    def _judged(self, chains: Sequence[Chain]) -> Iterator[tuple[Chain, list[str], list[Judgement]]]:
        """Each chain with the texts of its answers and what the verifiers say of them."""
        texts = [[self.renderer.text(completion.ids) for completion in chain.answers] for chain in chains]
        asked = [chain.problem for chain in chains for _ in chain.answers]
        ids = [completion.ids for chain in chains for completion in chain.answers]
        flat = [text for written in texts for text in written]
        found = iter(self.judge.judge(asked, flat, [len(each) for each in ids], ids))
        for chain, written in zip(chains, texts, strict=True):
            yield chain, written, [next(found) for _ in written]

    def _trace(self, state: RoundProgress, chain: Chain, texts: list[str], judgements: list[Judgement]) -> Trace:
        problem, completion, read = state.problem, chain.answers[-1], chain.read_tokens
        *before, text = texts
        *verdicts, judgement = judgements
        earlier = [
            Earlier(said, verdict.status.value, verdict.outcome, len(answer.ids))
            for said, verdict, answer in zip(before, verdicts, chain.answers, strict=False)
        ]
        # A search is charged for all its beams, each as long as what it found.
        first, *revised = (len(answer.ids) for answer in chain.answers)
        beams = self.config.beams or 1
        kept = 1 if self.config.beams is None else self.config.rollouts.samples_per_prompt
        sampled = round(beams * first / kept) + beams * sum(revised)
        sentences = chain.sentences
        if sentences is not None:
            sampled = sentences.drawn
        return Trace(
            problem_id=problem.id,
            sample=state.samples,
            prompt=problem.prompt,
            text=text,
            policy=self.manifest.policy["label"],
            manifest=self.manifest.id,
            reference=problem.reference,
            meta=problem.meta,
            chat=problem.chat,
            prompt_ids=chain.prompt_ids,
            ids=completion.ids,
            logps=None if sentences is not None else [round(value, 6) for value in completion.logps],
            policy_version=completion.policy_version,
            finished=completion.finish == "stop",
            **judged(judgement),
            seed=self.config.seed,
            read_tokens=read,
            flops=self.size.forward * (read + sampled)
            + (self.size.looking(self.renderer.pixels([chain.prompt_ids])) if read else 0),
            earlier=earlier,
            step_ends=None if sentences is None else self._step_ends(sentences),
        )


def _alike(chunk: Sequence[RoundProgress], round_end: Callable[[RoundProgress], int]) -> Iterator[list[RoundProgress]]:
    """Prompts that go on at the same completion, to the same end; a kill can leave some in the middle of a round."""
    groups: dict[tuple[int, int], list[RoundProgress]] = {}
    for state in chunk:
        groups.setdefault((state.samples, round_end(state)), []).append(state)
    yield from groups.values()
