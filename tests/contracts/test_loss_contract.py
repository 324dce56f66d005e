"""The loss contract, swept over every registered method: sums with a unit, divided once by global counts.

A row of VARIANTS per set of parameters that changes the formula; every method must have one.
"""

import dataclasses
import math

import pytest
import torch

from posttrain.data.sample import Origin, Preference, Problem, Sample
from posttrain.methods import METHODS
from posttrain.methods.base import OnlineMethod, PreferenceMethod, Scored
from posttrain.objectives import policy_gradient
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.tracking.metrics import require

VARIANTS = {
    "sft": [{}, {"aggregation": "sequences"}],
    "grpo": [
        {},
        {"beta": 0.1},
        {"beta": 0.1, "kl_importance": False, "dual_clip": 3.0},
        {"scale_rewards": "none", "aggregation": "constant"},
        {"aggregation": "tokens", "epsilon_high": 0.28, "mask_truncated": True, "overlong_cache": 2},
        {"baseline": "leave_one_out", "scale_rewards": "none", "ratio": "trajectory"},
        {"ratio": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"surrogate": "cispo", "aggregation": "tokens"},
        {"updates_per_rollout": 2},
    ],
    "lite_ppo": [{}],
    "chord": [
        {},
        {"phi": "none", "mu_valley": 0.4, "dual_clip": None, "beta": 0.1},
        {"phi": "probability", "cutoff_prob": 0.3, "aggregation": "sequences"},
    ],
    "red": [{}, {"shift": "ratio"}, {"shift": "none", "alpha": 0.5}],
    "prefixrl": [{}, {"aggregation": "tokens", "adapt": "success"}],
    "rec": [
        {},
        {"weight": "importance", "clip": "two_side", "updates_per_rollout": 2},
        {"clip": "ring", "regularizer": "forward_kl"},
        {"clip": "sequence_one_side", "weight": "sequence_importance", "epsilon_low": 0.1, "epsilon_high": 0.1},
        {"clip": "none", "weight": "advantage", "regularizer": "k2", "scale_rewards": "group"},
        {"clip": "none", "drop": "balanced"},
    ],
    "opmd": [{}, {"divergence": "sequence", "baseline": "log_mean_exp"}, {"divergence": "none"}],
    "asymre": [{}],
    "rlsp": [{}, {"length_cost": 2.0, "alpha": 0.8, "filter": "outcome", "overlong_cache": 2}],
    "dpo": [
        {},
        {"loss": "conservative", "label_smoothing": 0.2},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "ipo", "per_token": True},
        {"loss": "hinge", "beta": 0.4},
        {"divergence": "forward_kl"},
        {"divergence": "js"},
        {"divergence": "alpha", "alpha": 0.3},
    ],
    "simpo": [{}, {"gamma": 1.0, "label_smoothing": 0.1, "sft_weight": 0.3}, {"loss": "hinge"}],
    "hypo": [{}, {"lam": 0.1, "baseline": "none", "k": 1}, {"lam": 0.0}],
    "curry_dpo": [{}, {"curriculum": "gap", "pairs": "all", "refresh_reference": False}],
    "asft": [{}, {"lam": 0.3, "b": 0.5}],
    "tpo": [{}, {"variant": "tpo_l", "gamma": 0.3}, {"alpha": 0.0}],
    "cpl": [{}, {"kl": True, "per_token": True}, {"bc_weight": 1.0, "lam": 1.0}, {"responses": 4, "per_token": True}],
    "srpo": [{}, {"beta": 0.1, "alpha": 0.3}],
    "brain": [{"n": 2}, {"n": 4, "tau": 0.5}, {"n": 3, "proposal_logps": "proposal"}],
    "a_lol": [
        {},
        {"variant": "seq", "epsilon": 0.3},
        {"variant": "ref_free"},
        {"variant": "kl", "beta": 0.1},
        {"variant": "r_lol"},
        {"variant": "w_bc"},
        {"variant": "r_gold"},
    ],
    "oreo": [
        {},
        {"level": "step", "beta": 0.5, "kl_reg": 0.0},
        {"level": "response", "beta": 0.5, "unbiased_kl": False},
        {"level": "step", "single_step_actor_loss": True},
    ],
    "dapo_step": [{}, {"beta": 0.5, "min_advantage": 0.3}, {"phase": "critic"}],
    "ppo": [
        {},
        {"kl_in": "loss", "value_clip": None, "whiten_advantages": False},
        {"kl_target": 1.0, "missing_eos_reward": -1.0, "updates_per_rollout": 1},
    ],
    "rto": [{"dpo_model": "dpo"}, {"dpo_model": "dpo", "dpo_reward_clip": None, "value_clip": None}],
    "drpo": [{}, {"optimizer": "group", "updates_per_rollout": 1}],
    "rlgf": [
        {},
        {"expert_rows_per_step": 3, "nll_coef": 0.5, "whiten_advantages": True},
        {"variant": "d2lols", "tau": 2, "guide_model": "guide"},
        {"variant": "lols", "ppo_pp_share": 0.5, "guide_model": "guide"},
    ],
    "nlpo": [{}, {"top_p": 1.0, "value_clip": 0.2}],
    "reward": [{}, {"center_rewards_coefficient": 0.01}, {"margin": "value"}],
}
CASES = [(name, parameters) for name, rows in VARIANTS.items() for parameters in rows]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in p.items()) or 'defaults'}" for name, p in CASES]

