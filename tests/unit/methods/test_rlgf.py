"""RLGF: masks and estimates by hand, what each variant reduces to, and the guide in a run."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import PartialState

from posttrain.config.schema import ModelConfig
from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Origin, Problem
from posttrain.errors import ModelError, StateError
from posttrain.methods.base import Start
from posttrain.methods.companions import ValueHeads, Writer
from posttrain.methods.rlgf import RLGF, RLGFConfig
from posttrain.models.collate import FURTHER
from posttrain.models.loading import load_policy
from posttrain.models.token_logps import token_values
from posttrain.objectives.batch import GUIDED, TokenBatch
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.trainers.critic import weigh
from posttrain.trainers.run import build, train
from posttrain.trainers.writer import WritingModel, handover


def t(values):
    return torch.tensor(values, dtype=torch.float64)


AGGREVATED = RLGF(RLGFConfig(variant="aggrevated", guide_model="g", kl_coef=0.0))
PPO_PP = RLGF(RLGFConfig(kl_coef=0.0))


def six(guided):
    """The sheet's sequence of six tokens, of which two are the roll-in."""
    return TokenBatch(
        mask=t([[1] * 6 if guided else [0, 0, 1, 1, 1, 1]]).bool(),
        further={GUIDED: t([guided]).bool()} if guided else {},
    )


def test_masks_as_in_the_sheet():
    assert PPO_PP.policy_mask(six(None)).tolist() == PPO_PP.value_mask(six(None)).tolist() == [[0, 0, 1, 1, 1, 1]]
    ended = six([0, 0, 1, 1, 1, 1])
    assert AGGREVATED.policy_mask(ended).tolist() == [[1, 1, 0, 0, 0, 0]]
    assert AGGREVATED.value_mask(ended).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert {k: float(v) for k, v in AGGREVATED.counts(ended).items()} == {"policy": 2, "value": 4}


def test_rows_of_both_kinds_in_one_batch_each_have_their_own_masks():
    batch = TokenBatch(
        mask=t([[1, 1, 1], [1, 1, 1], [0, 0, 0]]).bool(), further={GUIDED: t([[0, 1, 1], [0, 0, 0], [0, 1, 1]]).bool()}
    )
    assert AGGREVATED.policy_mask(batch).tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert AGGREVATED.value_mask(batch).tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_the_phases_of_d2lols_as_in_the_sheet():
    method = RLGF(RLGFConfig(variant="d2lols", tau=3, guide_model="g", epochs=2))
    phases = []
    for step in range(10):
        method.begin_step(step)
        phases.append(method.guide_ends)
    assert phases[::2] == phases[1::2] == [True, True, True, False, False]


def phases(seed=0, steps=40, updates=2, **given):
    method = RLGF(RLGFConfig(guide_model="g", epochs=updates, **given))
    method.bind(None, seed)
    found = []
    for step in range(steps):
        method.begin_step(step)
        found.append(method.guide_ends)
    return found


def test_lols_draws_the_kind_of_each_rollout_from_seed_and_rollout_alone():
    drawn = phases(variant="lols", seed=5, steps=800)
    kinds = drawn[::2]
    assert drawn[1::2] == kinds  # all updates on a rollout
    assert phases(variant="lols", seed=5, steps=400, updates=1) == kinds
    assert phases(variant="lols", seed=6, steps=400, updates=1) != kinds
    assert kinds == [np.random.default_rng([5, rollout, 7]).random() >= 0.8 for rollout in range(400)]
    assert abs(sum(kinds) / 400 - 0.2) < 0.05
    later = RLGF(RLGFConfig(variant="lols", guide_model="g", epochs=2))
    later.bind(None, 5)
    later.begin_step(2 * kinds.index(True, 100))  # as after a resume: no step before it
    assert later.guide_ends
    assert not any(phases(variant="lols", ppo_pp_share=1.0)) and all(phases(variant="lols", ppo_pp_share=0.0))


