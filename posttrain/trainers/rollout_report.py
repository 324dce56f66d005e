"""What a batch of rollouts says to people: metrics over all ranks, and a group of completions in the transcript."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem, Sample
from posttrain.methods.base import Scored
from posttrain.objectives.advantages import group_statistics, informative_groups
from posttrain.tracking.metrics import Add
from posttrain.tracking.thumbnails import keep_thumbnails
from posttrain.tracking.transcript import Transcript


def record_rollouts(
    add: Add, scored: Scored, advantages: Tensor, samples: Sequence[Sample], *, judged: bool = True
) -> None:
    """Metrics of what was sampled for this rollout; replayed rows are counted apart.

    Args:
        add: adds (name, sum, count) to the means of the log entry.
        scored: rows of all ranks.
        advantages: (N,) of them, or (N, K) of their turns.
        samples: N samples, without their tokens.
        judged: whether there is a verifier.
    """
    replayed = torch.tensor([kind == Origin.REPLAY for kind in scored.kinds])
    if bool(replayed.any()):
        add("replayed_share", float(replayed.sum()), len(replayed))
    begun = torch.tensor([sample.part == 0 for sample in samples])  # an episode is counted once
    fresh, known = begun & ~replayed, scored.known & begun & ~replayed
    n = int(fresh.sum())
    _record_kind(add, scored, fresh, "")
    if any(kind in (Origin.PREFIX, Origin.RESET, Origin.GUIDED) for kind in scored.kinds):
        for kind in sorted(set(scored.kinds) - {Origin.REPLAY}):
            _record_kind(add, scored, begun & torch.tensor([each == kind for each in scored.kinds]), f"/{kind.value}")
        for name, counts in (
            ("prefix_length", [sample.prefix for sample in samples if sample.prefix]),
            ("guided_length", [sample.guided for sample in samples if sample.guided]),
        ):
            if counts:
                add(name, sum(counts), len(counts))
    add("truncated_share", float((~scored.finished & fresh).sum()), n)
    if not judged:
        return
    silent = (advantages == 0).view(len(advantages), -1).all(dim=1)
    _, deviations, _ = group_statistics(scored.rewards, scored.groups, known)
    add("reward_std", float(deviations[fresh].sum()), n)
    add("unknown_share", n - int(known.sum()), n)
    add("zero_advantage_share", float((silent & fresh).sum()), n)
    differing, groups = informative_groups(scored.rewards[fresh], scored.groups[fresh], scored.known[fresh])
    add("informative_groups", differing, groups)
    verdicts = [sample.verdict for sample, new in zip(samples, fresh.tolist(), strict=True) if new]
    for verdict in sorted(set(verdicts)):
        add(f"verdict/{verdict}", verdicts.count(verdict), n)


def _record_kind(add: Add, scored: Scored, rows: Tensor, suffix: str) -> None:
    known = scored.known & rows
    add(f"reward{suffix}", float(scored.rewards[known].sum()), int(known.sum()))
    add(f"accuracy{suffix}", float(scored.outcomes[known].sum()), int(known.sum()))
    add(f"completion_length{suffix}", float(scored.lengths[rows].sum()), int(rows.sum()))


def write_first_group(
    transcript: Transcript,
    step: int,
    samples: Sequence[Sample],
    advantages: Sequence[float | list[float]],
    problems: dict[str, Problem],
    renderer: Renderer,
) -> None:
    """The first group of a rollout, for people to read; the prompt with its special tokens, and its pictures small."""
    if renderer.pictures is not None:
        keep_thumbnails(renderer.pictures, samples[0].ids, transcript.path.parent)
    for sample, advantage in zip(samples, advantages, strict=True):
        if sample.group != samples[0].group:
            break
        start = sample.prompt_length
        context, trained = sample.ids[start : start + sample.prefix], sample.ids[start + sample.prefix :]
        entry = {
            "problem": sample.problem_id,
            "prompt": renderer.encoder.text(sample.ids[:start], special=True),
            "prefix": renderer.text(context),
            "completion": renderer.text(trained),
            "turns": _turns(sample, start + sample.prefix, renderer),
            "reference": problems[sample.problem_id].reference,
            "verdict": sample.verdict,
            "reward": sample.reward,
            "advantage": round(advantage, 6) if isinstance(advantage, float) else [round(a, 6) for a in advantage],
            "finished": sample.finished,
        }
        absent = {"completion"} if entry["turns"] else {"turns"}
        absent |= set() if sample.prefix else {"prefix"}
        transcript.write(step, {key: value for key, value in entry.items() if key not in absent})


def _turns(sample: Sample, start: int, renderer: Renderer) -> list[str]:
    """Actions and what stands between them, in turn, special tokens shown; empty where there is one action."""
    mask = sample.loss_mask[start:]
    return [text for text, _ in renderer.encoder.pieces(sample.ids[start:], mask)] if 0 in mask and 1 in mask else []
