"""Beam search over completions: the likeliest ones, or those that a scorer of partial completions likes best.

The log-probs of a policy trained by DPO are its optimal token-level Q up to a constant (arXiv 2404.12358), so searching
for the likeliest completion is searching over Q. The score is the plain sum of log-probs, without a length penalty: a
division by the length would be another objective.

A search keeps `width` unfinished completions per prompt. Each step extends all of them by their likeliest tokens,
scores the extensions, and keeps the best; extensions that end stand apart, and count where they are among the `width`
best. Nothing is drawn. Where scores only fall as a completion grows, a search ends as soon as nothing unfinished can
still get among the best; the result is the same as at the token limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Beam:
    """A completion as far as it is written.

    Attributes:
        prompt: number of its prompt within the search.
        ids: its tokens.
        logps: their log-probs under the policy.
        score: what it is ranked by; higher is better.
        stopped: its last token is a stop token.
    """

    prompt: int
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    score: float = 0.0
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Extensions:
    """Beams and the tokens that may follow them. R beams, K tokens each.

    Attributes:
        beams: R of them.
        tokens: (R, K) ids, likeliest first.
        logps: (R, K) float64 log-probs of these tokens.
        totals: (R, K) float64 log-probs of the completions that end with them, summed over tokens.
        prompts: token ids of the search's prompts; `beams[r].prompt` is a number into it.
    """

    beams: Sequence[Beam]
    tokens: Tensor
    logps: Tensor
    totals: Tensor
    prompts: Sequence[Sequence[int]]


class BeamScorer(Protocol):
    """Scores extensions, (R, K) float64, higher is better: a value model of partial completions may stand here.

    Attributes:
        falls: whether a completion never scores higher than what it began with, so that a search may end early.
    """

    falls: bool

    def __call__(self, extensions: Extensions) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-prob of the whole completion: the policy's own Q, up to a constant."""

    falls: bool = True

    def __call__(self, extensions: Extensions) -> Tensor:
        return extensions.totals


LIKELIHOOD = Likelihood()

Advance = Callable[[list[int], list[int]], Tensor]
"""(rows to keep, in order and possibly several times; token for each) -> (R, V) logits of what follows."""


@dataclass(slots=True)
class _Search:
    """The search of one prompt."""

    width: int
    finished: list[Beam] = field(default_factory=list)
    running: list[tuple[int, Beam]] = field(default_factory=list)

    def extend(self, ranked: Sequence[tuple[int, Beam]], *, last: bool) -> None:
        """Take over the best extensions, given from the best on with the row that each came from."""
        self.running = []
        for rank, (row, beam) in enumerate(ranked):
            if beam.stopped or last:
                if rank < self.width:
                    self.finished.append(beam)
            elif len(self.running) < self.width:
                self.running.append((row, beam))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.width]

    def over(self, n: int, *, falls: bool) -> bool:
        """Whether the n best finished ones are known."""
        if not self.running:
            return True
        return falls and len(self.finished) >= n and self.finished[n - 1].score >= self.running[0][1].score


@torch.no_grad()
def beam_search(
    prompts: Sequence[Sequence[int]],
    logits: Tensor,
    advance: Advance,
    *,
    width: int,
    n: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    scorer: BeamScorer = LIKELIHOOD,  # type: ignore[assignment]  # frozen, where the protocol only reads
) -> list[list[Beam]]:
    """The `n` best completions of each prompt that a search of this width finds, best first.

    Args:
        prompts: token ids; the scorer may read them.
        logits: (P, V) of the first token of each prompt.
        advance: reads a token into each of the rows that go on. Rows begin as 0..P-1.
        width: beams per prompt.
        n: completions per prompt, at most `width`.
        max_new_tokens: tokens, the stop token included; what is longer ends there.
        stop_ids: tokens that end a completion.
        scorer: ranks extensions.

    Returns:
        Per prompt n beams, fewer where the vocabulary does not give so many completions.
    """
    stops = frozenset(stop_ids)
    searches = [_Search(width) for _ in prompts]
    rows = [Beam(prompt) for prompt in range(len(prompts))]
    for step in range(1, max_new_tokens + 1):
        _extend(searches, rows, logits, prompts, stops, scorer, last=step == max_new_tokens)
        alive = [search for search in searches if not search.over(n, falls=scorer.falls)]
        if not alive:
            break
        going = [pair for search in alive for pair in search.running]
        for search in searches:
            search.running = []
        rows = [beam for _, beam in going]
        logits = advance([row for row, _ in going], [beam.ids[-1] for beam in rows])
    return [search.finished[:n] for search in searches]


def _extend(
    searches: Sequence[_Search],
    rows: Sequence[Beam],
    logits: Tensor,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    scorer: BeamScorer,
    *,
    last: bool,
) -> None:
    """One step of every search that has rows."""
    width = searches[0].width
    # So many hold `width` extensions that go on, even if every stop token comes first.
    most = (1 + len(stops)) * width
    logps, tokens = logits.double().log_softmax(-1).topk(min(most, logits.size(-1)), dim=-1)
    before = torch.tensor([sum(beam.logps) for beam in rows], dtype=torch.float64, device=logits.device)
    extensions = Extensions(rows, tokens, logps, before.unsqueeze(1) + logps, prompts)
    scores, columns = scorer(extensions), tokens.size(1)
    token_lists, logp_lists = tokens.tolist(), logps.tolist()
    by_prompt: dict[int, list[int]] = {}
    for row, beam in enumerate(rows):
        by_prompt.setdefault(beam.prompt, []).append(row)
    for prompt, mine in by_prompt.items():
        flat = scores[mine].flatten()
        ranked = []
        for place in flat.argsort(descending=True, stable=True)[:most].tolist():
            row, column = mine[place // columns], place % columns
            beam, token = rows[row], token_lists[row][column]
            ids, written = (*beam.ids, token), (*beam.logps, logp_lists[row][column])
            ranked.append((row, Beam(prompt, ids, written, float(flat[place]), token in stops)))
        searches[prompt].extend(ranked, last=last)