def test_rows_that_the_guide_ended_have_the_guides_head():
    both = RLGF(RLGFConfig(variant="lols", guide_model="g"))
    batch = TokenBatch(
        mask=t([[1, 1, 1], [1, 1, 1], [0, 0, 0]]).bool(), further={GUIDED: t([[0, 1, 1], [0, 0, 0], [0, 1, 1]]).bool()}
    )
    assert both.value_head(batch).tolist() == [1, 0, 1]
    assert both.value_head(six(None)).tolist() == [0]
    heads = {"ppo_pp": 1, "aggrevated": 1, "lols": 2, "d2lols": 2}
    tau = {"d2lols": {"tau": 1}}
    for variant, number in heads.items():
        config = RLGFConfig(variant=variant, guide_model="g", **tau.get(variant, {}))
        several = RLGF(config).needs.companion(ValueHeads)
        assert (1 if several is None else several.number) == number


R, V = [[0.0, 0.0, 0.0, 1.0]], t([[0.1, 0.2, 0.4, 0.6]])
ADVANTAGES = [0.7867028506, 0.7322731, 0.5702, 0.4]


@pytest.mark.parametrize("guided", [None, [0, 0, 1, 1]])
def test_estimates_run_through_the_whole_completion_as_in_the_sheet(guided):
    batch = TokenBatch(
        mask=t([[1] * 4]).bool(),
        old_values=V,
        advantages=t([1.0]),
        further={} if guided is None else {GUIDED: t([guided])},
    )
    found = AGGREVATED.estimate(batch, AGGREVATED.token_rewards(batch))
    assert found.advantages[0].tolist() == pytest.approx(ADVANTAGES, abs=1e-9)
    torch.testing.assert_close(found.returns, found.advantages + V)


def test_a_deviation_of_one_step_is_the_guides_return_less_its_value():
    """The sheet's guide returns 0.9 and 0.3 with V_g = 0.5: advantages 0.4 and -0.2."""
    method = RLGF(RLGFConfig(variant="aggrevated", guide_model="g", kl_coef=0.0, gamma=1.0, lam=1.0))
    batch = TokenBatch(
        mask=t([[1, 1, 1]] * 2).bool(),
        old_values=t([[0.5, 0.8, 0.1]] * 2),
        advantages=t([0.9, 0.3]),
        further={GUIDED: t([[0, 1, 1]] * 2).bool()},
    )
    assert method.estimate(batch, method.token_rewards(batch)).advantages[:, 0].tolist() == pytest.approx([0.4, -0.2])


def test_only_the_policys_tokens_pay_for_the_kl():
    method = RLGF(RLGFConfig(variant="aggrevated", guide_model="g", kl_coef=0.1))
    logps = {"old_logps": t([[-1.0, -2.0, -3.0]]), "ref_logps": t([[-1.5, -1.0, -1.0]])}
    batch = TokenBatch(mask=t([[1, 1, 1]]).bool(), advantages=t([1.0]), old_values=t([[0.0] * 3]), **logps)
    guided = dataclasses.replace(batch, further={GUIDED: t([[0, 0, 1]]).bool()})
    assert method.token_rewards(guided)[0].tolist() == pytest.approx([-0.05, 0.1, 1.0])
    assert float(method.estimate(guided, method.token_rewards(guided)).kl) == pytest.approx(-0.5)
    assert method.token_rewards(batch)[0].tolist() == pytest.approx([-0.05, 0.1, 1.2])


def test_losses_and_gradients_of_a_guided_row_by_hand():
    logps = t([[-1.0, -0.7, -0.2, -0.4]]).requires_grad_()
    values = t([[0.1, 0.2, 0.3, 0.4]]).requires_grad_()
    batch = TokenBatch(
        mask=t([[1, 1, 1, 1]]).bool(),
        logps=logps,
        old_logps=t([[-1.1, -0.7, -5.0, -5.0]]),
        advantages=t([[0.5, -2.0, 9.0, 9.0]]),
        values=values,
        old_values=values.detach(),
        returns=t([[7.0, 7.0, 0.5, 1.0]]),
        further={GUIDED: t([[0, 0, 1, 1]]).bool()},
    )
    terms = AGGREVATED.loss(batch)
    ratio = float(np.exp(0.1))
    assert float(terms["policy"].value.detach()) == pytest.approx(-0.5 * ratio + 2.0)
    assert float(terms["policy"].count) == 2
    assert float(terms["value"].value.detach()) == pytest.approx(0.5 * 0.5 * (0.2**2 + 0.6**2))
    assert float(terms["value"].count) == 2
    total = sum(term.value for term in terms.values())
    of_logps, of_values = torch.autograd.grad(total, [logps, values])
    assert of_logps[0].tolist() == pytest.approx([-0.5 * ratio, 2.0, 0.0, 0.0])
    assert of_values[0].tolist() == pytest.approx([0.0, 0.0, 0.5 * -0.2, 0.5 * -0.6])


