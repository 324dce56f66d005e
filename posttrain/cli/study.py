"""`posttrain study`: arms over seeds at one budget, from a file or from a recipe and the values of a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from posttrain.cli.trust import say_trusted
from posttrain.config.locations import Locations
from posttrain.config.overrides import apply_overrides
from posttrain.config.yaml_file import read_file, read_text
from posttrain.errors import RecipeError
from posttrain.study.plan import check_study, in_words, trusted_by_study
from posttrain.study.schema import Study, build_study, load_study
from posttrain.terminal import say

_OF_A_RUN = ("every", "best", "preferences")
"""Keys of a recipe's evaluation that say when it is made, not how."""


def study_command(study: Study, *, jobs: int, address: str | None, check: bool, run_code: bool = False) -> None:
    """Check a study, and unless only that is asked for run what is missing of it and print its table.

    Args:
        study: as read.
        jobs, address: as `run_study`.
        check: only check it, and say what a run trusts.
        run_code: while it is checked, run plugins and code of models.

    Raises:
        PosttrainError: as `run_study`.
        RecipeError: more processes than one on Ray need an address; none does without.
    """
    if check:
        say_trusted(trusted_by_study(study, run_code=run_code), "study", run_code=run_code)
        check_study(study, run_code=run_code)
        say(_announced(study))
        return
    _run(study, jobs, address)


def traces_command(paths: Sequence[Path], options: dict[str, Any]) -> None:
    """What traces are worth: write the ready-made study, run it, and say its answer beside the figures of `inspect`.

    Args:
        paths: trace files.
        options: of the command line; None where not given.

    Raises:
        RecipeError: something that it needs is not given, or that it does not read is.
        PosttrainError: as `write_study` and `run_study`.
    """
    from posttrain.cli.inspect import inspect_command
    from posttrain.study.traces import FILE, RATE, answer, write_study

    usage = "posttrain study traces FILE... --model M --flops 1e15"
    if not paths or options["model"] is None or options["flops"] is None:
        raise RecipeError("the study of traces needs their files, a model and a budget", hint=usage)
    if options["sweep"] or options["measure"] is not None:
        raise RecipeError("--sweep and --measure have no effect with `traces`", hint="edit the file that it writes")
    rates = [RATE] if options["rates"] is None else _values(f"training.learning_rate={options['rates']}")[1]
    output = Path(options["output"] or "runs/traces")
    made = {"flops": options["flops"], "seeds": options["seeds"] or 5, "rates": [float(rate) for rate in rates]}
    made["run_code"] = options["run_code"]
    study, refused = write_study(paths, options["model"], output, **made)
    say(f"study: {output / FILE}, to be edited and run by `posttrain study`")
    for name, why in refused.items():
        say(f"left out: {name}: {why}")
    inspect_command(list(paths), policy=None, k="1,4,16", output=None, as_json=False)
    if options["check"]:
        say(_announced(study))
        return
    for line in answer(_run(study, options["jobs"], options["address"])):
        say(line)


def _run(study: Study, jobs: int, address: str | None) -> dict[str, Any]:
    """Run it, print the table, and give its JSON."""
    from posttrain.study.study import TABLE, run_study
    from posttrain.study.table import costs, markdown

    say(_announced(study))
    data = json.loads(json.dumps(run_study(study, jobs=jobs, address=address, say=say).to_dict()))
    say()
    say(markdown(data))
    for line in costs(data):
        say(line)
    say(f"table: {study.output / TABLE}")
    return data


def of_target(target: Path, overrides: Sequence[str], sweep: Sequence[str], options: dict[str, Any]) -> Study:
    """The study that a file stands for: itself, or with `sweep` a recipe.

    Args:
        target: a study file; a recipe with `sweep`.
        overrides: dotted, of that file.
        sweep: `key=value,value,...`; each combination is an arm.
        options: `seeds`, `measure` and `output` of the command line; None where not given.

    Raises:
        RecipeError: as `load_study`, or options without effect.
    """
    if sweep:
        return _swept(target, overrides, sweep, options)
    given = {"seeds": options["seeds"], "evaluate.measure": options["measure"], "output": options["output"]}
    changed = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return load_study(target, [*overrides, *changed])


def _swept(target: Path, overrides: Sequence[str], sweep: Sequence[str], options: dict[str, Any]) -> Study:
    recipe, places = read_file(target)
    if "arms" in recipe:
        raise RecipeError(
            "a study has a grid of its own", where=str(target), hint="write `grid`, or give a recipe to --sweep"
        )
    apply_overrides(recipe, places, overrides)
    evaluation = recipe.get("evaluation")
    if not isinstance(evaluation, dict) or not evaluation.get("benchmarks"):
        raise RecipeError(
            "a sweep measures by the recipe's `evaluation`, which names no benchmarks",
            where=places.where(("evaluation",)),
            hint="add evaluation.benchmarks=[NAME], or write a study",
        )
    values = dict(_values(text) for text in sweep)
    settings = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    changed = dict(_override(text) for text in overrides)
    data: dict[str, Any] = {
        "study": f"sweep of {', '.join(values)}",
        "output": options["output"] or f"{recipe.get('output', 'runs/sweep')}-sweep",
        "arms": {_arm_name(setting): {"recipe": target.name, "set": changed | setting} for setting in settings},
        "seeds": options["seeds"] or 3,
        "evaluate": {key: value for key, value in evaluation.items() if key not in _OF_A_RUN},
    }
    if options["measure"] is not None:
        data["evaluate"]["measure"] = options["measure"]
    locations = Locations(str(target))
    for path, place in places.places.items():
        if path[0] == "evaluation":
            locations.places["evaluate", *path[1:]] = place
    for name, setting in zip(data["arms"], settings, strict=True):
        for key in setting:
            locations.places["arms", name, "set", key] = f"--sweep {key}"
    return build_study(target, data, locations)


def _arm_name(setting: dict[str, Any]) -> str:
    return in_words(setting).replace(", ", "+").replace(" ", "")


def _values(text: str) -> tuple[str, list[Any]]:
    """`training.learning_rate=1e-6,3e-6` as key and values; they are read as a list of YAML."""
    key, equals, written = text.partition("=")
    if not equals or not key.strip() or not written.strip():
        raise RecipeError(
            "a sweep is key=value,value,...", where=f"--sweep {text}", hint="training.learning_rate=1e-6,3e-6"
        )
    values = read_text(f"[{written}]", f"--sweep {text}")[0]
    if len({json.dumps(value) for value in values}) < len(values):
        raise RecipeError("a value is given twice", where=f"--sweep {text}")
    return key.strip(), values


def _override(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key.strip(), read_text(value, f"override {text!r}")[0]


def _announced(study: Study) -> str:
    config = study.config
    settings = {name: len(config.settings(name)) for name in config.arms}
    tuned = sum(number for number in settings.values() if number > 1) * len(config.tuning)
    lines = [
        f"{study.file}: study {config.study}: {len(config.arms)} arms ({', '.join(config.arms)}), "
        f"{len(config.reported)} seeds{' at most' if config.sequential else ''}"
    ]
    if tuned:
        lines.append(f"tuning: {tuned} cells on {len(config.tuning)} other seeds")
    if config.sequential is not None:
        test = config.sequential
        lines.append(
            f"looks: {test.looks} of {test.seeds_per_look} seeds, error {test.alpha:g} over all pairs and looks"
        )
    if config.budget is not None:
        lines.append(f"budget: {config.budget.amount:.3g} {config.budget.unit} a cell, traces {config.budget.traces}")
    return "\n".join(lines)
