"""The one place that cuts tokens, with a ledger of what it did.

A sample is over-long if its prompt has more than `max_prompt_length` tokens or the whole more than `max_length`. The
prompt ends where the first trained token stands. What happens then is the policy's:

- `drop`: the row is left out.
- `cut`: the prompt loses tokens on its left, the completion on its right. A completion that is cut has lost its end
  token and is marked unfinished. If no trained token is left, the row is dropped.
- `error`: stop at the first such row.

Every row ends up in exactly one of kept, cut and dropped. Rows are lost if they are dropped or lose their end token:
a model trained on many of the latter does not learn to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from posttrain.data.sample import Problem, Sample
from posttrain.errors import DataError

Policy = Literal["drop", "cut", "error"]


@dataclass(slots=True)
class Ledger:
    """What became of the rows. Every row is kept, cut or dropped.

    Attributes:
        kept: unchanged rows.
        cut: rows that lost tokens and are still used.
        dropped: rows left out.
        eos_lost: rows among `cut` whose completion lost its end token.
        identical: rows among `dropped` whose responses are the same.
        empty: rows among `dropped` with an empty response.
        bad: rows among `dropped` that cannot be used, by reason (`data.bad_rows`).
        unasked: rows left out before these are counted, as the recipe does not ask for them, by reason.
        first: the place of the first such row, by reason.
        said: what was wrong with that row, as it was said, by reason.
        sources: the same of each source, by its name, where there are several.
        notes: lines for people on how the rows are read.
        of_rows: how many rows were read, where the method has made others of them, which are the ones counted here.
    """

    kept: int = 0
    cut: int = 0
    dropped: int = 0
    eos_lost: int = 0
    identical: int = 0
    empty: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    unasked: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Ledger] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    of_rows: int | None = None

    @property
    def total(self) -> int:
        """All rows seen."""
        return self.kept + self.cut + self.dropped

    @property
    def lost_share(self) -> float:
        """Share of rows that are dropped or lose their end token; 0 without rows."""
        return (self.dropped + self.eos_lost) / self.total if self.total else 0.0

    def summary(self) -> str:
        """One line for people."""
        reasons = [f"{n} {what}" for n, what in ((self.identical, "identical"), (self.empty, "empty")) if n]
        reasons += [f"{n} bad, first at {self.first[reason]}: {self.said_of(reason)}" for reason, n in self.bad.items()]
        made = "" if self.of_rows is None else f", which the method makes of {self.of_rows}"
        return (
            f"{self.total} rows{made}: {self.kept} kept, {self.cut} cut ({self.eos_lost} without their end token), "
            f"{self.dropped} dropped"
            + (f" ({', '.join(reasons)})" if reasons else "")
            + "".join(f"; {number} more left out: {reason}" for reason, number in self.unasked.items())
        )

    def said_of(self, reason: str) -> str:
        """What was wrong with the first row of a reason, in full; the counts of older runs know the reason alone."""
        return self.said.get(reason, reason)

    def lines(self) -> list[str]:
        """For people: the summary, one of each source where there are several, and the notes."""
        lines, notes = [self.summary()], [f"  note: {note}" for note in self.notes]
        for name, ledger in self.sources.items():
            lines.append(f"  {name}: {ledger.summary()}")
            notes += [f"  note: {name}: {note}" for note in ledger.notes]
        return lines + notes

    def count(self, other: Ledger) -> None:
        """Count the rows of another ledger too."""
        for key in ("kept", "cut", "dropped", "eos_lost", "identical", "empty"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for reason, number in other.unasked.items():
            self.unasked[reason] = self.unasked.get(reason, 0) + number
        for reason, number in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + number
            self.first.setdefault(reason, other.first[reason])
            self.said.setdefault(reason, other.said_of(reason))

    def add(self, name: str, other: Ledger) -> None:
        """Count the rows of a source too."""
        self.count(other)
        self.sources[name] = other

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """The counts of one source that `to_dict` gave."""
        return cls(
            **{one.name: values[one.name] for one in fields(cls) if one.name != "sources" and one.name in values}
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, `total` and `lost_share` included."""
        sources = {name: ledger.to_dict() for name, ledger in self.sources.items()}
        return {**asdict(self), "sources": sources, "total": self.total, "lost_share": self.lost_share}