FIXED = ("old_logps", "ref_logps", "advantages", "old_values", "returns")
"""What a shell hands over as constants."""

ROWS, WIDTH, VOCABULARY = 8, 6, 5
LENGTHS = [4, 1, 0, 5, 3, 5, 2, 1]  # trained tokens per row; one row has none
EXPERTS = [1, 5, 6]  # rows that an expert wrote, for methods that take some


def test_every_method_is_swept():
    assert set(VARIANTS) == set(METHODS)


@pytest.fixture(params=CASES, ids=IDS)
def method(request):
    name, parameters = request.param
    return METHODS[name](METHODS[name].Config(**parameters))


def scored(n=ROWS):
    generator = torch.Generator().manual_seed(1)
    return Scored(
        rewards=torch.rand(n, generator=generator, dtype=torch.float64),
        outcomes=torch.randint(0, 2, (n,), generator=generator).double(),
        known=torch.tensor([True, True, True, False, True, True, True, True])[:n],
        groups=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])[:n],
        lengths=torch.tensor(LENGTHS)[:n],
        finished=torch.tensor([True, True, True, True, True, False, True, True])[:n],
        max_new_tokens=5,
        verdicts=("correct", "no_answer", "wrong", "timeout", "wrong", "no_answer", "correct", "wrong")[:n],
    )


class OneToken:
    """Stands in for a renderer where only the roles matter: the sweep makes its own tokens."""

    def sample(self, example):
        return Sample([0, 1], [0, 1], Origin.EXPERT, example.problem.id)

    conversation = sample


def preference_rows(method):
    """ROWS rows as the method prepares them, of scored responses with a few ties."""
    n = getattr(method.config, "n", 0) or getattr(method.config, "responses", 4)
    roles = ["chosen", "rejected", "gold", "fourth"][: max(n, 2)]
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number in range(ROWS):
        scores = torch.randint(1, 5, (len(roles),), generator=generator).double().tolist()
        scores[0] = scores[1] + number % 3 if len(roles) > 3 else scores[0]
        meta = {"value": 0.5, "proposal": [-2.0 - i for i in range(n)]}
        problem = Problem(f"pairs/{number}", "p", meta=meta, where=f"pairs.jsonl:{number + 1}")
        texts = {role: f"{role} {number}" for role in roles}
        others = {role: texts[role] for role in roles[2:]}
        rows.append(
            Preference(problem, texts["chosen"], texts["rejected"], others, dict(zip(roles, scores, strict=True)))
        )
    return method.prepare(rows)[:ROWS]


def roles_of(method):
    """Roles of a preference method, from the method itself."""
    return list(method.responses(preference_rows(method)[0], OneToken()))


def model_logits(method):
    """The 'parameters' of the sweep: logits per row and position; for preference methods also per role, and samples."""
    generator = torch.Generator().manual_seed(2)
    blocks = (len(roles_of(method)) + 1,) if isinstance(method, PreferenceMethod) else ()
    return torch.randn(*blocks, ROWS, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64)


