"""The preference pipeline from base to comparison, shortened; and SRPO from pairs to measured revisions."""

import json
from pathlib import Path

from posttrain.config.schema import EvaluationConfig, ModelConfig
from posttrain.evaluation.report import Report
from posttrain.evaluation.runner import evaluate_model
from posttrain.pipeline.runner import run_pipeline
from posttrain.trainers.run import train

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "preference"
# A base of two steps is never right, so a shaping term is what makes rewards differ.
JUDGED = [{"type": "procedural"}, {"type": "format", "pattern": ".*[0-4].*", "weight": 0.5}]
SMALL = [
    "base.training.max_steps=2",
    "base.data.completions.size=64",
    "base.tracking.plots=false",
    "base_eval.limit=3",
    "base_eval.max_new_tokens=8",
    "traces.data.prompts.size=12",
    "traces.rollouts.samples_per_prompt=4",
    "traces.rollouts.max_new_tokens=8",
    f"traces.verifier={json.dumps(JUDGED)}",
    "pairs.unfinished=true",
    "dpo.training.max_steps=4",
    "dpo.batch.rows_per_step=4",
    "dpo.batch.micro_batch=4",
    "dpo.evaluation.every=2",
    "dpo.evaluation.limit=3",
    "dpo.evaluation.max_new_tokens=8",
    "dpo.evaluation.preferences.share=0.3",
    "dpo.evaluation.preferences.kl_prompts=2",
    "dpo.tracking.plots=false",
    "dpo_eval.limit=3",
    "dpo_eval.max_new_tokens=8",
]


def test_the_pipeline_runs_from_base_to_comparison(tmp_path, capsys):
    run_pipeline(RECIPES / "pipeline-tiny-chain_sum.yaml", [f"output={tmp_path / 'run'}", *SMALL])
    run = tmp_path / "run"
    table = json.loads((run / "result" / "table.json").read_text())
    assert {change["benchmark"] for change in table["changes"]} == {"chain-sum-3", "chain-sum-4"}
    held_out = [json.loads(path.read_text()) for path in sorted((run / "dpo" / "held_out").glob("*.json"))]
    assert [report["step"] for report in held_out] == [0, 2, 4]
    pairs = len((run / "pairs" / "pairs.jsonl").read_text().splitlines())
    kept = json.loads((run / "dpo" / "data.json").read_text())["kept"]
    assert 0 < held_out[0]["accuracy"]["pairs"] == pairs - kept
    assert "held-out pairs" in capsys.readouterr().out


def test_srpo_trains_and_its_revisions_are_measured(load, tmp_path):
    template = "{prompt}{answer};"
    revising = {"revisions": 2, "revision_template": template}
    section = {"benchmarks": ["chain-sum-3"], "limit": 4, "max_new_tokens": 8, **revising}
    changes = {"evaluation": {**section, "every": 3}}
    result = train(load({"name": "srpo", "beta": 0.05, "revision_template": template}, changes))
    during = Report.load(result.run_dir / "evaluation" / "step-000003.json").benchmarks[0]
    after = evaluate_model(ModelConfig(path=str(result.model_dir)), EvaluationConfig(**section), None).benchmarks[0]
    assert [name for name in after.metrics if name.startswith("revision")] == [f"revision@{i}" for i in range(3)]
    assert after.records == during.records and after.revised == during.revised
    assert after.revised.completions == 12
