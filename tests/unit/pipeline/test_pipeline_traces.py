"""Train stages that read traces of earlier stages: checked before anything runs, in the key, and for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.errors import PosttrainError
from posttrain.pipeline.inputs import input_paths
from posttrain.pipeline.runner import check_stages
from posttrain.pipeline.schema import load_pipeline
from posttrain.pipeline.stages import STAGES, as_written

LOOP = """
- name: traces
  sample:
    model: &model {path: MODEL}
    data: &data {prompts: {task: chain_sum, levels: [3], size: 8}}
    verifier: &verifier [{type: numeric}]
    verifier_pool: {workers: 0}
    rollouts: &rollouts {samples_per_prompt: 64, max_new_tokens: 12}
- name: sft
  train:
    model: *model
    data: {traces: {path: "${traces.traces}"}}
    method: {name: sft}
    batch: {rows_per_step: 2, micro_batch: 2}
    training: {learning_rate: 1.0e-3, max_steps: 2}
- name: prefixrl
  train:
    model: {path: "${sft.model}"}
    data:
      <<: *data
      traces: {path: ["${traces.traces}"]}
    method: {name: prefixrl}
    verifier: *verifier
    verifier_pool: {workers: 0}
    rollouts: {samples_per_prompt: 2, max_new_tokens: 12}
    batch: {prompts_per_step: 4, micro_batch: 4}
    training: {learning_rate: 1.0e-3, max_steps: 2}
"""


@pytest.fixture
def stages(pipeline_file, tiny_model):
    def make(text: str):
        path = pipeline_file(text.replace("MODEL", str(tiny_model)))
        config, locations = load_pipeline(path, [], STAGES)
        built = {}
        for number, entry in enumerate(config.stages):
            folder = Path(config.output) / entry.name
            built[entry.name] = STAGES[entry.kind](entry, folder, path, number, locations)
        return built

    return make


def test_traces_are_among_what_a_train_stage_reads(stages):
    built = stages(LOOP)
    assert "${traces.traces}" in input_paths(built["sft"].resolved(as_written))
    assert "${traces.traces}" in input_paths(built["prefixrl"].resolved(as_written))
    check_stages(list(built.values()))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{path: "${traces.traces}"}', "{path: gone.jsonl}", "stage sft: gone.jsonl: no such trace file"),
        ('["${traces.traces}"]', "[gone.jsonl]", "stage prefixrl: gone.jsonl: no such trace file"),
        ('["${traces.traces}"]', '"${sft.model}"', "a traces is read here, not a model"),
        ("traces: {path: [", "traces: {task: chain_sum, levels: [99], size: 2}  # ", "no level 99"),
    ],
)
def test_mistakes_are_found_before_anything_runs(stages, old, new, message):
    assert old in LOOP
    with pytest.raises(PosttrainError) as caught:
        check_stages(list(stages(LOOP.replace(old, new)).values()))
    assert message in str(caught.value)


def test_sample_train_and_train_from_prefixes_for_real(stages, run):
    stages(LOOP)
    run(Path("pipeline.yaml"))
    rows = [json.loads(line) for line in Path("out/prefixrl/metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in rows) == 2
    assert run(Path("pipeline.yaml")).count("cached") == 3
