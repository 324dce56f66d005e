"""Rollouts with the trainer's own transformers model: no second copy of the weights, no sync, any device.

A prompt is read once and its cache shared by its completions, what several prompts of a batch begin with is read once
for all of them (`rollouts.shared_prompts`), and finished rows leave the batch. For more speed on large models use a
vLLM engine; this one is the reference that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import EngineError
from posttrain.models.modes import without_dropout
from posttrain.objectives.action_mask import ActionMask
from posttrain.rollouts.beam import LIKELIHOOD, Beam, BeamScorer, beam_search
from posttrain.rollouts.engine import Completion, Sampling, token_limits
from posttrain.rollouts.mask_pass import MaskPass
from posttrain.rollouts.mixture_pass import MixturePass
from posttrain.rollouts.sampling import choose, uniforms
from posttrain.rollouts.shared_prompts import plan_for, reading_order, tokens_read
from posttrain.rollouts.texts import Texts, Way, positions, read_texts, sampling_way

COMPACT_SHARE = 0.75
"""Finished rows are dropped from the batch once fewer than this share of its rows is still running."""


class TransformersEngine:
    """Samples from a model that lives in this process.

    Args:
        model: the policy itself, unwrapped; it is put into eval mode while sampling and back after.
        stop_ids: token ids that end a completion.
        pad_id: id used for padding; never attended to.
        max_batch: sequences held at once.
        scorer: ranks the completions of a beam search; default: by their log-prob.
        gathered: a context in which the model is whole, entered by all ranks; for weights that are sharded over them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        max_batch: int,
        scorer: BeamScorer = LIKELIHOOD,  # type: ignore[assignment]  # frozen, where the protocol only reads
        gathered: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        self.model, self.stop_ids, self.pad_id, self.max_batch = model, list(stop_ids), pad_id, max_batch
        self.scorer, self.gathered = scorer, gathered
        self.policy_version, self._is_whole = 0, False
        self._way: Way = "padded"
        self._mask: ActionMask | None = None
        self._other: tuple[PreTrainedModel, float] | None = None

    @property
    def positions(self) -> int | None:
        """See `Engine.positions`."""
        return positions(self.model)

    def sync(self, version: int) -> dict[str, float]:
        """Only the stamp changes: the weights are the trainer's own."""
        self.policy_version = version
        return {}

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Engine.together`."""
        if self._is_whole:
            yield
            return
        with self.gathered():
            self._is_whole = True
            try:
                yield
            finally:
                self._is_whole = False

    @contextmanager
    def masked(self, mask: ActionMask | None) -> Iterator[None]:
        """Inside the block, tokens that the mask does not allow have probability 0, in draws and in log-probs. Not for
        beam searches. None changes nothing."""
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None

    @contextmanager
    def mixed(self, other: PreTrainedModel, share: float) -> Iterator[None]:
        """Inside the block, tokens are drawn from logits that are `other`'s by this share: a geometric mixture of the
        distributions. Not for beam searches, nor beside a mask. Both models are of one type and vocabulary."""
        self._other = (other, share)
        try:
            with without_dropout(other):
                yield
        finally:
            self._other = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Where weights are sharded, all ranks call it, or it stands within `together`."""
        with self.together():
            return self._generate(prompts, sampling, token_limits(prompts, sampling, limits))

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Sequence[int]
    ) -> list[list[Completion]]:
        self._check(prompts, limits)
        self._way = sampling_way(self.model, self.pad_id)
        results: list[list[Completion | None]] = [[None] * sampling.n for _ in prompts]
        with without_dropout(self.model):
            if sampling.beams > 1:
                return self._search(prompts, sampling)
            for batch in self._batches(prompts, sampling):
                done = self._run(prompts, batch, sampling, limits)
                for (prompt, sample), completion in zip(batch, done, strict=True):
                    results[prompt][sample] = completion
        return results

    def read_tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """See `Engine.read_tokens`."""
        rows = max(min(sampling.n, self.max_batch), sampling.beams)
        asked = ([prompts[i] for i in batch] for batch in self._together(prompts, rows, sampling))
        return -(-sampling.n // self.max_batch) * sum(tokens_read(plan_for(self.model, own), own) for own in asked)

    def _check(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        positions = self.positions
        for index, (prompt, new) in enumerate(zip(prompts, limits, strict=True)):
            if not prompt:
                raise EngineError(f"prompt {index} is empty", hint="give it at least a BOS token")
            if positions is not None and len(prompt) + new > positions:
                raise EngineError(
                    f"prompt {index} has {len(prompt)} tokens; with {new} new ones it exceeds the "
                    f"model's {positions} positions",
                    hint="lower max_new_tokens, or leave out longer prompts (data.max_prompt_length)",
                )

    def _search(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Beam search, so many prompts at once that all beams fit into a batch."""
        if not sampling.n <= sampling.beams <= self.max_batch:
            raise EngineError(
                f"a beam search of width {sampling.beams} gives 1 to {sampling.beams} completions and needs a batch of "
                f"{sampling.beams}; asked for {sampling.n} with max_batch {self.max_batch}"
            )
        results: list[list[Completion]] = [[] for _ in prompts]
        for batch in self._together(prompts, sampling.beams, sampling):
            asked = [prompts[number] for number in batch]
            texts = read_texts(self.model, asked, self.pad_id, self._way)
            found = beam_search(
                asked,
                texts.logits,
                partial(self._advance_beams, texts),
                width=sampling.beams,
                n=sampling.n,
                max_new_tokens=sampling.max_new_tokens,
                stop_ids=self.stop_ids,
                scorer=self.scorer,
            )
            for number, beams in zip(batch, found, strict=True):
                if len(beams) < sampling.n:
                    raise EngineError(f"there are only {len(beams)} completions of prompt {number} of that length")
                results[number] = [self._completion(beam) for beam in beams]
        return results

    def _advance_beams(self, texts: Texts, rows: list[int], tokens: list[int]) -> Tensor:
        """The model as a search drives it: beams go on, several times or not at all."""
        texts.select(torch.tensor(rows, device=texts.logits.device))
        texts.advance(torch.tensor(tokens, device=texts.logits.device))
        return texts.logits

    def _completion(self, beam: Beam) -> Completion:
        return Completion(list(beam.ids), list(beam.logps), "stop" if beam.stopped else "length", self.policy_version)

    def _batches(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
        """(prompt, sample) pairs in batches of at most `max_batch`.

        The pairs of a prompt stand side by side and no batch mixes a part of one prompt with other prompts, so that
        every prompt of a batch has the same number of rows.
        """
        n = sampling.n
        for batch in self._together(prompts, min(n, self.max_batch), sampling):
            for start in range(0, n, self.max_batch):
                yield [(prompt, sample) for prompt in batch for sample in range(start, min(start + self.max_batch, n))]

    def _together(self, prompts: Sequence[Sequence[int]], rows: int, sampling: Sampling) -> Iterator[list[int]]:
        """Prompts that are read at once, if each takes this many rows of a batch."""
        size, of_length = self.max_batch // rows, lambda i: len(prompts[i])
        order = reading_order(self.model, prompts, size, rows * sampling.max_new_tokens)
        parts = [order]
        if self._way == "equal":
            parts = [list(part) for _, part in groupby(sorted(order, key=of_length), of_length)]
        for part in parts:
            for start in range(0, len(part), size):
                yield part[start : start + size]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        batch: list[tuple[int, int]],
        sampling: Sampling,
        limits: Sequence[int],
    ) -> list[Completion]:
        device = self.model.device
        distinct = list(dict.fromkeys(prompt for prompt, _ in batch))
        copies = len(batch) // len(distinct)
        asked = [prompts[i] for i in distinct]
        reading = partial(read_texts, self.model, asked, self.pad_id, self._way)
        texts = reading()
        texts.repeat(copies)
        beside: MaskPass | MixturePass | None = None
        if self._mask is not None:
            beside = MaskPass(self._mask, reading, copies, sampling.temperature)
        elif self._other is not None:
            other, share = self._other
            beside = MixturePass(read_texts(other, asked, self.pad_id, self._way), copies, share)

        draws = np.stack([uniforms(sampling.seed, *sampling.draw(p, s), sampling.max_new_tokens) for p, s in batch])
        draws = torch.from_numpy(draws).to(device)
        stops = torch.tensor(self.stop_ids, device=device)
        running = torch.arange(len(batch), device=device)  # original row of every row still in the batch
        ended = torch.zeros(len(batch), dtype=torch.bool, device=device)  # per row in the batch
        tokens_out = torch.full((len(batch), sampling.max_new_tokens), self.pad_id, device=device)
        logps_out = torch.zeros((len(batch), sampling.max_new_tokens), device=device)
        last = torch.tensor([limits[prompt] for prompt, _ in batch], device=device)
        lengths = last.clone()
        stopped = torch.zeros(len(batch), dtype=torch.bool, device=device)

        for step in range(sampling.max_new_tokens):
            logits = texts.logits if beside is None else beside.changed(texts.logits)
            tokens, logps = choose(logits, sampling, draws[running, step])
            live = running[~ended]
            tokens_out[live, step], logps_out[live, step] = tokens[~ended], logps[~ended]
            now = torch.isin(tokens, stops) & ~ended
            lengths[running[now]], stopped[running[now]] = step + 1, True
            ended = ended | now | (last[running] == step + 1)
            alive = int((~ended).sum())
            if alive == 0 or step + 1 == sampling.max_new_tokens:
                break
            if alive < COMPACT_SHARE * len(ended):
                keep = (~ended).nonzero().squeeze(1)
                texts.select(keep)
                running, tokens, ended = running[keep], tokens[keep], ended[keep]
                if beside is not None:
                    beside.keep(keep)
            texts.advance(tokens)
            if beside is not None:
                beside.advance(tokens)
        return self._collect(tokens_out, logps_out, lengths, stopped)

    def _collect(self, tokens: Tensor, logps: Tensor, lengths: Tensor, stopped: Tensor) -> list[Completion]:
        rows = zip(tokens.tolist(), logps.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        return [
            Completion(ids[:n], values[:n], "stop" if stop else "length", self.policy_version)
            for ids, values, n, stop in rows
        ]
