"""How many tokens may follow a prefix: the length limit, the model's positions, and prefixes that leave no room."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.config.needs import Needs
from posttrain.data.sample import Origin, Problem, Sample
from posttrain.errors import EngineError
from posttrain.methods.base import OnlineMethod, Scored, Start
from posttrain.methods.drpo import DRPO, DRPOConfig
from posttrain.methods.grpo import GRPO, GRPOConfig
from posttrain.rollouts.engine import Completion, Sampling, token_limits
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.state import rollouts
from posttrain.tracking.ledger import ComputeLedger, Size
from posttrain.trainers.rollout_step import RolloutStep
from posttrain.trainers.run import train
from posttrain.verifiers.verdict import Judgement, Status, Verdict

PROMPT = [5, 6, 7, 8]
PROBLEM = Problem(id="a", prompt="?", reference="1")


class Starts:
    """Gives these starts one after the other."""

    needs = Needs(data=("prompts",))
    chooses_starts = True

    def __init__(self, starts):
        self.starts = iter(starts)

    def start(self, problem, prompt_ids, traces, draw):
        return next(self.starts)


class Endless:
    """An engine that goes on to each prompt's limit, and never stops."""

    def __init__(self, positions):
        self.positions, self.asked = positions, []

    def generate(self, prompts, sampling, limits=None):
        self.asked.append(([list(prompt) for prompt in prompts], list(limits)))
        return [
            [Completion([30] * n, [-1.0] * n, "length", 0)] * sampling.n
            for n in token_limits(prompts, sampling, limits)
        ]

    def read_tokens(self, prompts, sampling):
        return 0


class AllRight:
    def judge(self, problems, texts, lengths, ids):
        return [Judgement({"one": Verdict(Status.CORRECT, 1.0)}, 1.0, 1.0) for _ in problems]


def step_of(engine, starts, max_new_tokens=10, n=2):
    figures = {}
    rollouts = SimpleNamespace(
        samples_per_prompt=n, max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, top_k=None
    )
    parts = SimpleNamespace(
        engine=engine,
        judge=AllRight(),
        renderer=SimpleNamespace(text=lambda ids: " ".join(map(str, ids)), pixels=lambda rows: 0),
        ledger=ComputeLedger({"policy": Size(10, 10)}),
        method=Starts(starts),
        traces=(),
        writer=None,
        recipe=SimpleNamespace(rollouts=rollouts),
    )
    return RolloutStep(parts, 0, lambda name, total, n: figures.setdefault(name, (total, n))), figures


def prefix(length, **more):
    return Start((20,) * length, Origin.RESET, {"length": float(length)}, **more)


def limits_of(starts, positions, max_new_tokens=10):
    """What the engine is asked for: (tokens of the context, limit) of each prompt."""
    engine = Endless(positions)
    step, _ = step_of(engine, starts, max_new_tokens)
    step.sample(0, [(PROBLEM, PROMPT)] * len(starts), 0)
    ((contexts, limits),) = engine.asked
    return [(len(context), limit) for context, limit in zip(contexts, limits, strict=True)]


def test_a_counted_prefix_takes_its_tokens_off_the_limit():
    starts = [Start(), prefix(3, counted=True), prefix(9, counted=True), prefix(3)]
    assert limits_of(starts, None) == [(4, 10), (7, 7), (13, 1), (7, 10)]


def test_contexts_end_with_the_positions():
    starts = [Start(), prefix(2), prefix(3), prefix(11), prefix(3, counted=True)]
    assert limits_of(starts, 16) == [(4, 10), (6, 10), (7, 9), (15, 1), (7, 7)]


def test_a_prefix_without_room_is_left_out_and_counted():
    starts = [prefix(10, counted=True), prefix(12), prefix(12, counted=True), prefix(1), Start()]
    engine = Endless(16)
    step, figures = step_of(engine, starts)
    samples = step.sample(0, [(PROBLEM, PROMPT)] * 5, 0)
    ((contexts, limits),) = engine.asked
    assert contexts == [PROMPT] * 3 + [[*PROMPT, 20], PROMPT] and limits == [10] * 5
    assert [s.origin for s in samples[::2]] == [Origin.POLICY] * 3 + [Origin.RESET, Origin.POLICY]
    assert [s.prefix for s in samples[::2]] == [0, 0, 0, 1, 0] and samples[0].info == {}
    assert figures["prefix_left_out_share"] == (3, 5)


def test_the_share_is_there_also_where_nothing_is_left_out_and_only_with_starts():
    step, figures = step_of(Endless(None), [Start()])
    step.sample(0, [(PROBLEM, PROMPT)], 0)
    assert figures["prefix_left_out_share"] == (0, 1)
    plain, figures = step_of(Endless(None), [Start()])
    plain.method.chooses_starts = False
    plain.sample(0, [(PROBLEM, PROMPT)], 0)
    assert "prefix_left_out_share" not in figures
    assert DRPO(DRPOConfig()).chooses_starts and not GRPO(GRPOConfig()).chooses_starts
    assert OnlineMethod.start is GRPO.start


