"""`posttrain study traces`: what traces are worth, by every method that can use them, at one budget.

The problems of the traces are parted: four fifths to train on, one fifth to measure on, whose traces nobody sees. The
study is written as a file, which `posttrain study` goes on with and which can be edited.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from posttrain.config.locations import Locations
from posttrain.config.schema import ModelConfig
from posttrain.config.trust import Trusted, trusted
from posttrain.config.verifier import AnyVerifier
from posttrain.data.sample import Problem
from posttrain.data.traces import Trace, TraceSet, manifest_path, read_traces
from posttrain.errors import DataError, PosttrainError, RecipeError
from posttrain.evaluation.arms import baseline, scores
from posttrain.evaluation.seeds import POWER
from posttrain.models.tokenizer import load_tokenizer
from posttrain.safe_files import write_json_atomic, write_text_atomic
from posttrain.study.plan import check_study, trusted_by_study
from posttrain.study.schema import Study, build_study, load_study
from posttrain.study.table import difference, interval

FILE, INPUTS = "traces.yaml", "inputs"
HELD_OUT, MOST_HELD_OUT = 5, 256
"""One problem of so many is measured on, and at most so many."""
FEWEST = 10
"""Problems below which there is nothing to part."""
GROUP, RATE, SPARE = 8, 1.0e-5, 1.25
"""Samples of a prompt; the learning rate where none is given; room for answers longer than the longest right trace."""


def write_study(
    paths: Sequence[Path],
    model: str,
    output: Path,
    *,
    flops: float,
    seeds: int,
    rates: Sequence[float],
    run_code: bool = False,
) -> tuple[Study, dict[str, str]]:
    """Write the inputs and the file of the study, and read it; what is there already is kept as it is.

    Args:
        paths: trace files that one verifier has judged.
        model: that every arm starts from.
        output: folder of the study.
        flops: budget of a cell; sampling of new traces is charged, that of these is sunk.
        seeds: reported ones.
        rates: learning rates; several are tuned on a seed of its own.
        run_code: run code that the manifest of the traces names as their verifier, and send texts to its endpoints.

    Returns:
        The study, and arm -> why it cannot be run on these traces.

    Raises:
        DataError: too few problems, or traces without a right one among them.
        RecipeError: traces that no verifier or that several have judged, or one that is code; or no arm can run.
    """
    found = read_traces(paths)
    verifier = _verifier(found, paths)
    if not run_code:
        _refuse_trust(verifier, manifest_path(Path(paths[0])))
    right = [trace for trace in found.traces if trace.correct]
    if not right:
        raise DataError("no trace is right, so there is nothing to learn from", where=str(paths[0]))
    train, held_out = _part(found.traces, str(paths[0]))
    inputs = output / INPUTS
    _write_problems(inputs / "train.jsonl", train)
    _write_problems(inputs / "held_out.jsonl", held_out)
    files = _write_traces(paths, inputs, {_identity(problem) for problem in train})
    longest = _longest(right, model)
    data = _study(model, output, verifier, files, len(train), longest, flops, seeds, rates)
    refused = _without_refused(data, output / FILE)
    if not (output / FILE).exists():
        write_text_atomic(output / FILE, yaml.safe_dump(data, sort_keys=False))
    study = load_study(output / FILE)
    if not run_code and (asked := trusted_by_study(study)):
        raise _untrusted(asked[0], str(output / FILE))
    return study, refused


def answer(study: Mapping[str, Any]) -> list[str]:
    """What a finished study says of the traces, in sentences."""
    arms = {arm["name"]: arm for arm in study["arms"] if scores(arm)}
    if not arms:
        return ["No arm was measured, so nothing can be said."]
    best = arms[baseline(study)]
    start = [cell["curve"][0]["score"] for cell in best["cells"] if not cell["error"] and cell["curve"]]
    lines = [
        f"Best: {best['name']}, {interval(list(scores(best).values()))} percent on problems that nobody trained on."
    ]
    if start:
        lines.append(f"The model they all start from: {interval(start)}.")
    others = sorted(
        (arm for arm in arms.values() if arm is not best), key=lambda arm: -sum(scores(arm).values()) / len(scores(arm))
    )
    lines += [f"{arm['name']} against it: {difference(best, arm)} points." for arm in others]
    comparison = study["comparison"]
    if comparison is None:
        return [*lines, f"How sure: no test, since {study['undecidable']}. Four seeds are the fewest that can decide."]
    decisions = [d for d in comparison["result"]["decisions"] if best["name"] in (d["first"], d["second"])]
    beaten = [d for d in decisions if d["outcome"] in ("first", "second")]
    alpha = comparison["plan"]["alpha"]
    lines.append(
        f"How sure: {len(beaten)} of {len(decisions)} others are told apart from it, at an error of {alpha:g} over all."
    )
    for each in comparison["advice"]:
        if best["name"] in (each["first"], each["second"]) and each["in_all"]:
            pair = f"{each['first']} and {each['second']}"
            lines.append(f"To tell {pair} apart with {POWER:.0%} probability: about {each['in_all']} seeds of each.")
    return lines


# -------------------------------------------------------------------------------------------------------------- inputs


def _verifier(found: TraceSet, paths: Sequence[Path]) -> list[dict[str, Any]]:
    kinds = {json.dumps(manifest.verifier, sort_keys=True) for manifest in found.manifests.values()}
    if len(kinds) != 1 or kinds == {"[]"}:
        what = "were judged by several verifiers" if len(kinds) > 1 else "name no verifier"
        raise RecipeError(
            f"the traces {what}, and RL on them needs one", where=", ".join(map(str, paths)),
            hint="`posttrain prepare traces` judges them",
        )  # fmt: skip
    return json.loads(kinds.pop())


def _refuse_trust(verifier: list[dict[str, Any]], manifest: Path) -> None:
    """A manifest is data: what it names is a verifier of ours that computes here, or none without being asked for."""
    try:
        sections = TypeAdapter(list[AnyVerifier]).validate_python(verifier)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise DataError(f"no verifier: {first['msg']}", where=f"{manifest}: verifier.{at}") from error
    for each in trusted(sections, manifest.parent, path="verifier"):
        raise _untrusted(each, str(manifest))


def _untrusted(each: Trusted, where: str) -> RecipeError:
    what = f"a run by this file {each.what}"
    return RecipeError(what, where=f"{where}: {each.key}", hint="if you trust it, add --run-code")


def _part(traces: Sequence[Trace], where: str) -> tuple[list[Problem], list[Problem]]:
    problems = list({_identity(trace.problem): trace.problem for trace in traces}.values())
    if len(problems) < FEWEST:
        raise DataError(
            f"{len(problems)} problems are too few to hold some out", where=where, hint=f"at least {FEWEST}"
        )
    held_out = problems[HELD_OUT - 1 :: HELD_OUT][:MOST_HELD_OUT]
    kept = {_identity(problem) for problem in held_out}
    return [problem for problem in problems if _identity(problem) not in kept], held_out


def _identity(problem: Problem) -> str:
    return json.dumps([problem.prompt, problem.reference])


def _write_problems(path: Path, problems: Sequence[Problem]) -> None:
    rows = [{**p.meta, "prompt": p.prompt, "reference": p.reference} for p in problems]
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_traces(paths: Sequence[Path], folder: Path, train: set[str]) -> list[str]:
    """The traces of the problems that are trained on, a file for each one that was given."""
    written = []
    for number, path in enumerate(paths):
        found, target = read_traces([path]), folder / f"traces-{number}.jsonl"
        kept = [trace.to_json() + "\n" for trace in found.traces if _identity(trace.problem) in train]
        (manifest,) = found.manifests.values()
        write_json_atomic(manifest_path(target), asdict(manifest))
        write_text_atomic(target, "".join(kept))
        written.append(str(target))
    return written


def _longest(right: Sequence[Trace], model: str) -> int:
    """Tokens that an answer may have: those of the longest right trace, and some to spare."""
    tokenizer = load_tokenizer(ModelConfig(path=model))
    lengths = [len(t.ids) if t.ids is not None else len(tokenizer(t.text)["input_ids"]) + 1 for t in right]
    return int(SPARE * max(lengths)) + 1


# ---------------------------------------------------------------------------------------------------------------- arms


def _study(
    model: str,
    output: Path,
    verifier: list[dict[str, Any]],
    files: list[str],
    problems: int,
    longest: int,
    flops: float,
    seeds: int,
    rates: Sequence[float],
) -> dict[str, Any]:
    size = 1 << (min(16, problems).bit_length() - 1)  # a power of two divides
    chat = {"chat": False} if _plain(output / INPUTS / "train.jsonl", model) else {}
    source = {"path": str(output / INPUTS / "train.jsonl"), "reference": "reference", **chat}
    common = {"model": {"path": model}, "tracking": {"console": "plain", "plots": False}, "threads": 1}
    training = {"training": {"learning_rate": rates[0], "max_steps": 100, "save_steps": 20, "save_total_limit": 1}}
    traces = {"traces": {"path": files}}
    rollouts = {"samples_per_prompt": GROUP, "max_new_tokens": longest}
    judged: dict[str, Any] = {"verifier": verifier, "rollouts": rollouts}
    by_rows = {"batch": {"rows_per_step": size, "micro_batch": size}}
    by_prompts = {"batch": {"prompts_per_step": size, "micro_batch": GROUP}}

    def sft(data: dict[str, Any]) -> dict[str, Any]:
        return {**common, "data": data, "method": {"name": "sft"}, **by_rows, **training}

    def online(method: dict[str, Any], data: dict[str, Any], **changed: Any) -> dict[str, Any]:
        return {
            **common,
            "data": {"prompts": source, **data},
            **judged,
            "method": method,
            **by_prompts,
            **training,
            **changed,
        }

    sampled = {"model": {"path": model}, "data": {"prompts": source}, "verifier": verifier, "rollouts": rollouts}
    first = {**sft(traces), "training": {"learning_rate": rates[0], "num_train_epochs": 1.0}}
    grpo = online({"name": "grpo"}, {})
    replay = {"rollouts": {**rollouts, "replay": {"size": 4 * size, "share": 0.5}}}
    alone: dict[str, dict[str, Any]] = {
        "grpo": grpo,
        "sft": sft(traces),
        "chord": online({"name": "chord", "expert_rows_per_step": size}, traces),
        "prefixrl": online({"name": "prefixrl"}, traces),
        "rec_replay": online({"name": "rec"}, {}, **replay),
        "sdft": {key: value for key, value in online({"name": "sdft"}, traces).items() if key != "verifier"},
        "oreo": {
            **common, "data": {"traces": {"path": files, "keep": "all"}}, "method": {"name": "oreo"},
            "critic": {"learning_rate": 1.0e-4}, **by_rows, **training,
        },
    }  # fmt: skip
    arms = {name: {"stages": [{"name": "train", "train": recipe}]} for name, recipe in alone.items()}
    arms["rejection"] = {
        "stages": [
            {"name": "own", "sample": {**sampled, "threads": 1}},
            {"name": "train", "train": sft({"traces": {"path": "${own.traces}"}})},
        ]
    }
    then = {**grpo, "model": {"path": "${first.model}"}}
    arms["sft_then_grpo"] = {"stages": [{"name": "first", "train": first}, {"name": "train", "train": then}]}
    held_out = {**source, "path": str(output / INPUTS / "held_out.jsonl")}
    study: dict[str, Any] = {
        "study": "what the traces are worth",
        "output": str(output),
        "seeds": seeds,
        "arms": arms,
        "evaluate": {
            "benchmarks": [{"name": "held-out", "data": held_out, "verifier": verifier}],
            "samples": 4, "measure": "avg@4", "max_new_tokens": longest, "points": 4,
        },
        "budget": {"flops": flops, "traces": "sunk"},
    }  # fmt: skip
    if len(rates) > 1:
        study |= {"tuning_seeds": 1, "grid": {"training.learning_rate": list(rates)}}
    return study


def _plain(path: Path, model: str) -> bool:
    """Whether the model takes the prompts as text: it has no chat template, and they are no conversations."""
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    return isinstance(row["prompt"], str) and load_tokenizer(ModelConfig(path=model)).chat_template is None


def _without_refused(data: dict[str, Any], path: Path) -> dict[str, str]:
    """Take out the arms that cannot run on these traces, each with its reason."""
    refused: dict[str, PosttrainError] = {}
    for name, arm in data["arms"].items():
        try:
            check_study(build_study(path, {**data, "arms": {name: arm}}, Locations(str(path))))
        except PosttrainError as error:
            refused[name] = error
    if len(refused) == len(data["arms"]):
        raise next(iter(refused.values()))
    data["arms"] = {name: arm for name, arm in data["arms"].items() if name not in refused}
    return {name: str(error).splitlines()[0] for name, error in refused.items()}