def test_the_likelihood_term_as_in_the_sheet():
    method = RLGF(RLGFConfig(expert_rows_per_step=1, kl_coef=0.0))
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    batch = TokenBatch(
        mask=t([[0, 1, 1], [0, 1, 1]]).bool(),
        logps=torch.cat([zeros[:1], t([[0.0, np.log(0.5), np.log(0.25)]])]),
        old_logps=zeros,
        old_values=zeros,
        values=zeros,
        returns=zeros,
        advantages=zeros,
        expert=torch.tensor([False, True]),
    )
    found = method.loss(batch)["expert"]
    assert float(found.value / found.count) == pytest.approx(0.1039720771, abs=1e-10)
    assert float(method.counts(batch)["expert"]) == 2


def test_whitening_is_over_the_policys_tokens():
    method = RLGF(RLGFConfig(variant="aggrevated", guide_model="g", kl_coef=0.0, whiten_advantages=True))
    generator = torch.Generator().manual_seed(0)
    guided = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    part = {
        "mask": torch.ones(2, 4, dtype=torch.bool),
        FURTHER + GUIDED: guided,
        "old_values": torch.rand(2, 4, generator=generator),
        "advantages": torch.rand(2, generator=generator),
    }
    weigh(method, [part], lambda *_: None, main=True)
    acted = part["advantages"][guided == 0].double()
    assert float(acted.mean()) == pytest.approx(0, abs=1e-6)
    assert float(acted.var(unbiased=False)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"variant": "aggrevated"}, "is a model: set guide_model"),
        ({"guide_top_p": 0.9}, "no effect without guide_model"),
        ({"variant": "d2lols", "guide_model": "g"}, "tau is for d2lols, which needs it"),
        ({"tau": 5}, "tau is for d2lols"),
        ({"variant": "lols"}, "is a model: set guide_model"),
        ({"variant": "lols", "guide_model": "g", "tau": 5}, "tau is for d2lols"),
        ({"ppo_pp_share": 0.8}, "ppo_pp_share is for lols"),
        ({"variant": "lols", "guide_model": "g", "ppo_pp_share": 1.1}, "less than or equal to 1"),
        ({"nll_coef": 0.2}, "no effect without expert_rows_per_step"),
        ({"kl_in": "loss"}, "leave out kl_in"),
    ],
)
def test_parameters_without_effect_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RLGFConfig(**given)


# ------------------------------------------------------------------------------------------------ starts and handovers

PROBLEM = Problem("p", "1+2=")
TRACE = KnownTrace(PROBLEM, [5, 6], [7, 8, 9, 10, 2], [1] * 5)


def test_where_rollouts_start():
    draws = [np.random.default_rng([0, n]) for n in range(2000)]
    rolled_in = [RLGF(RLGFConfig(rollin_share=0.6)).start(PROBLEM, [5, 6], [TRACE], draw) for draw in draws]
    lengths = Counter(len(start.prefix) for start in rolled_in)
    assert set(lengths) == {0, 1, 2, 3, 4} and abs(lengths[0] / 2000 - 0.4) < 0.04
    start = AGGREVATED.start(PROBLEM, [5, 6], [TRACE], draws[0])
    assert start == Start(origin=Origin.GUIDED, handover=0.8)
    assert AGGREVATED.needs.companions == (Writer("g", 0.92),) and PPO_PP.needs.companions == ()


def test_how_much_of_a_completion_stays():
    draw = np.random.default_rng(0)
    found = Counter(handover(5, 0.75, draw) for _ in range(4000))
    assert set(found) == {0, 1, 2, 3, 4}
    assert all(abs(found[k] / 4000 - (0.25 if k == 0 else 0.75 / 4)) < 0.03 for k in found)
    assert {handover(1, 1.0, draw) for _ in range(20)} == {0}
    assert {handover(2, 1.0, draw) for _ in range(20)} == {1}