def tokens_of(logits, generator, lengths=LENGTHS):
    """Random completions of these lengths under these logits, off-policy and with a reference."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=generator)
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, WIDTH - 5 : WIDTH - 5 + length] = True

    def noisy(logps, scale):
        return logps.detach() + scale * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)

    logps = logits.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    logps = torch.where(mask, logps, torch.zeros_like(logps))
    # What a classifier would say of the row: any number that depends on its own logits.
    scores = (logits[..., 0] * mask).sum(1)
    further = {"old_logps": noisy(logps, 0.3), "ref_logps": noisy(logps, 0.3), "max_length": 5, "scores": scores}
    # What a critic would say: likewise. Drawn last, so that the other numbers do not depend on it.
    noise = noisy(torch.zeros(ROWS, WIDTH, dtype=torch.float64), 0.5)
    values = torch.where(mask, logits[..., 1], torch.zeros_like(logps))
    further |= {"values": values, "old_values": values.detach() + 0.3 * noise, "returns": values.detach() + noise}
    # Of a reference that gives every token the same probability.
    kl = (logits.softmax(-1) * (logits.log_softmax(-1) + math.log(VOCABULARY))).sum(-1)
    further["full_kl"] = torch.where(mask, kl, torch.zeros_like(logps))
    further |= {"rewards": torch.arange(ROWS).double() % 3, "steps": (mask.cumsum(1) - 1).clamp(min=0).long() // 2}
    return TokenBatch(mask=mask, logps=logps, **further)


def batch_of(method, logits):
    """A batch as a shell would build it from these logits."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(method, PreferenceMethod):
        return preference_batch(method, logits, generator)
    batch = tokens_of(logits, generator)
    if not isinstance(method, OnlineMethod):
        return batch
    rows = scored()
    expert = torch.zeros(ROWS, dtype=torch.bool)
    expert[EXPERTS if method.expert_rows_per_step else []] = True
    mask = batch.mask & (method.keep(rows) | expert).unsqueeze(1)
    advantages = torch.where(expert, 0.3, method.advantages(rows))
    expert = expert if method.expert_rows_per_step else None
    return dataclasses.replace(batch, mask=mask, advantages=advantages, expert=expert)


def preference_batch(method, logits, generator):
    """Rows by role, the first two roles each with an empty completion, and samples where the method draws them."""
    rows = preference_rows(method)
    responses = {}
    for number, role in enumerate(roles_of(method)):
        lengths = [LENGTHS[(row - number) % ROWS] for row in range(ROWS)]
        lengths = lengths if number < 2 else [max(length, 1) for length in lengths]
        responses[role] = tokens_of(logits[number], generator, lengths)
    each_row = [method.values(row) for row in rows]
    values = {name: torch.tensor([row[name] for row in each_row], dtype=torch.float64) for name in each_row[0]}
    if not method.samples_per_prompt:
        return PreferenceBatch(responses, values)
    samples = tokens_of(logits[-1], generator)
    kept = samples.mask
    sums = [torch.where(kept, x.detach(), 0.0).sum(1) for x in (samples.logps, samples.ref_logps)]
    weights = method.online_weights(*sums, torch.arange(ROWS) // method.samples_per_prompt)
    return PreferenceBatch(responses, values, dataclasses.replace(samples, advantages=weights))


def each(batch, change):
    """The batch with `change` applied to all its tokens."""
    if isinstance(batch, TokenBatch):
        return change(batch)
    responses = {role: change(tokens) for role, tokens in batch.responses.items()}
    samples = None if batch.samples is None else change(batch.samples)
    return PreferenceBatch(responses, batch.values, samples)


def split(batch, rows):
    """Micro-batches of that many rows. Samples come with the pairs, or with an odd number of rows on their own."""
    slices = [slice(start, start + rows) for start in range(0, ROWS, rows)]
    if isinstance(batch, TokenBatch) or batch.samples is None:
        return [batch.rows(part) for part in slices]
    if rows % 2:
        pairs = [dataclasses.replace(batch.rows(part), samples=None) for part in slices]
        return pairs + [PreferenceBatch({}, {}, batch.samples.rows(part)) for part in slices]
    return [dataclasses.replace(batch.rows(part), samples=batch.samples.rows(part)) for part in slices]


def before_the_forward(batch):
    return each(batch, lambda tokens: dataclasses.replace(tokens, logps=None, scores=None))


def gradient(method, rows_per_micro_batch, transform=lambda tokens: tokens):
    """Gradient and value after the shell's arithmetic: sums over micro-batches, divided by global counts."""
    logits = model_logits(method).requires_grad_()
    parts = split(each(batch_of(method, logits), transform), rows_per_micro_batch)
    counts: dict[str, torch.Tensor] = {}
    for part in parts:
        for term, n in method.counts(before_the_forward(part)).items():
            counts[term] = counts.get(term, torch.zeros(())) + n
    total = 0.0
    for part in parts:
        sums = method.loss(part)
        assert set(sums) == set(counts)
        for term, loss_sum in sums.items():
            total = total + loss_sum.value / counts[term].clamp(min=1)
    (grad,) = torch.autograd.grad(total, logits)
    return grad, total.detach()


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2, 3, 4])
def test_any_split_gives_the_same_gradient(method, rows_per_micro_batch):
    whole, value = gradient(method, ROWS)
    split, split_value = gradient(method, rows_per_micro_batch)
    assert whole.abs().max() > 0
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(split_value, value, rtol=1e-12, atol=1e-14)