def fit_samples(
    samples: Sequence[Sample],
    max_prompt_length: int | None,
    max_length: int | None,
    policy: Policy = "drop",
    max_lost_share: float = 0.1,
    *,
    head_ids: Sequence[int] = (),
    ledger: Ledger | None = None,
) -> tuple[list[Sample], Ledger]:
    """The samples that fit, in their order. Cut ones are copies; the given ones stay as they are.

    Args:
        samples: token sequences with at least one trained token each.
        max_prompt_length: tokens before the first trained one; None is no limit.
        max_length: tokens of the whole; None is no limit.
        policy: what happens to over-long ones.
        max_lost_share: stop if a larger share is lost.
        head_ids: where a prompt begins with these ids (the BOS token), a cut leaves them at its front.
        ledger: rows that were dropped before; it is added to.

    Raises:
        DataError: a sample without trained tokens, more is lost than allowed, nothing is left, or policy `error` met an
            over-long row.
    """
    rules = (max_prompt_length, max_length, policy, max_lost_share)
    return fit_sequences([[sample] for sample in samples], *rules, head_ids=head_ids, ledger=ledger)


def fit_sequences(
    rows: Sequence[Sequence[Sample]],
    max_prompt_length: int | None,
    max_length: int | None,
    policy: Policy = "drop",
    max_lost_share: float = 0.1,
    *,
    head_ids: Sequence[int] = (),
    ledger: Ledger | None = None,
) -> tuple[list[Sample], Ledger]:
    """The sequences that fit of rows with one or several each, such as one for each turn of a conversation.

    What is counted are rows. One with an over-long sequence is dropped as a whole; with policy `cut` it loses what is
    beyond the limits, whole sequences too, and is dropped if nothing is left. Arguments and errors as in `fit_samples`.
    """
    limits = LengthLimits(max_prompt_length, max_length, policy, max_lost_share, ledger or Ledger())
    fitted = [sample for row in rows for sample in _fit_row(row, limits, head_ids)]
    limits.check(len(fitted))
    return fitted, limits.ledger


def fit_groups(
    groups: Sequence[Mapping[str, Sample]],
    max_prompt_length: int | None,
    max_length: int | None,
    policy: Policy = "drop",
    max_lost_share: float = 0.1,
    *,
    head_ids: Sequence[int] = (),
    ledger: Ledger | None = None,
) -> tuple[list[dict[str, Sample]], Ledger]:
    """Rows of several sequences each, of which all fit or none is used. Arguments and errors as in `fit_samples`.

    A row is kept if none of its sequences is over-long, and dropped if one of them cannot be used. Equal prompts are
    cut alike, because what a prompt loses depends on itself and on `max_prompt_length` alone. A row whose chosen and
    rejected sequence are the same, because the template trims what differs or the limit cuts it off, says nothing and
    is dropped as identical.

    Args:
        groups: rows, each as role -> sequence.
        ledger: rows that were dropped before; it is added to.
    """
    limits = LengthLimits(max_prompt_length, max_length, policy, max_lost_share, ledger or Ledger())
    whole = (_fit_group(group, limits, head_ids) for group in groups)
    fitted = [group for group in whole if group is not None]
    limits.check(len(fitted))
    return fitted, limits.ledger


def fit_sample(sample: Sample, limits: LengthLimits, head_ids: Sequence[int]) -> Sample | None:
    """One sample within the limits, counted in their ledger; None if it is dropped.

    Raises:
        DataError: a sample without trained tokens, or policy `error` met an over-long one.
    """
    return next(iter(_fit_row([sample], limits, head_ids)), None)


