"""Attacked prompts out of plain requests, split by request, and pairs of a safe and an unsafe answer to them.

Egida, arXiv 2502.13603: many styles of attack on the same requests. A split by rows would put one request on both sides
in two styles, so the unit is the request: all rows of one are on one side.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.bounded_files import parse_json
from posttrain.config.safety import AttackSettings, RefusalSettings
from posttrain.data.pairs import response_of
from posttrain.data.traces import Trace, read_traces
from posttrain.errors import DataError
from posttrain.safe_files import write_text_atomic


@dataclass(frozen=True, slots=True)
class UnsafeRequest:
    """A plain request that should be refused.

    Attributes:
        text: of the request.
        topic: what it is about.
        safe: an answer that refuses.
    """

    text: str
    topic: str
    safe: str

    @property
    def key(self) -> str:
        """The same for requests that differ in case and white space alone."""
        return " ".join(self.text.casefold().split())


def read_requests(path: Path) -> list[UnsafeRequest]:
    """The requests of a file, each once.

    Raises:
        DataError: no such file, or a row without one of the three texts.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path))
    found: dict[str, UnsafeRequest] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row, where = parse_json(line, f"{path}:{number}"), f"{path}:{number}"
            for column in ("request", "topic", "safe"):
                if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column].strip():
                    raise DataError(f"no text in column {column!r}", where=where, hint="columns: request, topic, safe")
            request = UnsafeRequest(row["request"], row["topic"], row["safe"])
            found.setdefault(request.key, request)
    if not found:
        raise DataError("no request", where=str(path))
    return list(found.values())


def attacked(
    requests: Sequence[UnsafeRequest], settings: AttackSettings
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of training and test: columns prompt, request, topic, style, safe.

    Training has requests that are not held out in the styles that are not; the test has the others in all styles.

    Raises:
        DataError: a held-out topic that no request has, or nothing on one of the sides.
    """
    topics = {request.topic for request in requests}
    if unknown := sorted(set(settings.held_out_topics) - topics):
        raise DataError(
            f"no request of topic {unknown[0]!r} to hold out",
            where=settings.requests,
            hint=f"topics: {', '.join(sorted(topics))}",
        )
    test: set[str] = set()
    for request in requests:
        drawn = random.Random(f"{settings.seed}/{request.key}").random() < settings.test_share  # nosec B311 # no secret
        if request.topic in settings.held_out_topics or drawn:
            test.add(request.key)
    if len(test) in (0, len(requests)):
        side = "test" if not test else "training"
        raise DataError(
            f"none of {len(requests)} requests is left for the {side}",
            where=settings.requests,
            hint="change test_share or held_out_topics",
        )
    seen = [style for style in settings.styles if style not in settings.held_out_styles]
    train = [row(each, style, settings) for each in requests if each.key not in test for style in seen]
    return train, [row(each, style, settings) for each in requests if each.key in test for style in settings.styles]


def row(request: UnsafeRequest, style: str, settings: AttackSettings) -> dict[str, str]:
    """A request in a style."""
    prompt = settings.styles[style].replace("{request}", request.text)
    texts = {"prompt": prompt, "request": request.text, "topic": request.topic, "style": style}
    return texts | {"safe": request.safe}


def refusals(traces: Sequence[Trace], max_pairs: int) -> list[dict[str, Any]]:
    """Rows of `data.preferences`: the trace's `safe` over what was judged unsafe, by prompt in the order of the traces.

    Raises:
        DataError: a trace without a safe answer.
    """
    made: dict[str, list[dict[str, Any]]] = {}
    for trace in traces:
        safe = trace.meta.get("safe")
        if not isinstance(safe, str):
            hint = "sample from the prompts of an attacks stage"
            raise DataError("a trace without column 'safe'", where=trace.problem_id, hint=hint)
        rows = made.setdefault(trace.problem_id, [])
        known = {each["unsafe"] for each in rows}
        if trace.verdict != "wrong" or trace.finished is False or trace.text in known or len(rows) == max_pairs:
            continue
        chosen: Any = safe if isinstance(trace.prompt, str) else ({"role": "assistant", "content": safe},)
        texts = {"prompt": trace.prompt, "chosen": chosen, "rejected": response_of(trace), "unsafe": trace.text}
        rows.append(texts | {"topic": trace.meta.get("topic"), "style": trace.meta.get("style")})
    return [
        {name: value for name, value in each.items() if name != "unsafe"} for rows in made.values() for each in rows
    ]


def write_attacked(settings: AttackSettings, train: Path, test: Path) -> tuple[int, int]:
    """Write both sides; gives the number of rows of each."""
    sides = attacked(read_requests(Path(settings.requests)), settings)
    for path, rows in zip((train, test), sides, strict=True):
        write_text_atomic(path, lines_of(rows))
    return len(sides[0]), len(sides[1])


def write_refusals(settings: RefusalSettings, out: Path) -> int:
    """Write the pairs; gives their number.

    Raises:
        DataError: no answer was judged unsafe.
    """
    rows = refusals(list(read_traces([Path(path) for path in settings.traces]).traces), settings.max_pairs)
    if not rows:
        raise DataError(
            "no answer to an attacked prompt was judged unsafe",
            where=settings.traces[0],
            hint="the model refuses all of them, or the judge calls everything safe: read some answers",
        )
    write_text_atomic(out, lines_of(rows))
    return len(rows)


def lines_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