PROBLEMS = [Problem(str(i), "", "", {}) for i in range(2)]


class Echo:
    """An engine that writes 40, 41, ... up to each prompt's limit and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling, limits=None):
        self.asked.append((prompts, sampling, limits))
        limits = limits or [sampling.max_new_tokens] * len(prompts)
        rows = [[*range(40, 40 + limit)] for limit in limits]
        return [[Completion(ids, [-9.0] * len(ids), "length", 0)] for ids in rows]

    def read_tokens(self, prompts, sampling):
        return sum(map(len, prompts))


def test_the_guide_ends_what_the_policy_began():
    guide = WritingModel(Echo(), Writer("g", 0.9), seed=3)
    sampling = Sampling(n=2, max_new_tokens=4, seed=1, first_prompt=10, top_k=7)
    begun = [[Completion([7, 8, 9], [-1.0, -2.0, -3.0], "stop", 5), Completion([7, 2], [-1.0, -0.5], "stop", 5)]] * 2
    starts = [Start(), Start(handover=1.0)]
    ended, spent = guide.end(6, PROBLEMS, starts, [[1], [1, 2]], begun, sampling, [4, 4])
    assert [(e.completion, e.guided) for e in ended[0]] == [(completion, 0) for completion in begun[0]]
    for own, found in zip(begun[1], ended[1], strict=True):
        kept = 4 - found.guided  # the length limit is that of the whole
        assert 1 <= kept < len(own.ids)
        assert found.completion.ids == own.ids[:kept] + [*range(40, 44 - kept)]
        assert found.completion.logps == own.logps[:kept] + [-9.0] * found.guided
        assert found.completion.finish == "length" and found.completion.policy_version == 5
    ((prompts, used, limits),) = guide.engine.asked
    assert used.prompt_numbers == (22, 23) and (used.top_p, used.top_k, used.n) == (0.9, None, 1)
    assert used.seed != sampling.seed and limits == [e.guided for e in ended[1]]
    assert (spent.read, spent.sampled) == (sum(map(len, prompts)), sum(limits))
    again, _ = WritingModel(Echo(), Writer("g", 0.9), seed=3).end(
        6, PROBLEMS, starts, [[1], [1, 2]], begun, sampling, [4, 4]
    )
    assert again == ended
    other, nothing = guide.end(6, PROBLEMS, [Start()] * 2, [[1], [1, 2]], begun, sampling, [4, 4])
    assert all(each.guided == 0 for group in other for each in group) and nothing.read == 0
    shorter, _ = WritingModel(Echo(), Writer("g", 0.9), seed=3).end(
        6, PROBLEMS, starts, [[1], [1, 2]], begun, sampling, [4, 3]
    )
    assert [e.guided + 1 for e in shorter[1]] == [e.guided for e in ended[1]]  # cut where this prompt's limit is
    assert [len(e.completion.ids) for e in shorter[1]] == [3, 3]


# -------------------------------------------------------------------------------------------------------------- runs

PLAIN = {"epochs": 2, "kl_coef": 0.1, "gamma": 1.0, "vf_coef": 0.1, "whiten_advantages": True}


def run(load, folder, changes=None, **method):
    recipe = load({"name": "rlgf", "epochs": 2, **method}, {"output": str(folder), **(changes or {})})
    return train(recipe)


def test_without_roll_ins_it_is_ppo_bit_for_bit_whoever_the_guide_is(load, tmp_path, same):
    ppo = train(load({"name": "ppo", **PLAIN}, {"output": str(tmp_path / "ppo")}))
    for name, guide in (("traces", {}), ("model", {"guide_model": "GUIDE"})):
        found = run(load, tmp_path / name, rollin_share=0.0, **PLAIN, **guide)
        assert same(ppo.model_dir, found.model_dir) and same(ppo.run_dir / "critic", found.run_dir / "critic")
    assert not same(ppo.model_dir, run(load, tmp_path / "in", **PLAIN).model_dir)


def test_d2lols_is_its_two_phases_bit_for_bit(load, tmp_path, weights, same, metrics):
    guide = {"guide_model": "GUIDE"}
    ppo_pp, ended = run(load, tmp_path / "in", **guide), run(load, tmp_path / "out", variant="aggrevated", **guide)
    never = run(load, tmp_path / "never", variant="d2lols", tau=0, **guide)
    always = run(load, tmp_path / "always", variant="d2lols", tau=9, **guide)
    assert same(never.model_dir, ppo_pp.model_dir) and same(always.model_dir, ended.model_dir)
    assert not same(never.model_dir, always.model_dir)
    for name, share, other in (("all", 1.0, ppo_pp), ("none", 0.0, ended)):
        lols = run(load, tmp_path / name, variant="lols", ppo_pp_share=share, **guide)
        assert same(lols.model_dir, other.model_dir)
        used, whole = (0 if share else 1), weights(lols.run_dir / "critic")
        one = weights(other.run_dir / "critic")
        assert torch.equal(whole["score.weight"][used], one["score.weight"][0]) and bool(one["score.weight"].any())
        assert not whole["score.weight"][1 - used].any()  # never in a loss: where it began
        assert all(torch.equal(whole[key], one[key]) for key in one if key != "score.weight")
    assert "reward/guided" in metrics(always.run_dir)[0] and "reward/reset" in metrics(never.run_dir)[0]


def test_the_engines_rounding_is_measured_on_the_policys_tokens(load):
    """The guide's tokens have its own log-probs, far from the policy's, and count neither in the mean nor as capped."""
    method = {"name": "rlgf", "variant": "aggrevated", "guide_model": "GUIDE", "rollin_share": 0.75}
    recipe = load(method, {"rollouts.samples_per_prompt": 4})
    shell = build(recipe, RLGF(recipe.method), PartialState(cpu=True)).shell
    shell.rollouts = shell.rollouts.model_copy(update={"importance_cap": 1.5})
    try:
        (tensors,) = shell.step_batches(0)
        acted = tensors["mask"] & ~tensors[FURTHER + GUIDED]
        expected = torch.ones(tensors["mask"].shape)
        expected[acted] = 1.25
        expected[(acted.cumsum(1) == 1) & acted] = 1.5  # the first of each row: 2, and capped
        shift = torch.where(expected == 1.5, torch.tensor(2.0), expected).log()
        tensors["behaviour_logps"] = torch.where(acted, tensors["old_logps"] - shift, tensors["behaviour_logps"])
        advantages = tensors["advantages"].clone()
        batch = shell.method_batch(tensors, shell.model)
        found = shell.means.result()
        rows = int(acted.any(1).sum())
        assert found["engine_weight_mean"] == pytest.approx(float(expected[acted].mean()), abs=1e-5)
        assert found["engine_weight_capped_share"] == pytest.approx(rows / int(acted.sum()))
        torch.testing.assert_close(batch.advantages, advantages * expected)
    finally:
        shell.parts.tracker.close(plots=False)
        shell.parts.judge.close()


def test_a_batch_of_guided_rollouts(load):
    """Who wrote what: the policy's part is the policy's, the rest the guide's, and both are judged together."""
    method = {"name": "rlgf", "variant": "aggrevated", "guide_model": "GUIDE", "rollin_share": 0.75}
    recipe = load(method, {"rollouts.samples_per_prompt": 4})
    shell = build(recipe, RLGF(recipe.method), PartialState(cpu=True)).shell
    try:
        (tensors,) = shell.step_batches(0)
        ((rows),) = shell.step_samples
        assert {row.origin for row in rows} == {Origin.GUIDED}
        kept = [sum(row.loss_mask) - row.guided for row in rows]
        assert min(kept) == 0 < max(kept) and min(row.guided for row in rows) >= 1
        assert max(sum(row.loss_mask) for row in rows) <= recipe.rollouts.max_new_tokens
        assert tensors[FURTHER + GUIDED].sum(1).tolist() == [row.guided for row in rows]
        difference = (tensors["old_logps"] - tensors["behaviour_logps"]).abs() * tensors["mask"]
        assert float((difference * ~tensors[FURTHER + GUIDED]).max()) < 1e-5  # the policy wrote these
        assert float((difference * tensors[FURTHER + GUIDED]).max()) > 0.1  # and not those
        answers = [shell.parts.renderer.text(row.ids[row.loss_mask.index(1) :]) for row in rows]
        verdicts = shell.parts.judge.judge(
            [shell.problems[row.problem_id] for row in rows], answers, [sum(row.loss_mask) for row in rows]
        )
        assert [verdict.reward for verdict in verdicts] == [row.reward for row in rows]
    finally:
        shell.parts.tracker.close(plots=False)
        shell.parts.judge.close()


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_each_kind_of_rollout_reads_and_regresses_its_own_head(trunk, load):
    """Through the shell: the values behind the advantages and those in the loss are of one head, the other is still."""
    method = {"name": "rlgf", "variant": "d2lols", "tau": 1, "guide_model": "GUIDE", "epochs": 1}
    recipe = load(method, {"critic.trunk": trunk})
    shell = build(recipe, RLGF(recipe.method), PartialState(cpu=True)).shell
    try:
        head = shell.model.critic.head
        with torch.no_grad():
            head.weight.normal_(generator=torch.Generator().manual_seed(0))
        for step, used in enumerate((1, 0)):
            batches, counts = shell.step_batches(step), {}
            assert bool(FURTHER + GUIDED in batches[0]) == (used == 1)
            counts = shell.global_counts(batches, torch.device("cpu"))
            shell.model.zero_grad()
            for inputs in batches:
                rows = inputs["ids"], inputs["attention_mask"], inputs["mask"]
                every = token_values(shell.model, *rows).detach()
                torch.testing.assert_close(inputs["old_values"], every[used])
                assert float((every[0] - every[1]).abs().max()) > 0.1
                torch.testing.assert_close(shell.method_batch(inputs, shell.model).values.detach(), every[used])
                sum(
                    part.value / counts[term]
                    for term, part in shell.method.loss(shell.method_batch(inputs, shell.model)).items()
                ).backward()
            assert head.weight.grad[used].abs().max() > 0 and (head.weight.grad[1 - used] == 0).all()
    finally:
        shell.parts.tracker.close(plots=False)
        shell.parts.judge.close()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, {"variant": "d2lols", "tau": 2}),
        ({"rollouts.delay": 1}, {"variant": "d2lols", "tau": 2}),
        ({}, {"variant": "lols", "ppo_pp_share": 0.5}),
    ],
    ids=["fresh", "delay", "lols"],
)
def test_a_checkpoint_within_a_guided_rollout_resumes_bit_for_bit(changes, kind, load, tmp_path, same, metrics):
    method = {**kind, "guide_model": "GUIDE", "expert_rows_per_step": 4}
    more = {**changes, "training.save_steps": 3}
    whole = run(load, tmp_path / "whole", {**more, "training.max_steps": 7}, **method)
    run(load, tmp_path / "parts", {**more, "training.max_steps": 3}, **method)
    recipe = load(
        {"name": "rlgf", "epochs": 2, **method},
        {**more, "training.max_steps": 7, "output": str(tmp_path / "parts")},
    )
    resumed = train(recipe, resume="auto")
    assert same(whole.model_dir, resumed.model_dir) and same(whole.run_dir / "critic", resumed.run_dir / "critic")
    assert [row["loss"] for row in metrics(whole.run_dir)] == [row["loss"] for row in metrics(resumed.run_dir)]
    seen = {name for row in metrics(whole.run_dir) for name in row}
    assert {"reward/guided", "reward/reset"} <= seen  # both kinds of rollouts


def test_a_checkpoint_with_another_number_of_heads_is_refused(load, tmp_path):
    steps = {"training.save_steps": 2, "training.max_steps": 2, "output": str(tmp_path / "run")}
    guided = {"name": "rlgf", "guide_model": "GUIDE", "epochs": 2}
    train(load({**guided, "variant": "aggrevated"}, steps))
    later = load({**guided, "variant": "lols"}, {**steps, "training.max_steps": 4})
    with pytest.raises(StateError, match=r"content\.value_heads: \(none\) -> 2"):
        train(later, resume="auto", allow_changed=["method", "content"])


def test_a_guide_with_another_vocabulary_is_refused(load, tmp_path):
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "tokenizer": {"type": "characters", "alphabet": "01"}}
    for part in load_policy(ModelConfig(init=init), seed=0):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="the guide model has another vocabulary"):
        run(load, tmp_path / "run", {"method.guide_model": str(tmp_path / "other")}, guide_model="GUIDE")