def _fit_row(row: Sequence[Sample], limits: LengthLimits, head_ids: Sequence[int]) -> list[Sample]:
    """The sequences of a row within the limits, the row counted; none if it is dropped."""
    fitted = [_fit_one(sample, limits, head_ids) for sample in row]
    left = [sample for sample in fitted if sample is not None]
    whole = len(left) == len(row)
    if not left or not (whole or limits.policy == "cut"):
        limits.ledger.dropped += 1
        return []
    changed = not whole or any(new is not old for new, old in zip(left, row, strict=True))
    limits.ledger.kept += not changed
    limits.ledger.cut += changed
    limits.ledger.eos_lost += not whole or any(
        old.finished and not new.finished for new, old in zip(left, row, strict=True)
    )
    return left


def _fit_one(sample: Sample, limits: LengthLimits, head_ids: Sequence[int]) -> Sample | None:
    """The sequence within the limits, the same object where it has not changed; None if it cannot be used."""
    if 1 not in sample.loss_mask:
        raise DataError("no token of the row is trained on: its completion is empty", where=sample.problem_id)
    prompt_length = sample.loss_mask.index(1)
    if not limits.exceeded(sample.problem_id, prompt_length, len(sample.ids)):
        return sample
    return _cut_sample(sample, prompt_length, limits, head_ids) if limits.policy == "cut" else None


def _fit_group(group: Mapping[str, Sample], limits: LengthLimits, head_ids: Sequence[int]) -> dict[str, Sample] | None:
    """A row within the limits, counted; None if it is dropped."""
    result = {role: _fit_one(sample, limits, head_ids) for role, sample in group.items()}
    whole = {role: sample for role, sample in result.items() if sample is not None}
    if len(whole) < len(group):
        limits.ledger.dropped += 1
        return None
    if {"chosen", "rejected"} <= set(whole) and _said(whole["chosen"]) == _said(whole["rejected"]):
        limits.ledger.dropped += 1
        limits.ledger.identical += 1
        return None
    changed = any(whole[role] is not group[role] for role in group)
    limits.ledger.kept += not changed
    limits.ledger.cut += changed
    limits.ledger.eos_lost += any(group[role].finished and not whole[role].finished for role in group)
    return whole


def _said(sample: Sample) -> list[int]:
    """The tokens up to the last one that is trained on; what a user says behind it makes no difference."""
    return sample.ids[: len(sample.ids) - sample.loss_mask[::-1].index(1)]


def fit_prompts(
    prompts: Sequence[tuple[Problem, list[int]]],
    max_prompt_length: int | None,
    policy: Policy = "drop",
    max_lost_share: float = 0.1,
    *,
    head_ids: Sequence[int] = (),
    ledger: Ledger | None = None,
) -> tuple[list[tuple[Problem, list[int]]], Ledger]:
    """The prompts that fit, for rollouts. Arguments and errors as in `fit_samples`."""
    limits = LengthLimits(max_prompt_length, None, policy, max_lost_share, ledger or Ledger())
    fitted: list[tuple[Problem, list[int]]] = []
    for problem, ids in prompts:
        if not limits.exceeded(problem.where or problem.id, len(ids), len(ids)):
            fitted.append((problem, ids))
            limits.ledger.kept += 1
        elif policy == "cut":
            fitted.append((problem, [ids[index] for index in _prompt_positions(ids, len(ids), limits, head_ids)]))
            limits.ledger.cut += 1
        else:
            limits.ledger.dropped += 1
    limits.check(len(fitted))
    return fitted, limits.ledger


