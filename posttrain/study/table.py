"""The table of a study, from its JSON. Nothing in it depends on the clock, so that equal studies have equal tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from posttrain.evaluation.arms import Json, baseline, mean, paired, scores
from posttrain.evaluation.seeds import in_words
from posttrain.evaluation.sequential import Decision
from posttrain.study.plan import in_words as setting_in_words
from posttrain.tracking.ledger import UNITS


def markdown(study: Json) -> str:
    """The study as a page of Markdown: the table, what was decided, what failed, what to know."""
    config = study["config"]
    arms = [arm for arm in study["arms"] if scores(arm)]
    lines = [
        f"# {study['study']}",
        "",
        f"{config['evaluate'].get('measure', 'greedy')}, percent; mean over seeds [95% interval]",
        "",
    ]
    if arms:
        best = baseline(study)
        head = ["arm", "setting", "seeds", "score", f"difference to {best}, by seed", "steps", "FLOPs", "tokens"]
        head += ["environment steps"] if _acts(arms) else []
        own = _own(config)
        head += ["measure", "tokens an answer"] if own else []
        beside = config["evaluate"].get("beside", [])
        head += [f"beside: {name}" for name in beside]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        base = next(arm for arm in arms if arm["name"] == best)
        rows = [_row(arm, base) + _steps(arm, arms) + _answers(arm, config) + _beside(arm, beside) for arm in arms]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    lines += [f"- {line}" for line in _notes(study)]
    return "\n".join(lines) + "\n"


def interval(values: Sequence[float]) -> str:
    """Mean over seeds in percent, with the 95% t interval from two seeds on."""
    found, ends = mean(values)
    text = f"{100 * found:.1f}"
    return f"{text} (1 seed)" if ends is None else f"{text} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]"


def difference(base: Json, other: Json) -> str:
    """Other minus base in points over the seeds that both have, with its interval."""
    found = paired(base, other)
    if found is None:
        return "no seed in common"
    text = f"{100 * found[0]:+.1f}"
    return f"{text} (1 seed)" if found[1] is None else f"{text} [{100 * found[1].low:+.1f}, {100 * found[1].high:+.1f}]"


def costs(study: Json) -> list[str]:
    """Processor or GPU seconds of each arm, tuning beside it; these differ from run to run."""
    lines = []
    for arm in study["arms"]:
        reported, tuned = (_seconds(arm[part]) for part in ("cells", "tuning"))
        more = f", tuning {tuned:,.0f} s" if tuned else ""
        lines.append(f"{arm['name']}: {reported:,.0f} s in training{more}")
    return lines


def decisions(study: Json) -> list[str]:
    """Every pair in a sentence."""
    if study["comparison"] is None:
        return [f"no decision: {study['undecidable']}"]
    return [in_words(Decision(**each)) for each in study["comparison"]["result"]["decisions"]]


def _row(arm: Json, base: Json) -> list[str]:
    done = [cell for cell in arm["cells"] if not cell["error"]]
    against = "-" if arm["name"] == base["name"] else difference(base, arm)
    setting = setting_in_words(arm["setting"]) or "-"
    tokens = fmean(sum(n for name, n in cell["spent"].items() if name.startswith("tokens_")) for cell in done)
    flops = fmean(cell["spent"].get("flops", 0) for cell in done)
    steps = f"{fmean(cell['steps'] for cell in done):.0f}"
    return [
        arm["name"], setting, str(len(done)), interval(list(scores(arm).values())), against, steps,
        f"{flops:.3g}", f"{tokens:.3g}",
    ]  # fmt: skip


def _acts(arms: Sequence[Json]) -> bool:
    return any("environment_steps" in cell["spent"] for arm in arms for cell in arm["cells"] if not cell["error"])


def _steps(arm: Json, arms: Sequence[Json]) -> list[str]:
    """A cell with the actions that environments answered, where any arm acts."""
    taken = [cell["spent"].get("environment_steps", 0) for cell in arm["cells"] if not cell["error"]]
    return [f"{fmean(taken):,.0f}"] if _acts(arms) else []


def _own(config: Json) -> dict[str, Json]:
    """Arm -> keys of `evaluate` that it alone has; arms without any are left out."""
    arms = {name: {} if isinstance(arm, str) else arm.get("evaluate") or {} for name, arm in config["arms"].items()}
    return {name: own for name, own in arms.items() if own}


def _answers(arm: Json, config: Json) -> list[str]:
    """How an arm's answers are made and what one takes, where that is not the same for all arms."""
    own = _own(config)
    if not own:
        return []
    measure = own.get(arm["name"], {}).get("measure", config["evaluate"].get("measure", "greedy"))
    tokens = [cell["answer_tokens"] for cell in arm["cells"] if not cell["error"]]
    return [measure, "not counted" if None in tokens else f"{fmean(tokens):.1f}"]


def _beside(arm: Json, names: Sequence[str]) -> list[str]:
    """A cell for each benchmark that is no part of the score."""
    return [interval([cell["beside"][name] for cell in arm["cells"] if not cell["error"]]) for name in names]


def _notes(study: Json) -> list[str]:
    config, comparison = study["config"], study["comparison"]
    lines = decisions(study)
    if comparison is not None:
        plan = comparison["plan"]
        lines.append(
            f"look {comparison['result']['looks']} of {plan['looks']}, {plan['seeds_per_look']} seeds of each arm per "
            f"look; probability of any false difference at most {plan['alpha']:g} over all pairs and looks"
        )
        gap = comparison["compute_gap"]
        if gap is not None and gap > plan["tolerance"]:
            lines.append(f"compute differs by {gap:.0%}: a difference may be one of compute")
        elif gap is not None:
            lines.append(f"compute: equal within {gap:.1%}")
    budget = config.get("budget")
    if budget is not None:
        unit = next(unit for unit in UNITS if budget.get(unit) is not None)
        traces = budget.get("traces", "charged")
        lines.append(f"budget of each cell: {budget[unit]:.3g} {unit}; what sampling the traces took is {traces}")
    for arm in study["arms"]:
        tried = [f"{setting_in_words(each['setting'])}: {_percent(each['score'])}" for each in arm["tuned"]]
        if tried:
            lines.append(f"{arm['name']} was tuned on {len(config_seeds(arm))} other seeds: {'; '.join(tried)}")
        for part, word in (("tuning", "tuning, "), ("cells", "")):
            for cell in arm[part]:
                if cell["error"]:
                    setting = f"{setting_in_words(cell['setting'])}, " if cell["setting"] else ""
                    lines.append(f"failed: {arm['name']}, {word}{setting}seed {cell['seed']}: {cell['error']}")
    if study["changes"]:
        changed = "; ".join(study["changes"])
        lines.append(f"the plan changed after results were there, so the error above holds no longer: {changed}")
    return lines


def config_seeds(arm: Json) -> set[int]:
    """Seeds that an arm was tuned on."""
    return {cell["seed"] for cell in arm["tuning"]}


def _percent(score: float | None) -> str:
    return "failed" if score is None else f"{100 * score:.1f}"


def _seconds(cells: Sequence[Json]) -> float:
    spent = [cell["spent"] for cell in cells if not cell["error"]]
    return sum(each.get("gpu_seconds") or each.get("cpu_seconds", 0.0) for each in spent)
