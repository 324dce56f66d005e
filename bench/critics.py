"""Critics, offline RL and resets on the testbed: three comparisons over seeds, each from one base per seed.

    python bench/critics.py --output runs/bench/critics --seeds 1 2 3 --jobs 2

- `offline`: OREO (token, step, response), step-level DAPO, rejection-sampling SFT and DPO on the same traces: the
  base's own verified answers to sums of four terms. Every arm takes the same number of updates; FLOPs stand beside it.
- `search`: the step-level OREO policy of that comparison, greedy, by a search that its value model guides, and as the
  best of n samples by the same value model with at least as many tokens drawn.
- `resets`: PPO, DR-PO with half and all rollouts reset, its group-relative form, GRPO, and DPO on verifier pairs, on
  sums of six terms, of which the base hardly solves any. Every arm but DPO has the same budget of FLOPs; those that use
  traces pay for the sampling of them.

A finished cell is a JSON file that is not made again, so the command can be broken off and repeated. At the end a table
is made of the cells that are there; `--report` does only that. `--smoke` makes everything tiny, to see that it runs.
Seed 0 was used to try settings and is not to be among those reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from posttrain.config.collection import PairSettings, SampleSettings
from posttrain.config.loading import load_recipe
from posttrain.config.schema import (
    EvaluationConfig,
    ModelConfig,
    ProceduralVerifierConfig,
    TaskSource,
    ValueSearchConfig,
    VerifierPoolConfig,
)
from posttrain.data.pairs import write_pairs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.evaluation.runner import evaluate_model
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.models.size import non_embedding_parameters
from posttrain.rollouts.collect import collect
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.guided import GuidedEngine, search_engine
from posttrain.state.files import write_json_atomic
from posttrain.trainers.run import train
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.verdict import Judge

BASE_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "testbed" / "sft-tiny-chain_sum.yaml"
CONFIGS = {name: cls.Config for name, cls in METHODS.items()}
VERIFIER = [{"type": "procedural", "profile": "strict"}]
QUIET = ["tracking.console=off", "tracking.plots=false"]
WIDTHS = (2, 3, 4)
"""Of the guided search."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is.

    Attributes:
        dense: terms of the sums of `offline` and `search`.
        sparse: those of `resets`.
        base_steps: updates of the base.
        pool: training problems.
        tries: completions per problem that the traces are made of, dense and sparse.
        steps: updates of an offline arm.
        fresh: held-out problems.
        budget: FLOPs per parameter of an arm of `resets`.
    """

    dense: int = 4
    sparse: int = 6
    base_steps: int = 1500
    pool: int = 1024
    tries: tuple[int, int] = (16, 80)
    steps: int = 200
    fresh: int = 500
    budget: float = 10e6


SMOKE = Size(dense=2, sparse=3, base_steps=300, pool=32, tries=(8, 8), steps=4, fresh=8, budget=2e5)


def max_new_tokens(level: int) -> int:
    """Eight characters a step at most, the answer, the end, and some to spare."""
    return 8 * (level - 1) + 12


# ------------------------------------------------------------------------------------------------------ what is shared


def base_of(output: Path, size: Size, seed: int) -> Path:
    run_dir = output / f"base-{seed}"
    if not (run_dir / "model").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        changes = [f"output={run_dir}", f"seed={seed}", f"data.completions.seed={seed}"]
        changes += [f"training.max_steps={size.base_steps}", *QUIET]
        train(load_recipe(BASE_RECIPE, changes, CONFIGS))
    return run_dir / "model"


def traces_of(output: Path, size: Size, seed: int, level: int) -> tuple[Path, dict[str, Any]]:
    """The base's own verified answers, and what they cost."""
    folder = output / f"traces-{level}-{seed}"
    if not (folder / "bought.json").exists():
        settings = SampleSettings(
            model={"path": str(base_of(output, size, seed))},
            data={"prompts": pool(size, seed, level)},
            verifier=VERIFIER,
            verifier_pool={"workers": 0},
            rollouts={
                "samples_per_prompt": size.tries[level == size.sparse],
                "max_new_tokens": max_new_tokens(level),
                "max_batch": 1024,
            },
            seed=seed,
            threads=1,
        )
        bought = collect(settings, folder / "traces.jsonl", say=lambda _: None)
        found = {"flops": bought.flops, "traces": bought.traces, "correct": bought.correct}
        write_json_atomic(folder / "bought.json", found)
    return folder / "traces.jsonl", json.loads((folder / "bought.json").read_text(encoding="utf-8"))