@dataclass(slots=True)
class LengthLimits:
    """Limits of lengths, and what they met.

    Attributes:
        max_prompt_length, max_length, policy, max_lost_share, ledger: as in `fit_samples`.
        long_prompts, long_rows: sequences beyond each limit.
        longest_prompt, longest_row: tokens.
    """

    max_prompt_length: int | None
    max_length: int | None
    policy: Policy
    max_lost_share: float
    ledger: Ledger = field(default_factory=Ledger)
    long_prompts: int = 0
    long_rows: int = 0
    longest_prompt: int = 0
    longest_row: int = 0

    def exceeded(self, where: str, prompt_length: int, length: int) -> bool:
        """Whether a sequence is over-long."""
        long_prompt = self.max_prompt_length is not None and prompt_length > self.max_prompt_length
        long_row = self.max_length is not None and length > self.max_length
        self.long_prompts += long_prompt
        self.long_rows += long_row
        self.longest_prompt = max(self.longest_prompt, prompt_length)
        self.longest_row = max(self.longest_row, length)
        if not long_prompt and not long_row:
            return False
        if self.policy == "error":
            key, found, limit = (
                ("max_prompt_length", prompt_length, self.max_prompt_length)
                if long_prompt
                else ("max_length", length, self.max_length)
            )
            what = "prompt" if long_prompt else "row"
            raise DataError(
                f"the {what} has {found} tokens, {key} is {limit} (`too_long: error`)",
                where=where,
                hint=f"raise data.{key}, or set data.too_long to drop or cut",
            )
        return True

    def check(self, left: int) -> None:
        """Stop if too much was lost.

        Args:
            left: rows that can be used.

        Raises:
            DataError: none, or a larger share is lost than allowed.
        """
        ledger = self.ledger
        if not ledger.total or (left and ledger.lost_share <= self.max_lost_share):
            return
        raise DataError(
            f"{ledger.lost_share:.1%} of the rows would be lost, data.max_lost_share allows {self.max_lost_share:.1%} "
            f"({ledger.summary()})"
            if left
            else f"no row is left ({ledger.summary()})",
            where="data",
            hint=self._advice(),
        )

    def _advice(self) -> str:
        parts = []
        if self.ledger.identical or self.ledger.empty:
            parts.append("look at the rows that are identical or empty, or raise data.max_lost_share")
        if self.ledger.bad:
            reason, number = max(self.ledger.bad.items(), key=lambda item: item[1])
            said, place = self.ledger.said_of(reason), self.ledger.first[reason]
            parts.append(f"mend the rows that cannot be used ({number} times: {said}; {place})")
        if self.long_prompts:
            parts.append(
                f"raise data.max_prompt_length (now {self.max_prompt_length}: {self.long_prompts} prompts are longer, "
                f"the longest has {self.longest_prompt} tokens)"
            )
        if self.long_rows:
            parts.append(
                f"raise data.max_length (now {self.max_length}: {self.long_rows} rows are longer, "
                f"the longest has {self.longest_row} tokens)"
            )
        return "; ".join(parts)


def _prompt_positions(ids: Sequence[int], length: int, limits: LengthLimits, head_ids: Sequence[int]) -> list[int]:
    """The positions of the prompt that stay: the head, then as much of the right end as fits."""
    limit = limits.max_prompt_length
    if limit is None or length <= limit:
        return list(range(length))
    head = len(head_ids) if list(ids[: len(head_ids)]) == list(head_ids) and len(head_ids) < limit else 0
    return [*range(head), *range(length - (limit - head), length)]


def _cut_sample(sample: Sample, prompt_length: int, limits: LengthLimits, head_ids: Sequence[int]) -> Sample | None:
    positions = _prompt_positions(sample.ids, prompt_length, limits, head_ids)
    length = len(sample.ids)
    room = length if limits.max_length is None else max(limits.max_length - len(positions), 0)
    stop = min(prompt_length + room, length)
    positions += range(prompt_length, stop)
    mask = [sample.loss_mask[index] for index in positions]
    if 1 not in mask:
        return None
    logps = sample.behaviour_logps
    # Untrained tokens may follow the last trained one; only if trained ones are gone is the end token lost.
    whole = 1 not in sample.loss_mask[stop:]
    return replace(
        sample,
        ids=[sample.ids[index] for index in positions],
        loss_mask=mask,
        behaviour_logps=None if logps is None else [logps[index] for index in positions],
        finished=sample.finished and whole,
    )
