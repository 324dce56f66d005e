"""What a batch of rollouts is charged: the prompt tokens that the engine computed, shared beginnings once."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.config.needs import Needs
from posttrain.data.sample import Problem
from posttrain.methods.base import Start
from posttrain.rollouts import shared_prompts
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.tracking.ledger import ComputeLedger, Size
from posttrain.trainers.rollout_step import RolloutStep
from posttrain.verifiers.verdict import Judgement, Status, Verdict

PROMPT, TRACE = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25]


class CutsOfOneTrace:
    """Starts the groups of a problem after 6, 2, 0 and 6 tokens of its trace."""

    needs = Needs(data=("prompts",))
    chooses_starts = True

    def __init__(self):
        self.cuts = iter([6, 2, 0, 6])

    def start(self, problem, prompt_ids, traces, draw):
        return Start(tuple(TRACE[: next(self.cuts)]))


class AllRight:
    def judge(self, problems, texts, lengths, ids):
        return [Judgement({"one": Verdict(Status.CORRECT, 1.0)}, 1.0, 1.0) for _ in problems]


@pytest.mark.parametrize(("pass_flops", "read"), [(0.0, 16 + 3), (1e30, 16 + 12 + 10 + 16)])
def test_prefixes_of_a_problem_are_charged_as_they_are_read(monkeypatch, pass_flops, read):
    monkeypatch.setattr(shared_prompts, "PASS_FLOPS", {"cpu": pass_flops, "cuda": pass_flops})
    torch.manual_seed(0)
    shape = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    ledger, figures = ComputeLedger({"policy": Size(10, 10)}), {}
    parts = SimpleNamespace(
        engine=TransformersEngine(model, stop_ids=[], pad_id=0, max_batch=64),
        judge=AllRight(),
        renderer=SimpleNamespace(text=lambda ids: " ".join(map(str, ids)), pixels=lambda rows: 0),
        ledger=ledger,
        method=CutsOfOneTrace(),
        traces=(),
        writer=None,
        recipe=SimpleNamespace(
            rollouts=SimpleNamespace(samples_per_prompt=2, max_new_tokens=3, temperature=1.0, top_p=1.0, top_k=None)
        ),
    )
    step = RolloutStep(parts, 0, lambda name, total, n: figures.setdefault(name, total))
    problem = Problem(id="a", prompt="?", reference="1")
    samples = step.sample(0, [(problem, PROMPT)] * 4, 0)
    assert [sample.prefix for sample in samples] == [6, 6, 2, 2, 0, 0, 6, 6]
    entry = ledger.step()
    assert entry["tokens_prompt"] == read and entry["tokens_sampled"] == 8 * 3
    assert entry["flops"] == 2 * 10 * (read + 24)
    assert set(figures) == {"rollout_seconds", "verify_seconds", "prefix_left_out_share"}