def test_counts_before_the_forward_are_those_of_the_loss(method):
    batch = batch_of(method, model_logits(method))
    counts = method.counts(before_the_forward(batch))
    for term, loss_sum in method.loss(batch).items():
        assert float(loss_sum.count) == float(counts[term]) > 0
        assert loss_sum.unit in ("tokens", "sequences", "pairs", "groups", "steps")
        if isinstance(batch, TokenBatch):
            mask = (batch.experts if term == "expert" else batch.rollouts).mask
            expected = mask.sum() if loss_sum.unit == "tokens" else (mask.sum(1) > 0).sum()
            if loss_sum.unit == "steps":
                expected = sum(len(set(s[m > 0].tolist())) for s, m in zip(batch.steps, mask, strict=True))
            assert float(loss_sum.count) == float(expected)


def test_a_row_with_an_empty_response_says_nothing(method):
    if not isinstance(method, PreferenceMethod):
        pytest.skip("no responses that are compared")
    logits = model_logits(method).requires_grad_()
    batch = batch_of(method, logits)
    empty = [2, 3] if len(batch.responses) > 1 else [2]
    assert torch.nonzero(~batch.usable).flatten().tolist() == empty
    whole, kept = method.loss(batch), method.loss(batch.rows(batch.usable))
    for term in whole:
        assert float(whole[term].count) == float(kept[term].count)
        assert torch.equal(whole[term].value, kept[term].value)
    (grad,) = torch.autograd.grad(sum(part.value for part in whole.values()), logits)
    assert grad[:-1, empty].abs().max() == 0  # the last block holds the samples
    row_terms = [part for part in whole.values() if part.unit == "groups" or part.unit == "pairs"]
    for part in row_terms if getattr(method.config, "responses", 2) == 2 else []:
        assert float(part.count) == ROWS - len(empty)


def shifted(tokens, shifts):
    """The tokens with log-probs of sampling policy and reference moved by `shifts`, the latter the other way."""
    moved = {"old_logps": tokens.old_logps - shifts, "ref_logps": tokens.ref_logps + shifts}
    return dataclasses.replace(tokens, **moved)


def single(tokens):
    """In float32, as runs have it."""
    found = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    doubles = {k: v.float() for k, v in found.items() if isinstance(v, torch.Tensor) and v.dtype == torch.float64}
    return dataclasses.replace(tokens, **doubles)


@pytest.mark.parametrize("shift", [25.0, -25.0, 100.0, -100.0, 3000.0, -3000.0])
def test_log_ratios_of_any_size_give_finite_gradients(method, shift):
    shifts = torch.tensor([shift, 0.0, shift, -shift, 0.0, shift], dtype=torch.float64)
    grad, value = gradient(method, ROWS, lambda tokens: single(shifted(tokens, shifts)))
    assert value.isfinite() and grad.isfinite().all()


def test_within_the_bound_log_ratios_are_the_formulas(method, monkeypatch):
    shifts = torch.tensor([0.0, 18.0, 0.0, 0.0, -18.0, 0.0], dtype=torch.float64)
    bounded = gradient(method, ROWS, lambda tokens: shifted(tokens, shifts))
    monkeypatch.setattr(policy_gradient, "MAX_LOG_RATIO", math.inf)
    unbounded = gradient(method, ROWS, lambda tokens: shifted(tokens, shifts))
    torch.testing.assert_close(bounded, unbounded, rtol=0, atol=0)