@pytest.mark.parametrize("start", [Start(), prefix(2), prefix(2, counted=True)])
def test_a_prompt_that_has_no_room_itself_is_refused_whatever_its_start(start):
    torch.manual_seed(0)
    shape = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, max_position_embeddings=16))
    engine = TransformersEngine(model, stop_ids=[], pad_id=0, max_batch=8)
    step, _ = step_of(engine, [start], max_new_tokens=13)
    with pytest.raises(EngineError, match="exceeds the model's 16 positions"):
        step.sample(0, [(PROBLEM, PROMPT)], 0)
    fits, _ = step_of(engine, [start], max_new_tokens=12)
    assert all(len(sample.ids) == 16 or start.prefix for sample in fits.sample(0, [(PROBLEM, PROMPT)], 0))


def test_a_completion_cut_by_its_own_limit_is_not_finished_and_remembers_the_limit():
    step, _ = step_of(Endless(16), [prefix(4, counted=True), Start()])
    samples = step.sample(0, [(PROBLEM, PROMPT)] * 2, 0)
    assert [(s.finished, sum(s.loss_mask), s.limit) for s in samples[::2]] == [(False, 6, 6), (False, 10, 10)]
    assert [s.limit for s in rollouts.unpack(*rollouts.pack(samples))] == [s.limit for s in samples]
    tensors, rest = rollouts.pack([Sample([1], [1], Origin.POLICY, behaviour_logps=[0.0])])
    (older,) = rollouts.unpack(tensors, [{k: v for k, v in rest[0].items() if k != "limit"}])
    assert older.limit is None


def test_what_is_cut_early_is_punished_as_what_is_cut_at_the_full_limit():
    scored = Scored(
        rewards=torch.zeros(4, dtype=torch.float64),
        outcomes=torch.zeros(4),
        known=torch.ones(4, dtype=torch.bool),
        groups=torch.tensor([0, 0, 1, 1]),
        lengths=torch.tensor([20, 10, 12, 6]),
        finished=torch.tensor([False, True, False, True]),
        max_new_tokens=20,
        limits=torch.tensor([20, 20, 12, 12]),
    )
    method = GRPO(GRPOConfig(overlong_cache=4, scale_rewards="none"))
    assert method.advantages(scored).tolist() == [-0.5, 0.5, -0.5, 0.5]


def test_limits_that_cannot_be_are_refused():
    sampling = Sampling(max_new_tokens=4)
    assert token_limits([[1], [2]], sampling, None) == [4, 4] and token_limits([[1]], sampling, [2]) == [2]
    for prompts, limits, says in (
        ([[1]], [0], "a limit of 0 tokens"),
        ([[1]], [5], "a limit of 5 tokens is not in 1 .. 4"),
        ([[1], [2]], [4], "1 limits for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=says):
            token_limits(prompts, sampling, limits)
    with pytest.raises(ValueError, match="beam search"):
        token_limits([[1]], Sampling(max_new_tokens=4, beams=2), [2])


# -------------------------------------------------------------------------------------------------------------- runs

TIGHT = {
    "rollouts.max_new_tokens": 86,
    "rollouts.samples_per_prompt": 2,
    "batch.micro_batch": 8,
    "training.max_steps": 4,
}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "drpo", "epochs": 1},
        {"name": "rlgf", "variant": "ppo_pp", "rollin_share": 1.0, "epochs": 1},
        {"name": "prefixrl", "prefixed_share": 1.0, "cuts_per_problem": None},
    ],
    ids=lambda method: method["name"],
)
def test_prefixes_train_where_prompts_alone_just_fit(load, method):
    """96 positions, of which the longest prompt and the length limit leave hardly any to a prefix."""
    run = train(load(method, TIGHT)).run_dir
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 4 and all(row["prefix_length"] > 1 for row in rows)
    assert [row["prefix_left_out_share"] for row in rows] == [0.0] * 4


def test_resets_of_long_traces_train_with_a_short_limit(load):
    """Traces of up to 15 tokens and a limit of 4: some resets are left out, and no answer is longer than the limit."""
    run = train(load({"name": "drpo", "epochs": 1}, {"rollouts.max_new_tokens": 4})).run_dir
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 3 and all("prefix_left_out_share" in row for row in rows)
    assert 0 < sum(row["prefix_left_out_share"] for row in rows) < 3
    for line in (run / "samples.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert len(entry.get("prefix", "") + entry["completion"]) <= 4
