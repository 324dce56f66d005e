"""Rows that cannot be used: left out and counted by reason, or the end of the run, as `data.bad_rows` says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from posttrain.data.truncation import Ledger
from posttrain.errors import DataError

R = TypeVar("R")
T = TypeVar("T")


class BadRows:
    """Counts the rows of all sources that were left out, by source and reason.

    Args:
        policy: `drop` leaves a row out, `error` stops at the first one.
    """

    def __init__(self, policy: Literal["drop", "error"] = "drop") -> None:
        self.policy = policy
        self._errors: dict[str, list[DataError]] = {}
        self._unasked: dict[str, dict[str, int]] = {}
        self._notes: dict[str, list[str]] = {}

    def made(self, rows: Iterable[R], make: Callable[[R], T], source: str) -> list[T]:
        """`make` of every row for which it raises no DataError.

        Args:
            source: name of the source that the rows are of.

        Raises:
            DataError: that of the first row, if no row can be used or the policy is `error`.
        """
        found: list[T] = []
        first: DataError | None = None
        for row in rows:
            try:
                found.append(make(row))
            except DataError as error:
                if self.policy == "error":
                    raise
                first = first or error
                self._errors.setdefault(source, []).append(error)
        if first is not None and not found:
            raise first
        return found

    def leave_out(self, source: str, reason: str, number: int = 1) -> None:
        """Count rows that are left out because the recipe does not ask for them."""
        counts = self._unasked.setdefault(source, {})
        counts[reason] = counts.get(reason, 0) + number

    def note(self, source: str, line: str) -> None:
        """Keep a line for people on how the rows of a source are read."""
        self._notes.setdefault(source, []).append(line)

    def ledger(self, source: str) -> Ledger:
        """The rows of a source that were left out, as the beginning of a ledger."""
        ledger = Ledger(unasked=dict(self._unasked.get(source, {})), notes=list(self._notes.get(source, [])))
        for error in self._errors.get(source, ()):
            count_bad(ledger, error, source)
        return ledger


def count_bad(ledger: Ledger, error: DataError, source: str) -> None:
    """Count a row that cannot be used, by its reason."""
    reason = reason_of(error)
    ledger.dropped += 1
    ledger.bad[reason] = ledger.bad.get(reason, 0) + 1
    ledger.first.setdefault(reason, error.where or source)
    ledger.said.setdefault(reason, _shown(error))


def _shown(error: DataError) -> str:
    line = error.what.splitlines()[0]
    return line if len(line) <= 200 else line[:200] + "..."


def reason_of(error: DataError) -> str:
    """What rows are counted by: what is wrong, without what differs from row to row, numbers and quoted text."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "...", error.what.splitlines()[0])
    return re.sub(r"\d+", "N", reason)[:100]