def test_tokens_beyond_the_bound_are_counted(method):
    shifts = torch.tensor([0.0, 30.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    batch = each(batch_of(method, model_logits(method)), lambda tokens: shifted(tokens, shifts))
    seen = {k: v for part in method.loss(batch).values() for k, v in part.diagnostics.items()}
    if isinstance(batch, PreferenceBatch) or "ratio_clamped_share" not in seen:
        # What takes no ratio of tokens has nothing to count, and gives the same with and without a bound.
        assert not {"ratio_mean", "clip_share_high"} & set(seen)
        return
    total, n = seen["ratio_clamped_share"]
    mask = batch.rollouts.mask
    level = getattr(method.config, "ratio", "token")
    clip = getattr(method.config, "clip", "")
    if level == "trajectory":
        expected = mask[mask[:, 1]].sum()
    elif level == "sequence" or clip == "sequence_one_side":
        means = mask[:, 1] * 30.0 / mask.sum(1).clamp(min=1)
        expected = mask[means > 20].sum()
    else:
        expected = mask[:, 1].sum()
    assert (int(total), int(n)) == (int(expected), int(mask.sum()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(method, side):
    def pad(tokens):
        widths = (3, 0) if side == "left" else (0, 3)
        grown = {
            f.name: torch.nn.functional.pad(v, widths)
            for f in dataclasses.fields(tokens)
            if isinstance(v := getattr(tokens, f.name), torch.Tensor) and v.dim() == 2
        }
        return dataclasses.replace(tokens, **grown)

    plain, value = gradient(method, ROWS)
    padded, padded_value = gradient(method, ROWS, pad)
    torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(padded_value, value, rtol=1e-12, atol=1e-14)


def test_values_outside_the_mask_change_nothing(method):
    def poison(tokens):
        def spoil(values):
            return torch.where(tokens.mask, values, torch.full_like(values, 7.0))

        names = ("logps", "old_logps", "ref_logps", "values", "old_values", "returns")
        changed = {name: spoil(getattr(tokens, name)) for name in names} | {"steps": spoil(tokens.steps)}
        return dataclasses.replace(tokens, **changed)

    plain, value = gradient(method, ROWS)
    poisoned, poisoned_value = gradient(method, ROWS, poison)
    torch.testing.assert_close(poisoned, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(poisoned_value, value, rtol=1e-12, atol=1e-14)


def test_an_empty_batch_gives_a_zero_with_a_gradient(method):
    def empty(tokens):
        return dataclasses.replace(tokens, mask=torch.zeros_like(tokens.mask))

    grad, value = gradient(method, ROWS, empty)
    assert float(value) == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_gradcheck(method):
    start = batch_of(method, model_logits(method))
    given = [start] if isinstance(start, TokenBatch) else [*start.responses.values(), start.samples]

    def loss(logits):
        """With everything that a shell hands over as a constant fixed at the starting point."""
        fixed = iter(given)

        def fix(tokens):
            then = next(fixed)
            constants = {name: getattr(then, name) for name in FIXED}
            return dataclasses.replace(tokens, **constants)

        return sum(part.value for part in method.loss(each(batch_of(method, logits), fix)).values())

    if getattr(method.config, "surrogate", None) == "cispo" or detaches_its_weight(method):
        pytest.skip("the weight is detached: the gradient is not that of the value; see the unit test")
    fast = isinstance(method, PreferenceMethod)  # its many roles make the full Jacobian slow
    assert torch.autograd.gradcheck(loss, (model_logits(method).requires_grad_(),), atol=1e-6, fast_mode=fast)


def detaches_its_weight(method):
    if method.config.name == "oreo" or method.config.name == "dapo_step" and method.config.phase == "policy":
        return True
    if method.expert_rows_per_step if isinstance(method, OnlineMethod) else 0:
        return getattr(method.config, "phi", "none") != "none" or getattr(method.config, "shift", "") == "ratio"
    if method.config.name == "rec":
        return method.config.weight != "none" or method.config.clip == "sequence_one_side"
    return method.config.name == "a_lol" and method.config.variant in ("a_lol", "seq", "r_lol", "r_gold")


def test_diagnostics_are_detached_sums_with_counts(method):
    for loss_sum in method.loss(batch_of(method, model_logits(method).requires_grad_())).values():
        for name, (total, n) in loss_sum.diagnostics.items():
            require(name)
            assert not total.requires_grad and not n.requires_grad
            assert float(n) > 0


def test_advantages_leave_unknown_rows_out(method):
    if not isinstance(method, OnlineMethod):
        pytest.skip("no advantages")
    rows = scored()
    advantages = method.advantages(rows)
    assert advantages.shape == (ROWS,)
    assert (advantages[~rows.known] == 0).all() and not method.keep(rows)[~rows.known].any()
    poisoned = dataclasses.replace(rows, rewards=torch.where(rows.known, rows.rewards, torch.tensor(99.0).double()))
    assert torch.equal(method.advantages(poisoned), advantages)


def test_advantages_follow_a_permutation_of_rows(method):
    if not isinstance(method, OnlineMethod):
        pytest.skip("no advantages")
    rows = scored()
    order = torch.tensor([5, 0, 7, 2, 4, 1, 3, 6])
    if getattr(method.config, "drop", "none") == "balanced":
        pytest.skip("which rows are dropped is drawn by their place")
    shuffled = dataclasses.replace(
        rows,
        **{k: getattr(rows, k)[order] for k in ("rewards", "outcomes", "known", "groups", "lengths", "finished")},
        verdicts=tuple(rows.verdicts[i] for i in order.tolist()),
    )
    torch.testing.assert_close(method.advantages(shuffled), method.advantages(rows)[order], rtol=1e-12, atol=1e-14)
