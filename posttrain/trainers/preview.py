"""The first batch of a run, made as the run would make it, for people to look at: `posttrain check RECIPE --batch`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from posttrain.config.schema import Recipe
from posttrain.data.sample import Sample
from posttrain.objectives.batch import TokenBatch
from posttrain.trainers.rebuilt_step import advantage_of, rows_of
from posttrain.trainers.run import built_aside
from posttrain.trainers.shell import Shell


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One token sequence of the batch.

    Attributes:
        micro_batch: number, from 0.
        source: who wrote the trained tokens: policy, expert, prefix, reset, replay, guided (the policy, and a guide the
            end); `data` for rows as they were read.
        role: `chosen`, `rejected` and the like; empty where a row is one sequence.
        problem: id; empty where the shell does not say.
        tokens: without padding.
        prefix: tokens of a prefix.
        trained: tokens under the loss mask.
        reward: outcome plus shaping; None where nothing was judged.
        verdict: of the verifier; empty where nothing was judged.
        advantage: one number or one per token; None for supervised rows, expert rows among them.
        written: text of the trained tokens, without special tokens.
        pieces: (text, `prompt`, `prefix`, `trained`, `guide` or `context`), in order.
    """

    micro_batch: int
    source: str
    role: str
    problem: str
    tokens: int
    prefix: int
    trained: int
    reward: float | None
    verdict: str
    advantage: float | list[float] | None
    written: str
    pieces: list[tuple[str, str]]


def first_batch(recipe: Recipe) -> list[BatchRow]:
    """The rows of the first optimizer step on one rank. Loads the model, samples and verifies; writes nothing.

    Raises:
        PosttrainError: as for training.
    """
    with built_aside(recipe) as built:
        return list(_rows(built.shell))


def _rows(shell: Shell) -> Iterator[BatchRow]:
    for number, inputs in enumerate(shell.step_batches(0)):
        samples = shell.step_samples[number] if shell.step_samples else None
        for row, (part, _, sequences) in enumerate(rows_of(shell.method_batch(inputs, None), inputs)):
            for role, ids, tokens in sequences:
                sample = None if samples is None else samples[row]
                yield _row(shell, number, role, ids, tokens, advantage_of(part), sample)


def _row(
    shell: Shell,
    micro_batch: int,
    role: str,
    ids: Tensor,
    tokens: TokenBatch,
    advantage: float | list[float] | None,
    sample: Sample | None,
) -> BatchRow:
    mask = tokens.mask[0]
    expert = tokens.expert is not None and bool(tokens.expert[0])
    judged = sample is not None and bool(sample.verdict)
    prefix = 0 if sample is None else sample.prefix
    return BatchRow(
        micro_batch=micro_batch,
        source="data" if sample is None else sample.origin.value,
        role=role,
        problem="" if sample is None else sample.problem_id,
        tokens=len(ids),
        prefix=prefix,
        trained=int(mask.sum()),
        reward=sample.reward if judged else None,
        verdict=sample.verdict if judged else "",
        advantage=None if expert else advantage,
        written=shell.parts.renderer.tokenizer.decode(ids[mask[: len(ids)]], skip_special_tokens=True),
        pieces=_pieces(shell, ids, mask, prefix, 0 if sample is None else sample.guided),
    )


def _pieces(shell: Shell, ids: Tensor, mask: Tensor, prefix: int, guided: int) -> list[tuple[str, str]]:
    """Runs of tokens with the same label."""
    trained = mask.tolist()
    first = trained.index(True) if True in trained else len(ids)
    labels = ["prompt"] * (first - prefix) + ["prefix"] * prefix
    labels += ["trained" if each else "context" for each in trained[first : len(ids)]]
    labels[len(labels) - guided :] = ["guide"] * guided
    return shell.parts.renderer.encoder.pieces(ids.tolist(), labels)
