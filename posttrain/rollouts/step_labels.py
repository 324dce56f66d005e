"""Labels of steps by Monte Carlo (Math-Shepherd, arXiv 2312.08935): how often the policy ends right from behind a step.

Such a label is a value of the policy that goes on, not whether the step is correct: behind a slip the answer may still
be reached, and a right step may lead where the policy is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.config.collection import StepLabelConfig
from posttrain.config.schema import TraceSource
from posttrain.data.known_traces import KnownTrace, fit_traces, load_traces
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Sample
from posttrain.data.steps import StepCutter, last_tokens
from posttrain.errors import DataError
from posttrain.models.device import device_type
from posttrain.models.loading import load_policy
from posttrain.phases import phase
from posttrain.rollouts.engine import Engine, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.safe_files import write_json_atomic, write_text_atomic
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.verdict import Judge

Say = Callable[[str], None]

STEPS = 10_000
"""Numbers of draws that each trace has for its steps."""


@dataclass(frozen=True, slots=True)
class LabelledSteps:
    """A trace with what became of completions from behind each of its steps.

    Attributes:
        trace: as tokens.
        steps: texts, without separators.
        shares: of the judged completions behind each step, how many end right; behind the last step the trace's own
            verdict.
        judged: completions behind each step that the verifier could judge.
    """

    trace: KnownTrace
    steps: list[str]
    shares: list[float]
    judged: list[int]


@dataclass(slots=True)
class StepReport:
    """What was made of the traces.

    Attributes:
        traces: read.
        rows: written.
        steps: labelled.
        right: steps labelled right.
        mean_share: mean share of right completions.
        sampled: completions.
        unknown: of these, how many the verifier could not judge.
        unjudged: traces left out because no completion behind one of their steps could be judged, or they themselves.
        unfinished: traces left out that were cut at the token limit.
    """

    traces: int = 0
    rows: int = 0
    steps: int = 0
    right: int = 0
    mean_share: float = 0.0
    sampled: int = 0
    unknown: int = 0
    unjudged: int = 0
    unfinished: int = 0


def write_step_labels(config: StepLabelConfig, say: Say) -> StepReport:
    """Label the steps of trace files by completions of a model, and write rows of `data.stepwise` and a report.

    Rows: prompt, completions (steps), labels, shares, problem_id, and reference where there is one.

    Raises:
        DataError: a missing or bad trace file, or no trace is left.
        ModelError: the model cannot be loaded.
    """
    written = load_traces(TraceSource(path=config.traces, keep="all"), "traces")
    if any(each.episode is not None for each in written):
        raise DataError(
            "between the actions of an episode an environment speaks, and no completion goes on behind them without it",
            where="traces",
            hint="label completions of `posttrain sample`; by the turns of episodes learn `digirl` and `oreo`",
        )
    phase(f"loading the model {config.model.path}")
    model, tokenizer = load_policy(config.model, seed=0)
    renderer = Renderer(tokenizer, generation_eos=model.generation_config.eos_token_id)
    limits: dict[str, Any] = {"max_prompt_length": None, "max_length": None, "policy": "drop", "max_lost_share": 1.0}
    known, _ = fit_traces(written, renderer, **limits)
    finished = [trace for trace in known if trace.finished]
    report = StepReport(traces=len(known), unfinished=len(known) - len(finished))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sizes = {"stop_ids": renderer.stop_ids, "pad_id": pad, "max_batch": config.max_batch}
    engine = TransformersEngine(model.to(device_type()).eval(), **sizes)
    lines: list[str] = []
    with closing(build_judge(config.verifier, config.verifier_pool)) as judge:
        for start in range(0, len(finished), config.traces_per_chunk):
            chunk = finished[start : start + config.traces_per_chunk]
            for found in labelled(chunk, config, engine, renderer, judge, first=start, report=report):
                lines.append(json.dumps(_row(found, config, report), ensure_ascii=False))
            done = start + len(chunk)
            say(f"{done:,} of {len(finished):,} traces, {report.sampled:,} completions")
    if not lines:
        raise DataError(
            f"no trace is left of {report.traces}: {report.unfinished} unfinished, {report.unjudged} not judged",
            where="traces",
        )
    report.rows, report.mean_share = len(lines), report.mean_share / max(report.steps, 1)
    write_text_atomic(Path(config.output), "\n".join(lines) + "\n")
    write_json_atomic(Path(config.output).with_suffix(".report.json"), asdict(report))
    return report


def labelled(
    traces: Sequence[KnownTrace],
    config: StepLabelConfig,
    engine: Engine,
    renderer: Renderer,
    judge: Judge,
    *,
    first: int,
    report: StepReport,
) -> Iterator[LabelledSteps]:
    """The traces whose steps could all be judged.

    Args:
        first: number of the first trace, for the draws.
        report: counts what was sampled and left out.
    """
    cutter = StepCutter(renderer.text, config.separator)
    ends = [_ends(trace, cutter, renderer.stop_ids) for trace in traces]
    # Behind the last step nothing is left to write: the trace's own verdict stands for it.
    places = [(i, end) for i, own in enumerate(ends) for end in own[:-1]]
    contexts = [[*traces[i].prompt_ids, *traces[i].ids[: end + 1]] for i, end in places]
    # A step's draws depend on its trace's number and its own alone, whatever stands in the chunk.
    numbers = [(first + i) * STEPS + ends[i].index(end) for i, end in places]
    sampling = Sampling(
        n=config.samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        prompt_numbers=tuple(numbers),
    )
    groups = engine.generate(contexts, sampling) if contexts else []
    answers = [
        ([*traces[i].ids[: end + 1], *one.ids], i)
        for (i, end), group in zip(places, groups, strict=True)
        for one in group
    ]
    answers += [(trace.ids, i) for i, trace in enumerate(traces)]
    verdicts = judge.judge(
        [traces[i].problem for _, i in answers],
        [renderer.text(ids) for ids, _ in answers],
        [len(ids) for ids, _ in answers],
        [ids for ids, _ in answers],
    )
    right = [None if verdict.outcome is None else verdict.outcome >= 1.0 for verdict in verdicts]
    own = right[len(right) - len(traces) :]
    report.sampled += len(right) - len(traces)
    report.unknown += right[: len(right) - len(traces)].count(None)
    behind = iter([right[k * config.samples : (k + 1) * config.samples] for k in range(len(places))])
    for trace, marks, verdict in zip(traces, ends, own, strict=True):
        outcomes = [[one for one in next(behind) if one is not None] for _ in marks[:-1]]
        outcomes.append([] if verdict is None else [verdict])
        if not marks or not all(outcomes):
            report.unjudged += 1
            continue
        texts = _texts(trace, marks, renderer, config.separator)
        shares = [sum(each) / len(each) for each in outcomes]
        yield LabelledSteps(trace, texts, shares, [len(each) for each in outcomes])


def _ends(trace: KnownTrace, cutter: StepCutter, stops: Sequence[int]) -> list[int]:
    """Places in the trace's ids of the last token of each step."""
    return last_tokens(Sample(trace.ids, trace.mask, Origin.EXPERT), cutter, stops)


def _texts(trace: KnownTrace, ends: Sequence[int], renderer: Renderer, separator: str) -> list[str]:
    whole = [renderer.text(trace.ids[: end + 1]) for end in ends]
    parts = [text[len(before) :] for before, text in zip(["", *whole], whole, strict=False)]
    return [part.removesuffix(separator) for part in parts]


def _row(found: LabelledSteps, config: StepLabelConfig, report: StepReport) -> dict[str, Any]:
    labels = [share > 0 if config.threshold is None else share >= config.threshold for share in found.shares]
    report.steps += len(labels)
    report.right += sum(labels)
    report.mean_share += sum(found.shares)
    problem = found.trace.problem
    row: dict[str, Any] = {
        "prompt": problem.prompt,
        "completions": found.steps,
        "labels": labels,
        "shares": found.shares,
    }
    row |= {"judged": found.judged, "problem_id": problem.id}
    return row | ({} if problem.reference is None else {"reference": problem.reference})