def pool(size: Size, seed: int, level: int) -> dict[str, Any]:
    return {"task": "chain_sum", "levels": [level], "size": size.pool, "seed": seed}


def fresh(size: Size, level: int) -> dict[str, Any]:
    """Problems of the same level that nobody trained on."""
    return {"task": "chain_sum", "levels": [level], "size": size.fresh, "split": "test"}


def measured(model: Path, size: Size, level: int) -> dict[str, float]:
    """Greedy and sampled accuracy on fresh problems."""
    config = EvaluationConfig(
        benchmarks=[{"name": "fresh", "data": fresh(size, level), "verifier": VERIFIER}],
        samples=4,
        max_new_tokens=max_new_tokens(level),
        max_batch=1024,
    )
    report = evaluate_model(ModelConfig(path=str(model)), config, None)
    return {name: value.value for name, value in report.benchmarks[0].headline().items()}


def run(recipe: dict[str, Any], folder: Path) -> tuple[Path, float]:
    """Train from the beginning in a folder: the run folder, and its FLOPs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, "output": str(folder), "threads": 1}, sort_keys=False), encoding="utf-8")
    result = train(load_recipe(path, QUIET, CONFIGS))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return result.run_dir, max(row.get("flops_total", 0.0) for row in rows)


# ------------------------------------------------------------------------------------------------------------ offline

STEPS = {"delimiter": ";"}
OFFLINE: dict[str, dict[str, Any]] = {
    "sft": {"method": {"name": "sft"}, "rate": 3e-4},
    "dpo": {"method": {"name": "dpo", "beta": 0.5}, "rate": 1e-4},
    "oreo_token": {"method": {"name": "oreo", "beta": 0.1}, "rate": 3e-4, "critic": 1e-3},
    "oreo_step": {"method": {"name": "oreo", "level": "step", "beta": 0.1, **STEPS}, "rate": 3e-4, "critic": 1e-3},
    "oreo_response": {"method": {"name": "oreo", "level": "response", "beta": 0.1}, "rate": 3e-4, "critic": 1e-3},
    "dapo_step": {"method": {"name": "dapo_step", "beta": 0.2, **STEPS}, "rate": 3e-4},
}
"""Method, learning rate, and that of the critic."""


def offline_recipe(arm: str, output: Path, size: Size, seed: int, level: int, folder: Path) -> dict[str, Any]:
    """The recipe of an offline arm; makes pairs, or a critic apart, where the arm takes them."""
    traces, _ = traces_of(output, size, seed, level)
    given, rows = OFFLINE[arm], 64 if size.steps > 10 else 8
    data: dict[str, Any] = {"traces": {"path": str(traces), "keep": "correct" if arm == "sft" else "all"}}
    if arm == "dpo":
        pairs = traces.with_name("pairs.jsonl")
        if not pairs.exists():
            write_pairs([traces], pairs, PairSettings(strategy="margin", max_pairs=4, seed=seed))
        data = {"preferences": {"path": str(pairs), "chat": False}}
    recipe = {
        "model": {"path": str(base_of(output, size, seed))},
        "data": data,
        "method": given["method"],
        "batch": {"rows_per_step": rows, "micro_batch": rows},
        "training": {"learning_rate": given["rate"], "max_steps": size.steps},
        "seed": seed,
    }
    if "critic" in given:
        recipe["critic"] = {"learning_rate": given["critic"]}
    if arm == "dapo_step":
        critic = {**recipe, "method": {"name": "dapo_step", "phase": "critic", **STEPS}}
        critic["training"] = {"learning_rate": 1e-3, "max_steps": size.steps}
        made, _ = run(critic, folder.with_name(f"{folder.name}-critic"))
        recipe["critic"] = {"path": str(made / "critic")}
    return recipe


def offline_cell(arm: str, output: Path, size: Size, seed: int) -> dict[str, Any]:
    base = base_of(output, size, seed)
    if arm == "base":
        return {"level": size.dense, "flops": 0.0, **measured(base, size, size.dense)}
    folder = output / "offline" / arm / f"seed-{seed}"
    made, flops = run(offline_recipe(arm, output, size, seed, size.dense, folder), folder)
    _, bought = traces_of(output, size, seed, size.dense)
    return {"level": size.dense, "flops": flops, "traces": bought, **measured(made / "model", size, size.dense)}


# ------------------------------------------------------------------------------------------------------------- search


def search_cell(arm: str, output: Path, size: Size, seed: int) -> dict[str, Any]:
    """Accuracy and tokens drawn per problem: greedy; for each width, guided and best of n."""
    folder = output / "offline" / "oreo_step" / f"seed-{seed}"
    if not (folder / "critic").exists():
        run(offline_recipe("oreo_step", output, size, seed, size.dense, folder), folder)
    config = ModelConfig(path=str(folder / "model"))
    policy, tokenizer = load_policy(config, seed=seed)
    renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
    value = ValueSearchConfig(path=str(folder / "critic"), delimiter=";")
    engine = search_engine(
        policy.requires_grad_(False), config, renderer, value, pad_id=tokenizer.pad_token_id, max_batch=1024
    )
    asked = problems(TaskSource(**fresh(size, size.dense)), "fresh")
    prompts, limit = [renderer.prompt_ids(problem) for problem in asked], max_new_tokens(size.dense)
    judge = build_judge([ProceduralVerifierConfig(type="procedural")], VerifierPoolConfig(workers=0))
    found: dict[str, Any] = {}

    def note(name: str, answers: list[Completion], drawn: int) -> None:
        found[name] = {"accuracy": accuracy(judge, renderer, asked, answers), "tokens": drawn / len(asked)}

    greedy = [group[0] for group in engine.generate(prompts, Sampling(max_new_tokens=limit, greedy=True))]
    note("greedy", greedy, sum(len(one.ids) for one in greedy))
    for width in WIDTHS:
        before = engine.tokens_drawn
        guided = [g[0] for g in engine.generate(prompts, Sampling(max_new_tokens=limit, beams=width, seed=seed))]
        drawn = engine.tokens_drawn - before
        note(f"guided@{width}", guided, drawn)
        n = -(-drawn // max(sum(len(one.ids) for one in greedy), 1))
        sampled = engine.generate(prompts, Sampling(n=n, max_new_tokens=limit, seed=seed))
        note(f"best_of_n@{width}", best_of(engine, prompts, sampled), sum(len(c.ids) for g in sampled for c in g))
        found[f"best_of_n@{width}"]["n"] = n
    judge.close()
    return found


def best_of(engine: GuidedEngine, prompts: list[list[int]], groups: list[list[Completion]]) -> list[Completion]:
    """The completion of each group that the value model likes best, valued before its end token."""
    chosen = []
    for prompt, group in zip(prompts, groups, strict=True):
        texts = [[*prompt, *(one.ids[:-1] if one.finish == "stop" else one.ids)] for one in group]
        values = engine.value(texts)
        chosen.append(group[max(range(len(group)), key=lambda i: (group[i].finish == "stop", values[i]))])
    return chosen


def accuracy(judge: Judge, renderer: Renderer, asked: list[Problem], answers: list[Completion]) -> float:
    texts = [renderer.text(one.ids) for one in answers]
    judgements = judge.judge(asked, texts, [len(one.ids) for one in answers])
    return statistics.mean(float(one.outcome or 0.0) for one in judgements)


# ------------------------------------------------------------------------------------------------------------- resets

KL = {"kl_coef": 0.01, "updates_per_rollout": 2}
RESETS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "beta": 0.01, "updates_per_rollout": 2},
    "ppo": {"name": "ppo", **KL},
    "drpo_half": {"name": "drpo", "reset_share": 0.5, **KL},
    "drpo_all": {"name": "drpo", "reset_share": 1.0, **KL},
    "drpo_group": {"name": "drpo", "reset_share": 0.5, "optimizer": "group", **KL},
}


def resets_cell(arm: str, output: Path, size: Size, seed: int) -> dict[str, Any]:
    base, folder = base_of(output, size, seed), output / "resets" / arm / f"seed-{seed}"
    if arm == "base":
        return {"level": size.sparse, "flops": 0.0, **measured(base, size, size.sparse)}
    traces, bought = traces_of(output, size, seed, size.sparse)
    uses_traces = arm.startswith("drpo") or arm == "dpo"
    spent = bought["flops"] if uses_traces else 0.0
    common = {"level": size.sparse, "correct_traces": bought["correct"], "sampling_flops": spent}
    if uses_traces and not bought["correct"]:
        return {**common, "flops": spent, "trained": False, **measured(base, size, size.sparse)}
    if arm == "dpo":
        made, flops = run(offline_recipe("dpo", output, size, seed, size.sparse, folder), folder)
        return {**common, "flops": spent + flops, "trained": True, **measured(made / "model", size, size.sparse)}
    prompts = 16 if size.steps > 10 else 4
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"prompts": pool(size, seed, size.sparse)},
        "verifier": VERIFIER,
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": 8, "max_new_tokens": max_new_tokens(size.sparse)},
        "method": RESETS[arm],
        "batch": {"prompts_per_step": prompts, "micro_batch": prompts * 8},
        "training": {"learning_rate": 3e-4, "max_steps": 4},
        "seed": seed,
    }
    if uses_traces:
        recipe["data"]["traces"] = {"path": str(traces)}
    if arm != "grpo" and arm != "drpo_group":
        recipe["critic"] = {"learning_rate": 1e-3}
    _, probed = run(recipe, folder.with_name(f"{folder.name}-probe"))  # not charged
    policy, _ = load_policy(ModelConfig(path=str(base)), seed=0)
    budget = size.budget * non_embedding_parameters(policy)
    steps = max(int((budget - spent) / (probed / 4)) // 2 * 2, 2)
    recipe["training"]["max_steps"] = steps
    made, flops = run(recipe, folder)
    found = {"flops": spent + flops, "steps": steps, "trained": True}
    return {**common, **found, **measured(made / "model", size, size.sparse)}


# --------------------------------------------------------------------------------------------------------------- cells

PARTS = {
    "offline": (offline_cell, ["base", *OFFLINE]),
    "search": (search_cell, ["oreo_step"]),
    "resets": (resets_cell, ["base", "dpo", *RESETS]),
}


def cell(part: str, arm: str, seed: int, output: Path, size: Size) -> None:
    """Make one cell, unless it is there."""
    path = output / part / f"{arm}-{seed}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    started = time.process_time()
    found = PARTS[part][0](arm, output, size, seed)
    seconds = time.process_time() - started
    write_json_atomic(path, {"part": part, "arm": arm, "seed": seed, "cpu_seconds": seconds} | found)


def cells_of(folder: Path, arm: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{arm}-[0-9]*.json"))]


def report(output: Path) -> str:
    """A table per part: mean over seeds, and every seed."""
    lines = []
    for part in ("offline", "resets"):
        lines += [f"## {part}", "", "| arm | seeds | greedy: mean | each | GFLOPs |", "| --- | --- | --- | --- | --- |"]
        for arm in PARTS[part][1]:
            cells = cells_of(output / part, arm)
            if cells:
                values = [one["greedy"] for one in cells]
                gflops = statistics.mean(one["flops"] for one in cells) / 1e9
                each = ", ".join(f"{value:.3f}" for value in values)
                lines.append(f"| {arm} | {len(cells)} | {statistics.mean(values):.3f} | {each} | {gflops:.0f} |")
        lines.append("")
    cells = cells_of(output / "search", "oreo_step")
    lines += ["## search", "", "| how | accuracy: mean | each | tokens per problem |", "| --- | --- | --- | --- |"]
    for name in [key for key in cells[0] if isinstance(cells[0][key], dict)] if cells else []:
        values, tokens = ([one[name][key] for one in cells] for key in ("accuracy", "tokens"))
        each = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {statistics.mean(values):.3f} | {each} | {statistics.mean(tokens):.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/critics"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--arms", nargs="+", help="of these parts; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--report", action="store_true", help="only the table, of the cells that are there")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    given = parser.parse_args()
    size = SMOKE if given.smoke else Size()
    if not given.report:
        for seed in given.seeds:  # shared by the cells, so made before they part
            base_of(given.output, size, seed)
            for part, level in (("offline", size.dense), ("resets", size.sparse)):
                if part in given.parts or (part == "offline" and "search" in given.parts):
                    traces_of(given.output, size, seed, level)
        cells = [(p, a, s) for s in given.seeds for p in given.parts for a in PARTS[p][1] if a in (given.arms or [a])]
        # The search reads what an offline cell leaves.
        for parts in (("offline", "resets"), ("search",)):
            chosen = [one for one in cells if one[0] in parts]
            context = multiprocessing.get_context("forkserver")
            with ProcessPoolExecutor(given.jobs, mp_context=context) as workers:
                for done in [workers.submit(cell, *one, given.output, size) for one in chosen]:
                    done.result()
    table = report(given.output)
    (given.output / "report.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
