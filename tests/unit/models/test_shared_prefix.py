"""Log-probs and gradients of the planned pass against the model's own forward on every row alone."""

import copy
import json
import logging
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.models import attention, scored_head, scoring_pass, shared_prefix, sharing, token_logps

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
ARCHITECTURES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-wide-window": ("mistral", {"sliding_window": 64}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {**GEMMA, "sliding_window": 7, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "sliding_window": 7}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **dict.fromkeys(["attn_pdrop"], 0)}),
    "granite": ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"embedding_dropout": 0.0, "residual_dropout": 0.0, "sliding_window": None}),
}
# Rows as (number of the prompt, its tokens, completion tokens).
BATCHES = {
    "equal": [(0, 12, 6)] * 4 + [(1, 12, 6)] * 4,
    "ragged": [(0, 12, 6), (1, 5, 1), (0, 12, 2), (1, 5, 9), (0, 12, 1), (0, 12, 9), (2, 3, 4)],
    "alone": [(0, 4, 7), (1, 9, 3), (2, 12, 12), (3, 1, 1)],
    "one prompt of one token": [(0, 1, 5), (0, 1, 3), (0, 1, 5)],
}


def make_model(name, dtype=torch.float64, **changes):
    """A random model, sharpened so that its distributions are not all alike; exact norms in float64."""
    model_type, options = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **{**COMMON, **options, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.add_(0.1 * noise if parameter.dim() == 1 else 0.05 * noise)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(exact_norm, module)
    return model.eval()


def exact_norm(self, x):
    """The norm of the module without transformers' detour through float32, which would hide differences."""
    eps = getattr(self, "variance_epsilon", getattr(self, "eps", None))
    weight = 1 + self.weight if "Gemma" in type(self).__name__ else self.weight
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def make_rows(rows, mask_rows=(), seed=0):
    """ids, attention mask and loss mask of right-padded rows; `mask_rows` have nothing to train on."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt + completion for _, prompt, completion in rows) + 2
    ids, attention_mask, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    ids.fill_(2)  # the padding is a token that also occurs
    prompts = {}
    for row, (number, prompt, completion) in enumerate(rows):
        tokens = prompts.setdefault(number, torch.randint(3, VOCAB, (prompt,), generator=generator))
        ids[row, :prompt] = tokens
        ids[row, prompt : prompt + completion] = torch.randint(3, VOCAB, (completion,), generator=generator)
        attention_mask[row, : prompt + completion] = 1
        mask[row, prompt : prompt + completion] = 1
    if len(rows) > 2:
        mask[2, rows[2][1]] = 0  # a hole: tokens from the environment, say
        mask[2, -1] = 0
    for row in mask_rows:
        mask[row] = 0
    return ids, attention_mask, mask.bool()


def row_by_row(model, ids, attention_mask, mask, temperature=1.0):
    """Log-probs and entropies from the model's own logits, every row alone and without padding."""
    logps, entropies = [], []
    for row, length, scored in zip(ids, attention_mask.sum(1).tolist(), mask, strict=True):
        logits = model(input_ids=row[None, :length], use_cache=False).logits[0, :-1].double()
        distribution = (logits / temperature).log_softmax(-1)
        found = distribution.gather(-1, row[1:length, None]).squeeze(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        for values, target in ((found, logps), (entropy, entropies)):
            target.append(torch.nn.functional.pad(values, (1, len(row) - length)) * scored)
    return torch.stack(logps), torch.stack(entropies)


def loss_and_gradients(model, logps, mask):
    """A loss that is nonlinear in the log-probs, with an own weight for every token."""
    model.zero_grad(set_to_none=True)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(mask.device)
    loss = (weights * mask * (0.1 * logps.double()).exp()).sum() / max(float(mask.sum()), 1)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(found, expected):
    """Distance of all gradients together over their size."""
    assert found.keys() == expected.keys()
    squares = [((found[n] - expected[n]).double().square().sum(), expected[n].double().square().sum()) for n in found]
    over, under = (torch.stack(list(values)).sum().sqrt() for values in zip(*squares, strict=True))
    return float(over / under)


@pytest.fixture
def always_share(monkeypatch):
    """Tiny models would run plain rows; returns the plans that were made."""
    for device in shared_prefix.CALL_FLOPS:
        monkeypatch.setitem(shared_prefix.CALL_FLOPS, device, 0.0)
    monkeypatch.setattr(shared_prefix, "MERGE_FLOPS", 0)
    plans = []
    real = scoring_pass.plan

    def spy(*args, **kwargs):
        plans.append(real(*args, **kwargs))
        return plans[-1]

    def prove(model, proven=token_logps.prove_scoring):
        before = len(plans)
        found = proven(model)
        del plans[before:]
        return found

    monkeypatch.setattr(scoring_pass, "plan", spy)
    monkeypatch.setattr(token_logps, "prove_scoring", prove)
    return plans


@pytest.fixture(params=["merged", "concatenated"])
def way(request, monkeypatch):
    if request.param == "concatenated":
        monkeypatch.setattr(attention, "flash_is_usable", lambda: False)
    return request.param


def compare(model, batch, tolerance, temperature=1.0, train=False):
    ids, attention_mask, mask = batch
    plain = copy.deepcopy(model)
    token_logps.prepare(model, temperature=temperature)
    model.train(train)
    expected, entropies = row_by_row(plain, ids, attention_mask, mask, temperature)
    found = token_logps.token_logps(model, ids, attention_mask, mask, entropy=True)
    torch.testing.assert_close(found.logps.double(), expected.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.entropies.double(), entropies.double(), rtol=0, atol=tolerance)
    assert not found.entropies.requires_grad and found.top1 is None
    one, two = loss_and_gradients(model, found.logps, mask), loss_and_gradients(plain, expected, mask)
    assert abs(one[0] - two[0]) <= tolerance
    assert relative(one[1], two[1]) <= tolerance
    return one


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_equals_the_models_own_forward(name, rows, way, always_share):
    compare(make_model(name), make_rows(rows), 1e-10)
    assert always_share[0].layout is not None or all(a == b for a, b in zip(rows, rows[1:], strict=False))
    shared = any(group.branches for group in always_share[0].layout.groups)
    assert shared == (len({number for number, *_ in rows}) < len(rows))


def make_turns():
    """Cuts of two episodes at their turns, each trained on from some turn on, so that what they share is scored by some
    of them; and another episode of the first prompt, whose first turn is the same."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randint(3, VOCAB, (20,), generator=generator) for _ in range(2))
    other = torch.cat([first[:9], torch.randint(3, VOCAB, (6,), generator=generator)])
    cuts = [
        (first, 4, 7),
        (first, 9, 12),
        (first, 14, 20),
        (first, 4, 20),
        (second, 3, 6),
        (second, 8, 20),
        (other, 4, 15),
    ]
    ids, attention_mask, mask = (torch.zeros(len(cuts), 22, dtype=torch.long) for _ in range(3))
    for row, (episode, begin, end) in enumerate(cuts):
        ids[row, :end], attention_mask[row, :end], mask[row, begin:end] = episode[:end], 1, 1
    mask[3, 7:9] = mask[3, 12:14] = 0  # what the environment said
    return ids, attention_mask, mask.bool()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_turns_of_an_episode_are_computed_once(name, way, always_share):
    ids, attention_mask, mask = make_turns()
    compare(make_model(name), (ids, attention_mask, mask), 1e-10)
    first, second = always_share[0].layout.groups
    assert max(len(path) for part, path in first.walk()) == 4 and (first.rows, second.rows) == (5, 2)
    # Each distinct token once: 19 and 5 more behind the ninth of the first prompt, 19 of the second.
    assert always_share[0].source.numel() == 19 + 5 + 19


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_equals_the_models_own_forward_on_plain_rows(name, monkeypatch):
    monkeypatch.setattr("posttrain.models.proof.sharing_obstacle", lambda model: "a test")
    compare(make_model(name), make_rows(BATCHES["ragged"]), 1e-10)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-window", "gemma", "gemma2", "gemma3"])
def test_float32(name, way, always_share):
    model, batch = make_model(name, torch.float32), make_rows(BATCHES["ragged"])
    compare(model, batch, 1e-5)
    assert always_share[0].layout is not None


def test_bfloat16_differs_by_no_more_than_its_rounding(way, always_share):
    """Under autocast, against float32: the planned pass is about as far from it as the model's own forward."""
    model, batch = make_model("llama", torch.float32), make_rows(BATCHES["ragged"])
    ids, attention_mask, mask = batch
    gradients = {}
    for name, dtype in (("exact", None), ("plain", torch.bfloat16), ("planned", torch.bfloat16)):
        own = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            if name == "planned":
                token_logps.prepare(own)
                logps = token_logps.token_logps(own, ids, attention_mask, mask).logps
            else:
                logps = row_by_row(own, ids, attention_mask, mask)[0]
        gradients[name] = loss_and_gradients(own, logps, mask)[1]
    rounding = relative(gradients["plain"], gradients["exact"])
    assert 1e-4 < rounding < 0.05
    assert relative(gradients["planned"], gradients["exact"]) < 1.5 * rounding


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no-checkpoints", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("adapted", ["layers", "head", "all-weights"])
def test_adapters_and_gradient_checkpointing(adapted, checkpointing, way, always_share):
    from peft import LoraConfig, get_peft_model

    base, batch = make_model("qwen2"), make_rows(BATCHES["ragged"])
    plain, planned = copy.deepcopy(base), base
    targets = ["q_proj", "v_proj", "down_proj"] + (["lm_head"] if adapted == "head" else [])
    if adapted != "all-weights":
        torch.manual_seed(3)
        plain, planned = (get_peft_model(m, LoraConfig(r=3, target_modules=targets)) for m in (plain, planned))
        noise = {n: 0.2 * torch.randn_like(p) for n, p in planned.named_parameters() if "lora" in n}
        for model in (plain, planned):
            model.load_state_dict(noise, strict=False)
    token_logps.prepare(base, temperature=0.7)
    if checkpointing is not None:
        planned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        planned.enable_input_require_grads()
    planned.train()
    ids, attention_mask, mask = batch
    expected, _ = row_by_row(plain, ids, attention_mask, mask, temperature=0.7)
    found = token_logps.token_logps(planned, ids, attention_mask, mask, top1=True)
    torch.testing.assert_close(found.logps, expected, rtol=0, atol=1e-10)
    one, two = loss_and_gradients(planned, found.logps, mask), loss_and_gradients(plain, expected, mask)
    assert relative(one[1], two[1]) <= 1e-10
    assert any(group.branches for group in always_share[0].layout.groups)


def test_the_first_pass_of_a_process_may_be_checkpointed(always_share):
    """The trial of the kernel saves tensors of its own, once."""
    attention.flash_is_usable.cache_clear()
    model, (ids, attention_mask, mask) = make_model("llama"), make_rows(BATCHES["ragged"])
    token_logps.prepare(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    token_logps.token_logps(model, ids, attention_mask, mask).logps.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("share", [True, False])
def test_rows_and_batches_without_scored_tokens(share, monkeypatch, always_share):
    if not share:
        monkeypatch.setattr("posttrain.models.proof.sharing_obstacle", lambda model: "a test")
    compare(make_model("llama"), make_rows(BATCHES["ragged"], mask_rows=(0, 1)), 1e-10)
    model, (ids, attention_mask, mask) = make_model("llama"), make_rows(BATCHES["ragged"])
    token_logps.prepare(model)
    found = token_logps.token_logps(model, ids, attention_mask, torch.zeros_like(mask), entropy=True, top1=True)
    assert all((values == 0).all() and values.shape == ids.shape for values in found)
    found.logps.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())  # zero, not missing: DDP waits for every parameter


@pytest.mark.parametrize("cache", [0, 3 * 16 * VOCAB * 8, 2**30], ids=["recomputed", "partly", "cached"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_tiles_of_the_head(name, cache, monkeypatch, always_share):
    monkeypatch.setitem(scored_head.TILE_BYTES, "cpu", 1)  # 16 rows a tile
    monkeypatch.setattr(scored_head, "CACHE_BYTES", cache)
    rows = [(0, 4, 30)] * 3
    compare(make_model(name), make_rows(rows), 1e-10, temperature=1.7)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_as_on_a_gpu(name, frozen, monkeypatch, always_share):
    """Whole tiles at once, and attention by PyTorch's own SDPA: what runs there, as far as a CPU can tell."""
    monkeypatch.setattr(scored_head, "BLOCK_ROWS", 10**6)
    monkeypatch.setattr(attention, "flash_is_usable", lambda: False)
    model = make_model(name, tie_word_embeddings=False)
    model.get_output_embeddings().requires_grad_(not frozen)
    compare(model, make_rows(BATCHES["ragged"]), 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-window", "gemma", "gemma2", "gemma3"])
def test_cuda_equals_the_models_own_forward(name, rows, always_share):
    """In float64 with exact norms; no model's own rounding hides a difference."""
    compare(make_model(name).cuda(), [tensor.cuda() for tensor in make_rows(rows)], 1e-10)
    assert always_share[0].layout is not None and always_share[0].source.device.type == "cuda"


def assert_as_exact_as_plain_rows(model, batch, dtype, adapted, *, device="cuda", planned="sdpa"):
    """Gradients of a planned pass under autocast are as far from those in float64 as those of plain rows are.

    Args:
        planned: attention of the planned pass; the others have the model's own.
    """
    from peft import LoraConfig, get_peft_model

    batch, gradients = [tensor.to(device) for tensor in batch], {}
    for way in ("exact", "plain", "planned"):
        own = base = copy.deepcopy(model)
        if adapted:
            torch.manual_seed(3)
            own = get_peft_model(own, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
        own = (own.double() if way == "exact" else own).to(device).train()
        with torch.autocast(device, dtype, enabled=way != "exact" and dtype != torch.float32):
            if way == "planned":
                base.set_attn_implementation(planned)
                token_logps.prepare(base)
                own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                own.enable_input_require_grads()
                logps = token_logps.token_logps(own, *batch).logps
            else:
                logps = row_by_row(own, *batch)[0]
        gradients[way] = loss_and_gradients(own, logps, batch[2])[1]
    rounding = relative(gradients["plain"], gradients["exact"])
    assert relative(gradients["planned"], gradients["exact"]) < max(1.5 * rounding, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_cuda_equals_the_cpu(dtype, adapted, always_share):
    """Under autocast, with gradient checkpointing, with and without an adapter: as far from float64 as plain rows."""
    assert_as_exact_as_plain_rows(make_model("qwen2", torch.float32), make_rows(BATCHES["ragged"]), dtype, adapted)
    assert any(group.branches for group in always_share[0].layout.groups)


FLEX = [name for name in ARCHITECTURES if name != "gpt2"]
"""Those for which transformers has FlexAttention."""


def without_cap(name, dtype=torch.float64, **changes):
    """A model without a soft cap of its attention, which SDPA does not have."""
    return make_model(name, dtype, **({"attn_logit_softcapping": None} if name == "gemma2" else {}), **changes)


def flex(model):
    """A copy with FlexAttention, prepared."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("flex_attention")
    token_logps.prepare(own)
    return own


@torch.no_grad()
def compare_flex(model, batch, tolerance):
    """Without gradients, since PyTorch has none for FlexAttention on a CPU."""
    own, shared = flex(model), copy.deepcopy(model)
    token_logps.prepare(shared)
    found = token_logps.token_logps(own, *batch, entropy=True)
    logps, entropies = row_by_row(model, *batch)
    torch.testing.assert_close(found.logps.double(), logps.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.entropies.double(), entropies.double(), rtol=0, atol=tolerance)
    expected = token_logps.token_logps(shared, *batch)
    torch.testing.assert_close(found.logps, expected.logps, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_in_float64(name, always_share):
    compare_flex(without_cap(name), make_rows(BATCHES["ragged"]), 1e-10)
    windows = {"mistral-window": {7}, "gemma2": {7, None}, "gemma3": {7}}
    assert set(always_share[0].layout.masks) == windows.get(name, {None})
    assert any(group.branches for group in always_share[0].layout.groups)
    assert not always_share[1].layout.masks


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("name", ["qwen2", "mistral-window"])
def test_flex_attention_on_other_batches(name, rows, always_share):
    compare_flex(make_model(name), make_rows(rows), 1e-10)
    assert always_share[0].layout.masks


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_flex_attention_over_several_blocks(name, always_share):
    rows = [(0, 250, 60), (0, 250, 3), (1, 129, 60), (0, 250, 60), (1, 129, 68), (0, 250, 40), (0, 250, 37)]
    compare_flex(without_cap(name, max_position_embeddings=512), make_rows(rows), 1e-10)
    assert 640 < always_share[0].source.numel() <= 768
    assert all(mask.kv_num_blocks.shape == (1, 1, 6) for mask in always_share[0].layout.masks.values())


def test_flex_attention_in_float32_and_under_autocast(always_share):
    model, batch = make_model("qwen3", torch.float32), make_rows(BATCHES["ragged"])
    compare_flex(model, batch, 1e-5)
    own = flex(model)
    with torch.no_grad():
        exact = row_by_row(model, *batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            plain, found = row_by_row(model, *batch)[0], token_logps.token_logps(own, *batch).logps
    rounding = (plain - exact).norm()
    assert rounding > 1e-3 and (found - exact).norm() < 1.5 * rounding


def test_flex_attention_caps_scores_as_the_model_says(always_share):
    model, batch = make_model("gemma2", attn_logit_softcapping=0.5), make_rows(BATCHES["ragged"])
    own, eager = flex(model), copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found = token_logps.token_logps(own, *batch).logps
        # Rows one by one are no layout: plain attention with the cap. The eager one rounds weights to float32.
        torch.testing.assert_close(found, row_by_row(own, *batch)[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(found, row_by_row(eager, *batch)[0], rtol=0, atol=1e-6)
        assert (found - row_by_row(model, *batch)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_sampling_with_flex_attention_on_a_cpu(name, tmp_path):
    model, (ids, attention_mask, _) = make_model(name), make_rows([(0, 12, 6), (1, 12, 6)])
    own = flex(model)
    ids, attention_mask = ids[:, :10], attention_mask[:, :10].clone()
    attention_mask[0, :3] = 0
    arguments = {"input_ids": ids, "attention_mask": attention_mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(own.generate(**arguments), model.generate(**arguments))
    own.save_pretrained(tmp_path)
    assert "flex" not in (tmp_path / "config.json").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "mistral-window", "gemma2", "gemma3"])
def test_cuda_flex_attention(name, dtype, adapted, always_share):
    """Gradients of the compiled kernels, with gradient checkpointing: as far from float64 as plain rows with SDPA."""
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 512}
    several_blocks = [(0, 150, 140), (0, 150, 3), (1, 129, 20), (0, 150, 90), (1, 129, 128)]
    for rows in (several_blocks, BATCHES["ragged"]):
        model = without_cap(name, torch.float32, **sizes)
        assert_as_exact_as_plain_rows(model, make_rows(rows), dtype, adapted, planned="flex_attention")
        assert always_share[0].layout.masks


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_frozen_head(name, always_share):
    model = make_model(name, tie_word_embeddings=False)
    model.get_output_embeddings().requires_grad_(False)
    gradients = compare(model, make_rows(BATCHES["ragged"]), 1e-10)[1]
    assert "lm_head.weight" not in gradients and len(gradients) > 10


def test_top1_and_a_head_with_a_bias(monkeypatch):
    model, (ids, attention_mask, mask) = make_model("llama"), make_rows(BATCHES["ragged"])
    plain = copy.deepcopy(model)
    for one in (plain, model):
        bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
        one.lm_head.bias = torch.nn.Parameter(bias)
    likeliest = plain(input_ids=ids).logits.argmax(-1)
    ids[0, 15] = likeliest[0, 14]
    found = {}
    token_logps.prepare(model)
    for tile in (1, 2**20):
        monkeypatch.setitem(scored_head.TILE_BYTES, "cpu", tile)
        found[tile] = token_logps.token_logps(model, ids, attention_mask, mask, top1=True)
        expected = torch.nn.functional.pad(plain(input_ids=ids).logits.argmax(-1)[:, :-1] == ids[:, 1:], (1, 0)) * mask
        assert torch.equal(found[tile].top1.float(), expected) and expected[0, 15] == 1
        one = loss_and_gradients(model, found[tile].logps, mask)
        two = loss_and_gradients(plain, row_by_row(plain, ids, attention_mask, mask)[0], mask)
        assert relative(one[1], two[1]) <= 1e-10


def test_without_gradients(always_share):
    model, (ids, attention_mask, mask) = make_model("llama"), make_rows(BATCHES["ragged"])
    expected, _ = row_by_row(copy.deepcopy(model), ids, attention_mask, mask)
    token_logps.prepare(model)
    with torch.no_grad():
        found = token_logps.token_logps(model, ids, attention_mask, mask)
    assert not found.logps.requires_grad and found.entropies is None
    torch.testing.assert_close(found.logps, expected, rtol=0, atol=1e-10)


def test_other_calls_of_a_prepared_model_are_untouched(tmp_path):
    model, (ids, attention_mask, mask) = make_model("mistral-window", torch.float32), make_rows(BATCHES["ragged"])
    plain = copy.deepcopy(model)
    token_logps.prepare(model)
    token_logps.token_logps(model, ids, attention_mask, mask)
    expected = plain(input_ids=ids, attention_mask=attention_mask, labels=ids)
    found = model(input_ids=ids, attention_mask=attention_mask, labels=ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    arguments = {"input_ids": ids[:2, :5], "attention_mask": attention_mask[:2, :5], "max_new_tokens": 9}
    assert torch.equal(model.generate(**arguments), plain.generate(**arguments))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    logps = token_logps.token_logps(twin, ids, attention_mask, mask).logps  # its own weights, not those of the original
    torch.testing.assert_close(logps, -torch.log(torch.tensor(float(VOCAB))) * mask)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]


def test_the_first_rows_left_padding_is_refused():
    model, (ids, attention_mask, mask) = make_model("llama"), make_rows(BATCHES["equal"])
    token_logps.prepare(model)
    attention_mask[3, 0] = 0
    with pytest.raises(ValueError, match="right"):
        token_logps.token_logps(model, ids, attention_mask, mask)


def test_an_unsupported_model_says_so_once_and_is_still_exact(caplog):
    token_logps._say_once.cache_clear()
    config = AutoConfig.for_model("gpt_neox", **{**COMMON, "hidden_act": "gelu"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with caplog.at_level(logging.WARNING):
        compare(model, make_rows(BATCHES["ragged"]), 1e-5)
        token_logps.prepare(copy.deepcopy(model))
    said = [record.message for record in caplog.records if record.name == token_logps.__name__]
    assert len(said) == 1 and "gpt_neox" in said[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"attention_dropout": 0.1}, "dropout"), ({"_attn_implementation": "eager"}, "eager")],
)
def test_obstacles(changes, reason):
    model = make_model("llama")
    for name in ("flex_attention", "sdpa"):
        model.set_attn_implementation(name)
        assert sharing.sharing_obstacle(model) is None
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert reason in sharing.sharing_obstacle(model)
