"""Figures of a data set before anything is trained on it: sizes, roles, duplicates, overlap with tests, lengths.

Lengths are in tokens where a renderer is given, as the model would see the rows, else in words. Near duplicates are
rows whose words in runs of five agree in 80% (Jaccard, estimated by MinHash of the package `datasketch`). A row
overlaps with a test set if they share a run of `n` words (13, as is usual for contamination; a shorter test prompt
counts whole, from 5 words on).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from posttrain.data.bad_rows import BadRows
from posttrain.data.messages import is_context
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Message, Preference, Problem, Stepwise, Unpaired
from posttrain.data.truncation import Ledger
from posttrain.errors import StackError

Item = Problem | Example | Preference | Unpaired | Stepwise
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
SHINGLE = 5
NEAR = 0.8
PERMUTATIONS = 128
LEAST_WORDS = 5


@dataclass(slots=True)
class DataFigures:
    """What the rows of a source look like, in numbers.

    Attributes:
        name: of the source.
        kind: the section of `data` that it belongs to.
        read: what became of its rows when they were read and rendered.
        unit: of the lengths: tokens or words.
        lengths: what (prompt, chosen, ..., whole) -> one number per row.
        roles: messages by role; empty for plain text.
        turns: number of messages -> rows.
        context: assistant messages without loss.
        tools: rows that offer tools.
        exact: rows that repeat an earlier row.
        same_prompt: rows with the prompt of an earlier row.
        near: rows that nearly repeat an earlier one and are no exact repeat; None where nobody looked.
        overlap: test set -> rows that share a run of words with it.
        longer_chosen: pairs of which the chosen response is the longer one; None without pairs.
        good: share of labels that are true; None without labels.
        scripts: writing system -> share of letters.
        lost: rows longer than each limit that was asked about.
    """

    name: str
    kind: str
    read: Ledger
    unit: str
    lengths: dict[str, list[int]]
    roles: dict[str, int] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    context: int = 0
    tools: int = 0
    exact: int = 0
    same_prompt: int = 0
    near: int | None = None
    overlap: dict[str, int] = field(default_factory=dict)
    longer_chosen: float | None = None
    good: float | None = None
    scripts: dict[str, float] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that could be read."""
        return len(next(iter(self.lengths.values()), []))

    def percentiles(self) -> dict[str, list[int]]:
        """What -> its lengths at `PERCENTILES`."""
        return {
            what: [int(x) for x in np.percentile(found, PERCENTILES)] for what, found in self.lengths.items() if found
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values; lengths as percentiles."""
        return {**asdict(self), "read": self.read.to_dict(), "rows": self.rows, "lengths": self.percentiles()}


def figures(
    items: Sequence[Item],
    name: str,
    kind: str,
    bad: BadRows,
    *,
    renderer: Renderer | None = None,
    limits: dict[str, int | None] | None = None,
    near: bool = True,
    tests: dict[str, Iterable[str]] | None = None,
    n: int = 13,
) -> DataFigures:
    """The figures of one source.

    Args:
        items: as read.
        bad: holds the rows that could not be read, and takes those that cannot be rendered.
        renderer: counts tokens as the model sees them.
        limits: `max_prompt_length`, `max_length`; only with a renderer.
        near: also look for near duplicates.
        tests: test sets by name, as prompts.
        n: words of a run that counts as overlap.

    Raises:
        StackError: near duplicates are asked for and `datasketch` is not installed.
        DataError: no row can be rendered.
    """
    lengths = _word_lengths(items) if renderer is None else _token_lengths(items, name, bad, renderer)
    ledger = bad.ledger(name)
    ledger.kept = len(next(iter(lengths.values()), []))
    found = DataFigures(name, kind, ledger, "words" if renderer is None else "tokens", lengths)
    texts = [_whole(item) for item in items]
    prompts = [prompt_text(item) for item in items]
    found.exact, found.same_prompt = len(texts) - len(set(texts)), len(prompts) - len(set(prompts))
    found.near = _near_duplicates(texts) if near else None
    found.overlap = {test: _overlap(texts, prompts, n) for test, prompts in (tests or {}).items()}
    found.scripts = _scripts(texts)
    _describe_messages(found, items)
    if kind == "preferences" and lengths.get("chosen"):
        longer = [a > b for a, b in zip(lengths["chosen"], lengths["rejected"], strict=True)]
        found.longer_chosen = sum(longer) / len(longer)
    labels = [label for item in items for label in _labels(item)]
    found.good = sum(labels) / len(labels) if labels else None
    for key, limit in (limits or {}).items():
        what = "prompt" if key == "max_prompt_length" else "whole"
        if limit is not None and what in lengths:
            found.lost[key] = sum(length > limit for length in lengths[what])
    return found


def histogram(lengths: Sequence[int], bins: int = 12, width: int = 40) -> list[tuple[str, int, str]]:
    """Range, number of rows and bar of each bin, for a terminal."""
    counts, edges = np.histogram(lengths, bins=min(bins, max(len(set(lengths)), 1)))
    most = max(int(counts.max()), 1)
    return [
        (f"{round(low):,} to {round(high):,}", int(count), "█" * round(width * int(count) / most))
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]


# ------------------------------------------------------------------------------------------------------------ lengths


def _token_lengths(items: Sequence[Item], name: str, bad: BadRows, renderer: Renderer) -> dict[str, list[int]]:
    def measured(item: Item) -> dict[str, int]:
        problem = _problem(item)
        if isinstance(item, Problem):
            prompt = len(renderer.prompt_ids(item))
            return {"prompt": prompt, "whole": prompt}
        found: dict[str, int] = {}
        for role, response in _responses(item).items():
            sample = renderer.sample(Example(problem, response))
            start = sample.loss_mask.index(1)
            found |= {"prompt": start, role: len(sample.ids) - start}
            found["whole"] = max(found.get("whole", 0), len(sample.ids))
        return found

    return _columns(bad.made(items, measured, name))


def _word_lengths(items: Sequence[Item]) -> dict[str, list[int]]:
    rows = []
    for item in items:
        found = {"prompt": len(_text(_problem(item).prompt).split())}
        found |= {role: len(_text(response).split()) for role, response in _responses(item).items()}
        longest = max((length for role, length in found.items() if role != "prompt"), default=0)
        rows.append(found | {"whole": found["prompt"] + longest})
    return _columns(rows)


def _columns(rows: Sequence[dict[str, int]]) -> dict[str, list[int]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


# -------------------------------------------------------------------------------------------------------------- texts


def _problem(item: Item) -> Problem:
    return item if isinstance(item, Problem) else item.problem


def _responses(item: Item) -> dict[str, str | tuple[Message, ...]]:
    if isinstance(item, Problem):
        return {}
    if isinstance(item, Preference):
        return {"chosen": item.chosen, "rejected": item.rejected, **item.others}
    if isinstance(item, Stepwise):
        return {"steps": "\n".join(item.steps)}
    return {"completion": item.completion}


def _labels(item: Item) -> tuple[bool, ...]:
    return (item.label,) if isinstance(item, Unpaired) else item.labels if isinstance(item, Stepwise) else ()


def _text(value: str | tuple[Message, ...]) -> str:
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def prompt_text(item: Item) -> str:
    """The text of a row's prompt."""
    return _text(_problem(item).prompt)


def _whole(item: Item) -> str:
    return "\n".join([prompt_text(item), *map(_text, _responses(item).values())])


def _describe_messages(found: DataFigures, items: Sequence[Item]) -> None:
    roles: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    for item in items:
        prompt = _problem(item).prompt
        response = next(iter(_responses(item).values()), ())
        talk = [part for part in (prompt, response) if not isinstance(part, str)]
        messages = [message for part in talk for message in part]
        if messages:
            roles.update(message["role"] for message in messages)
            turns[len(messages)] += 1
            found.context += sum(message["role"] == "assistant" and is_context(message) for message in messages)
        found.tools += bool(_problem(item).tools)
    found.roles, found.turns = dict(roles.most_common()), dict(sorted(turns.items()))


_SCRIPTS = {
    "Latin": r"[A-Za-z\u00c0-\u024f]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "Arabic": r"[\u0600-\u06ff]",
    "Devanagari": r"[\u0900-\u097f]",
    "Han": r"[\u4e00-\u9fff]",
    "Kana": r"[\u3040-\u30ff]",
    "Hangul": r"[\uac00-\ud7af]",
    "Greek": r"[\u0370-\u03ff]",
}


def _scripts(texts: Sequence[str]) -> dict[str, float]:
    """Shares of letters by writing system; a guess at the languages that costs nothing."""
    counts = {name: sum(len(re.findall(pattern, text)) for text in texts) for name, pattern in _SCRIPTS.items()}
    total = sum(counts.values())
    return (
        {name: count / total for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count}
        if total
        else {}
    )


# ---------------------------------------------------------------------------------------------- duplicates and overlap


def words_of(text: str) -> list[str]:
    """Words in small letters, without what stands between them."""
    return re.findall(r"\w+", text.lower())


def runs(words: Sequence[str], n: int) -> set[str]:
    """All runs of n words; a shorter text is one run."""
    return {" ".join(words[start : start + n]) for start in range(max(len(words) - n + 1, 1))} if words else set()


def _near_duplicates(texts: Sequence[str]) -> int:
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise StackError(
            "near duplicates need the package datasketch",
            hint="pip install 'posttrain[inspect]', or pass --no-near",
        ) from error
    index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
    seen: set[str] = set()
    hashes: dict[str, Any] = {}
    near = 0
    for number, text in enumerate(texts):
        if text in seen:
            continue
        seen.add(text)
        hashed = MinHash(num_perm=PERMUTATIONS, seed=1)
        hashed.update_batch([run.encode() for run in sorted(runs(words_of(text), SHINGLE))])
        candidates = index.query(hashed)
        near += any(hashed.jaccard(hashes[other]) >= NEAR for other in candidates)
        index.insert(str(number), hashed)
        hashes[str(number)] = hashed
    return near


def _overlap(texts: Sequence[str], tests: Iterable[str], n: int) -> int:
    known: dict[int, set[str]] = {}
    for test in tests:
        words = words_of(test)
        if len(words) >= LEAST_WORDS:
            size = min(n, len(words))
            known.setdefault(size, set()).update(runs(words, size))
    shared = 0
    for text in texts:
        words = words_of(text)
        shared += any(not found.isdisjoint(runs(words, size)) for size, found in known.items())
    return shared
