"""Hybrid methods against plain RL and SFT, at equal compute, over a range of difficulty and several seeds.

    python bench/hybrid.py --output runs/bench/hybrid --jobs 2

A cell is (regime, arm, seed). A regime is a number of terms of chain sum: from where the base solves a few percent of
its samples to where it solves a few in ten thousand. Every seed has a base of its own, trained once on a weak
annotator's traces and used by all arms. Old traces are bought once per (regime, seed) by sampling from the base, and
every arm that uses them is charged for all of it. An arm has the regime's budget of FLOPs (ledger: 2 per parameter and
token read or sampled, 6 per token trained on) and spends on its training what the traces left; the number of steps
follows from a probe of a few steps of the same recipe. Measured on problems that nobody trained on, from the prompt
alone, and beside it on those that the traces solve.

A finished cell is a JSON file that is not made again, so the command can be broken off and repeated, and regimes, arms
and seeds can be added later. At the end table, picture and the verdict on PrefixRL's claim are made from the cells
that are there; `--report` does only that, and with `--load bench/results/hybrid.json` on the cells that we made.
`--estimate` runs a base, its traces and a few steps of each arm, and says what all cells asked for would cost. With
`--expert` the traces are the ground truth of all pool problems, for nothing: what the arms do with good traces that
somebody else paid for. Give it an `--output` of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cells as saved
import torch
import yaml
from hybrid_report import report

from posttrain.config.collection import SampleSettings
from posttrain.config.loading import load_recipe
from posttrain.config.schema import EvaluationConfig, ModelConfig, TaskSource
from posttrain.data.sample import Problem
from posttrain.data.tasks import generate_problems
from posttrain.data.traces import read_traces
from posttrain.evaluation.runner import evaluate_model
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.models.size import non_embedding_parameters
from posttrain.rollouts.collect import collect
from posttrain.safe_files import write_json_atomic, write_text_atomic
from posttrain.trainers.run import train

BASE_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "hybrid" / "sft-tiny-chain_sum.yaml"
CONFIGS = {name: cls.Config for name, cls in METHODS.items()}
VERIFIER = [{"type": "procedural", "profile": "strict"}]
POOL = 512
"""Training problems of a regime."""
PROMPTS, SAMPLES, EXPERTS = 16, 8, 32
"""Of an RL step: prompts, samples for each, and expert rows where an arm takes them, or as many as there are traces."""
POINTS, FRESH, KNOWN, FRESH_SAMPLES = 6, 256, 64, 4
"""Measurements in a stage, fresh problems in each, solved ones at most, samples beside the greedy one."""
NAMES = {"fresh": "", "known": "known_"}
"""Benchmarks, and what the names of their measurements begin with in a cell."""
PROBE_STEPS = 3


@dataclass(frozen=True, slots=True)
class Regime:
    """Attributes:
    level: terms of the sums.
    tries: completions per pool problem that are sampled to buy traces.
    budget: FLOPs per parameter that an arm may spend, the sampling of traces included.
    """

    level: int
    tries: int
    budget: float

    @property
    def max_new_tokens(self) -> int:
        """Eight characters a step at most, the answer, the end, and some to spare."""
        return 8 * (self.level - 1) + 12


REGIMES = {
    "L4": Regime(4, 8, 5e6),
    "L5": Regime(5, 32, 7e6),
    "L6": Regime(6, 80, 10e6),
    "L7": Regime(7, 128, 14e6),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """Attributes:
    method: of the RL stage, for a number of steps and of expert rows; None without that stage.
    traces: it uses the traces, so it pays for them.
    sft_epochs: passes over the traces in a stage of SFT before, at most; 0 without one.
    sft_share: most that this stage may take of what the traces left of the budget.
    problems: of the RL stage: the pool, those of it that have a trace (`solved`), or half and half (`both`).
    """

    method: Callable[[int, int], dict[str, Any]] | None
    traces: bool = True
    sft_epochs: int = 0
    sft_share: float = 1.0
    problems: Literal["pool", "solved", "both"] = "pool"


def _grpo(steps: int, experts: int) -> dict[str, Any]:
    return {"name": "grpo", "aggregation": "tokens"}


def _prefixrl(steps: int, experts: int) -> dict[str, Any]:
    return {"name": "prefixrl", "aggregation": "tokens", "scale_rewards": "group"}


def _chord_mu(steps: int, experts: int) -> dict[str, Any]:
    """The paper's schedule, decaying over the first half of the run."""
    schedule = {"mu_decay_steps": max(steps // 2, 1), "mu_peak": 0.9, "mu_valley": 0.05}
    return {"name": "chord", "phi": "none", "expert_rows_per_step": experts, **schedule}


def _chord_phi(steps: int, experts: int) -> dict[str, Any]:
    return {"name": "chord", "expert_rows_per_step": experts}


def _red(steps: int, experts: int) -> dict[str, Any]:
    return {"name": "red", "expert_rows_per_step": experts}


ARMS = {
    "grpo": Arm(_grpo, traces=False),
    "grpo_solved": Arm(_grpo, problems="solved"),
    "sft": Arm(None, sft_epochs=60),
    "sft_grpo": Arm(_grpo, sft_epochs=20, sft_share=0.25),
    "prefixrl": Arm(_prefixrl, problems="solved"),
    "prefixrl_both": Arm(_prefixrl, problems="both"),
    "chord_mu": Arm(_chord_mu),
    "chord_phi": Arm(_chord_phi),
    "red": Arm(_red),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What all cells share.

    Attributes:
        output: folder of everything.
        learning_rate: of the RL stages.
        sft_learning_rate: of the SFT stages.
        expert: the traces are the expert's, for all problems and free of charge.
    """

    output: Path
    learning_rate: float
    sft_learning_rate: float
    expert: bool = False


# ------------------------------------------------------------------------------------------------------ what is shared


def make_base(settings: Settings, seed: int) -> Path:
    """The seed's base model."""
    folder = settings.output / "base" / f"seed-{seed}"
    if not (folder / "cpu.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.process_time()
        overrides = [f"output={folder}", f"seed={seed}", f"data.completions.seed={seed}", *QUIET]
        train(load_recipe(BASE_RECIPE, overrides, CONFIGS))
        write_json_atomic(folder / "cpu.json", {"seconds": time.process_time() - started})
    return folder / "model"


def make_traces(settings: Settings, name: str, seed: int) -> Path:
    """Folder with the regime's traces, the problems that have a correct one, and the base's measurements."""
    regime, folder = REGIMES[name], settings.output / name / f"traces-{seed}"
    if (folder / "bought.json").exists():
        return folder
    started, base = time.process_time(), make_base(settings, seed)
    sampling = SampleSettings(
        model={"path": str(base)},
        data={"prompts": pool(regime, seed)},
        verifier=VERIFIER,
        verifier_pool={"workers": 0},
        rollouts={
            "samples_per_prompt": regime.tries,
            "max_new_tokens": regime.max_new_tokens,
            "max_batch": 1024,
        },
        seed=seed,
        threads=1,
    )
    bought = collect(sampling, folder / "traces.jsonl", say=lambda _: None)
    correct = [trace for trace in read_traces([folder / "traces.jsonl"]).traces if trace.correct]
    solved = list({trace.problem_id: trace.problem for trace in correct}.values())
    write_problems(folder / "solved.jsonl", solved, PROMPTS)  # repeated where a step takes more than there are
    everything = generate_problems(TaskSource(**pool(regime, seed)), "prompts")
    write_problems(folder / "both.jsonl", [*everything, *repeated(solved, POOL)], POOL)
    write_problems(folder / "known.jsonl", solved[:KNOWN], 1)
    model, _ = load_policy(ModelConfig(path=str(base)), seed=0)
    measured = evaluate_model(
        ModelConfig(path=str(base)), EvaluationConfig(**measure(regime, folder)), folder / "base.json"
    )
    found = {
        "flops": bought.flops,
        "tries": bought.traces,
        "correct": bought.correct,
        "problems": bought.prompts,
        "solved": len(solved),
        "base_pass": bought.correct / bought.traces,
        "base": {
            NAMES[one.name] + key: value.value for one in measured.benchmarks for key, value in one.headline().items()
        },
        "parameters": non_embedding_parameters(model),
        "seconds": time.process_time() - started,
    }
    write_json_atomic(folder / "bought.json", found)
    return folder


def repeated(problems: Sequence[Problem], number: int) -> list[Problem]:
    """The problems again and again until there are at least that many; none if there is none."""
    return [*problems] * -(-number // max(len(problems), 1))


def write_problems(path: Path, problems: Sequence[Problem], at_least: int) -> None:
    """Problems as a file that a recipe reads, with what the verifier needs."""
    rows = [{"prompt": p.prompt, "reference": p.reference, **p.meta} for p in repeated(problems, at_least)]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_bought(settings: Settings, traces: Path) -> dict[str, Any]:
    """What the traces cost and hold."""
    bought = json.loads((traces / "bought.json").read_text(encoding="utf-8"))
    if settings.expert:
        bought |= {"flops": 0, "correct": POOL, "solved": bought["problems"]}
    return bought


def pool(regime: Regime, seed: int) -> dict[str, Any]:
    return {"task": "chain_sum", "levels": [regime.level], "size": POOL, "seed": seed}


def measure(regime: Regime, traces: Path, every: int | None = None) -> dict[str, Any]:
    """The evaluation, from the prompt alone: other problems of the same level, and those that the traces solve."""
    data = {"task": "chain_sum", "levels": [regime.level], "size": FRESH, "split": "test"}
    benchmarks = [{"name": "fresh", "data": data, "verifier": VERIFIER}]
    known = traces / "known.jsonl"
    if known.stat().st_size:
        data = {"path": str(known), "reference": "reference", "chat": False}
        benchmarks.append({"name": "known", "data": data, "verifier": VERIFIER})
    return {
        "benchmarks": benchmarks,
        "samples": FRESH_SAMPLES,
        "max_new_tokens": regime.max_new_tokens,
        "max_batch": 1024,
        "every": every,
    }


# --------------------------------------------------------------------------------------------------------------- cells

QUIET = ["tracking.console=off", "tracking.plots=false"]


def place(output: Path, cell: Mapping[str, Any]) -> Path:
    return output / cell["regime"] / cell["arm"] / f"seed-{cell['seed']}.json"


def run_cell(settings: Settings, name: str, arm_name: str, seed: int) -> dict[str, Any]:
    """Run one cell and write it, or read it."""
    path = place(settings.output, {"regime": name, "arm": arm_name, "seed": seed})
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    regime, arm, traces = REGIMES[name], ARMS[arm_name], make_traces(settings, name, seed)
    bought = read_bought(settings, traces)
    started, folder = time.process_time(), path.with_suffix("")
    budget = regime.budget * bought["parameters"]
    spent = bought["flops"] if arm.traces else 0
    points = [{"flops": spent, **bought["base"]}]
    model, stages = make_base(settings, seed), []
    usable, experts = bought["solved"] > 0 or not arm.traces, min(EXPERTS, bought["correct"])
    if usable and arm.sft_epochs:
        rows = min(32, bought["correct"])
        step = 6 * bought["parameters"] * rows * (2 * regime.level + regime.max_new_tokens)  # FLOPs, at most
        steps = min(arm.sft_epochs * bought["correct"] // rows, int(arm.sft_share * (budget - spent) / step))
        stages.append(sft_stage(settings, regime, traces, rows, steps, seed))
    if usable and arm.method is not None:
        stages.append(rl_stage(settings, regime, arm, traces, experts, seed))
    for number, recipe in enumerate(stages):
        recipe["model"] = {"path": str(model)}
        stage = folder / f"stage-{number}"
        if recipe["training"]["max_steps"] is None:
            per_step = probe(recipe, folder / f"probe-{number}")
            steps = int((budget - spent) / per_step)
            if steps < POINTS:
                raise SystemExit(f"{name}/{arm_name}: the budget of {regime.budget:g} leaves {steps} steps")
            recipe["training"]["max_steps"] = steps
            recipe["method"] = arm.method(steps, experts)
        steps = recipe["training"]["max_steps"]
        every = max(steps // POINTS, 1)
        recipe["training"]["max_steps"] = steps - steps % every  # so that the last step is measured
        recipe["evaluation"] = measure(regime, traces, every)
        model = run(recipe, stage)
        curve = list(read_curve(stage / "metrics.jsonl"))
        points += [{**point, "flops": point["flops"] + spent} for point in curve]
        spent = points[-1]["flops"]
    cell = {
        "regime": name,
        "arm": arm_name,
        "seed": seed,
        "level": regime.level,
        "base_pass": bought["base_pass"],
        "solved": bought["solved"],
        "problems": bought["problems"],
        "budget": budget,
        "sampling": bought["flops"] if arm.traces else 0,
        "flops": spent,
        "trained": usable,
        "points": points,
        "learning_rate": settings.learning_rate,
        "seconds": time.process_time() - started,
    }
    write_json_atomic(path, cell)
    return cell


def trace_source(settings: Settings, regime: Regime, traces: Path, seed: int) -> dict[str, Any]:
    """The `data.traces` section."""
    return pool(regime, seed) if settings.expert else {"path": str(traces / "traces.jsonl")}


def sft_stage(settings: Settings, regime: Regime, traces: Path, rows: int, steps: int, seed: int) -> dict[str, Any]:
    return {
        "data": {"traces": trace_source(settings, regime, traces, seed)},
        "method": {"name": "sft"},
        "batch": {"rows_per_step": rows, "micro_batch": rows},
        "training": {"learning_rate": settings.sft_learning_rate, "max_steps": max(steps, 1)},
        "seed": seed,
        "threads": 1,
    }


def rl_stage(settings: Settings, regime: Regime, arm: Arm, traces: Path, experts: int, seed: int) -> dict[str, Any]:
    """Without a number of steps: the budget decides."""
    data: dict[str, Any] = {"prompts": pool(regime, seed)}
    if arm.problems != "pool" and not settings.expert:
        path = traces / f"{arm.problems}.jsonl"
        data["prompts"] = {"path": str(path), "reference": "reference", "chat": False}
    if arm.method is not _grpo:
        data["traces"] = trace_source(settings, regime, traces, seed)
    return {
        "data": data,
        "verifier": VERIFIER,
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": SAMPLES, "max_new_tokens": regime.max_new_tokens},
        "method": arm.method(PROBE_STEPS, experts),
        "batch": {"prompts_per_step": PROMPTS, "micro_batch": PROMPTS * SAMPLES},
        "training": {"learning_rate": settings.learning_rate, "max_steps": None},
        "seed": seed,
        "threads": 1,
    }


def probe(recipe: dict[str, Any], folder: Path, steps: int = PROBE_STEPS) -> float:
    """FLOPs of one step of a recipe, from a few of them; they are not charged."""
    short = {**recipe, "training": {**recipe["training"], "max_steps": steps}}
    run(short, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(row["flops_total"] for row in rows if "flops_total" in row) / steps


def run(recipe: dict[str, Any], folder: Path) -> Path:
    """Train a recipe from its beginning in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, "output": str(folder)}, sort_keys=False), encoding="utf-8")
    return train(load_recipe(path, QUIET, CONFIGS)).model_dir


def read_curve(metrics: Path) -> Iterator[dict[str, float]]:
    """FLOPs so far and the measurements, for each evaluated step after the start."""
    flops: dict[int, float] = {}
    measured: dict[int, dict[str, float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "flops_total" in row:
            flops[row["step"]] = row["flops_total"]
        found = {
            prefix + key.removeprefix(f"eval/{name}/"): value
            for name, prefix in NAMES.items()
            for key, value in row.items()
            if key.startswith(f"eval/{name}/")
        }
        if found:
            measured[row["step"]] = {key: value for key, value in found.items() if not key.endswith(("_low", "_high"))}
    for step in sorted(measured.keys() - {0}):
        yield {"flops": flops[step], "step": step, **measured[step]}


# ---------------------------------------------------------------------------------------------------------------- main


def estimate(settings: Settings, regimes: list[str], arms: list[str], seeds: list[int]) -> None:
    """Run the first seed's base and traces and probes of all arms, and print what all cells would cost."""
    seed, total = seeds[0], 0.0
    base = make_base(settings, seed)
    total += len(seeds) * json.loads((base.parent / "cpu.json").read_text(encoding="utf-8"))["seconds"]
    for name in regimes:
        traces = make_traces(settings, name, seed)
        bought = read_bought(settings, traces)
        total += len(seeds) * bought["seconds"]
        left = REGIMES[name].budget * bought["parameters"] - bought["flops"]
        print(
            f"{name}: base pass@1 {bought['base_pass']:.4%}, {bought['solved']} of {bought['problems']} solved, traces "
            f"{bought['flops']:.3g} FLOPs of {left + bought['flops']:.3g}, {bought['seconds']:.0f} CPU s"
        )
        for arm_name in arms:
            arm = ARMS[arm_name]
            if arm.method is None or (arm.traces and not bought["solved"]):
                continue
            recipe = rl_stage(settings, REGIMES[name], arm, traces, min(EXPERTS, bought["correct"]), seed)
            recipe["model"] = {"path": str(base)}
            folder, clock = settings.output / name / f"estimate-{arm_name}", [time.process_time()]
            for steps in (PROBE_STEPS, 3 * PROBE_STEPS):  # the difference has no loading and saving in it
                per_step = probe(recipe, folder, steps)
                clock.append(time.process_time())
            seconds = (clock[2] - clock[1] - (clock[1] - clock[0])) / (2 * PROBE_STEPS)
            steps = (left if arm.traces else left + bought["flops"]) / per_step
            total += len(seeds) * steps * seconds
            print(f"  {arm_name}: {steps:.0f} steps of {per_step:.3g} FLOPs, about {steps * seconds:.0f} CPU s a cell")
    cells = len(regimes) * len(arms) * len(seeds)
    print(f"all {cells} cells: about {total / 3600:.1f} CPU hours, without SFT and measuring")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--sft-learning-rate", type=float, default=3e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/hybrid"))
    parser.add_argument("--expert", action="store_true", help="traces by the expert, free of charge")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--report", action="store_true")
    saved.add_options(parser)
    options = parser.parse_args()
    saved.load(options.load, partial(place, options.output))
    settings = Settings(options.output, options.learning_rate, options.sft_learning_rate, options.expert)
    torch.set_num_threads(1)
    if options.estimate:
        estimate(settings, options.regimes, options.arms, options.seeds)
        return
    if not options.report:
        # Spawned, because torch does not survive a fork with threads; bases and traces first, since cells share them.
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as workers:
            finish([workers.submit(make_base, settings, seed) for seed in options.seeds])
            pairs = [(name, seed) for name in options.regimes for seed in options.seeds]
            finish([workers.submit(make_traces, settings, *pair) for pair in pairs])
            cells = [(name, arm, seed) for seed in options.seeds for name in options.regimes for arm in options.arms]
            finish([workers.submit(run_cell, settings, *cell) for cell in cells], say=True)
    print(report(options.output, list(REGIMES), list(ARMS)))
    saved.save(options.save, options.output, "*/*/seed-*.json", partial(place, options.output))


def finish(futures: list[Future], *, say: bool = False) -> None:
    for future in futures:
        cell = future.result()
        if say:
            last = cell["points"][-1]
            print(
                f"{cell['regime']} {cell['arm']} seed {cell['seed']}: greedy {last['greedy']:.3f}, "
                f"{cell['flops'] / cell['budget']:.2f} of the budget, {cell['seconds']:.0f} CPU s",
                flush=True,
            )


if __name__ == "__main__":
    main()
