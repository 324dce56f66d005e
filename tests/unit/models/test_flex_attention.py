"""Block masks of layouts against what every token sees, compilation, costs, and the refusal to train on a CPU."""

import itertools
import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig

from posttrain.config.loading import load_recipe
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.methods import METHODS
from posttrain.models import flex_attention
from posttrain.models.device import check_gradients, device_type
from posttrain.models.flex_attention import block_mask
from posttrain.models.loading import load_policy
from posttrain.models.shared_prefix import Costs, plan
from posttrain.models.sharing import flexes
from posttrain.rollouts import shared_prompts
from posttrain.trainers.run import train

CPU = torch.device("cpu")
FREE = Costs(token=100.0, pair=1e-9, call=0.0, merge=0.0)


def layout_of(*groups):
    """The layout of groups given as (tokens of the prompt, tokens of each completion)."""
    width = max(prompt + max(completions) for prompt, completions in groups)
    rows = [(number, prompt, own) for number, (prompt, completions) in enumerate(groups) for own in completions]
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for row, (number, prompt, own) in enumerate(rows):
        ids[row, :prompt], ids[row, prompt : prompt + own] = number + 1, 99 + row
        mask[row, prompt : prompt + own] = 1
    made = plan(ids, mask, FREE, layouts=True, device=CPU)
    return made.layout, made.source.numel()


def tree_of(cuts, own):
    """The layout of an episode that goes on from cut to cut, with a row of its own from each of them on."""
    ends = list(itertools.accumulate(cuts))
    ids, mask = (
        torch.ones(len(ends) + 1, ends[-1] + own + 1, dtype=torch.long),
        torch.zeros(len(ends) + 1, ends[-1] + own + 1),
    )
    for row, end in enumerate(ends):
        ids[row, end : end + own], mask[row, end : end + own] = 99 + row, 1
    mask[-1, ends[-1]] = 1
    made = plan(ids, mask, FREE, layouts=True, device=CPU)
    assert max(len(path) for group in made.layout.groups for _, path in group.walk()) >= len(cuts) - 1
    return made.layout, made.source.numel()


def dense(layout, total, window):
    """(total, total): who sees whom, row by row."""
    seen = torch.zeros(total, total, dtype=torch.bool)
    for part, path in (each for group in layout.groups for each in group.walk()):
        segments = [one.segment for one in (*path, part)]
        row = [place for s in segments for place in range(s.start, s.start + s.length)]
        for place, query in enumerate(row):
            seen[query, row[max(0, place + 1 - (window or total)) : place + 1]] = True
    return seen


@pytest.mark.parametrize("window", [None, 1, 7, 128, 130, 250])
def test_a_block_mask_is_what_every_token_sees(window):
    draw = random.Random(0)
    for _ in range(8):
        groups = [
            (draw.choice([1, 5, 127, 128, 129, 400]), [draw.choice([1, 4, 64, 129, 257]) for _ in range(completions)])
            for completions in (1, 3, 4)
        ]
        cuts = [draw.choice([1, 60, 128, 200, 300]) for _ in range(4)]
        layout, total = draw.choice([layout_of(*groups), tree_of(cuts, draw.choice([1, 128, 190]))])
        mask, seen = block_mask(layout, window, CPU), dense(layout, total, window)
        places = torch.arange(total)
        assert torch.equal(mask.mask_mod(0, 0, places[:, None], places[None]), seen)
        theirs = create_block_mask(mask.mask_mod, None, None, total, total, device="cpu")
        assert torch.equal(mask.to_dense(), theirs.to_dense())
        for row, columns in enumerate(mask.full_kv_indices[0, 0]):  # only these are not compared token by token
            for column in columns[: mask.full_kv_num_blocks[0, 0, row]].tolist():
                inside = seen[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
                assert inside.shape == (128, 128) and inside.all()
        assert window in layout.masks or window >= layout.longest
        assert block_mask(layout, window, CPU) is mask


def test_blocks_that_every_query_sees_whole_need_no_comparison():
    layout, _ = layout_of((256, [200, 200]))
    mask = block_mask(layout, None, CPU)
    # Blocks 2 to 5 are the completions: each sees both blocks of the prompt whole.
    assert mask.full_kv_num_blocks[0, 0].tolist()[:3] == [0, 1, 2]
    assert mask.full_kv_indices[0, 0, 2, :2].tolist() == [0, 1]


def test_layouts_of_all_shapes_compile_to_few_graphs():
    """As on CUDA, up to the kernels: what changes from one micro-batch to the next is no reason to compile."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(flex_attention._call, dynamic=True, fullgraph=True, backend=count)
    layouts = [layout_of((20, [5, 9])), layout_of((30, [3]), (4, [1, 7])), layout_of((300, [50, 60]), (20, [5, 6]))]
    layouts += [layout_of((301, [9, 200, 1])), layout_of((128, [129, 129])), layout_of((700, [5] * 9))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (layout, total), window in itertools.product(layouts, (None, 9)):
            query, key, value = (torch.randn(1, heads, total, 8, generator=generator) for heads in (4, 2, 2))
            mask = block_mask(layout, window, CPU)
            found = compiled(query, key, value, None, mask, 0.3)
            scores = (0.3 * query @ key.repeat_interleave(2, 1).mT).masked_fill(
                ~dense(layout, total, window), -torch.inf
            )
            torch.testing.assert_close(found, scores.softmax(-1) @ value.repeat_interleave(2, 1))
    assert 1 <= len(graphs) <= 3


def test_costs_are_those_of_one_call():
    config = LlamaConfig(hidden_size=256)
    cuda = Costs.of(config, torch.device("cuda"), flex=True)
    assert (cuda.whole, cuda.merge) == ("blocks", 0.0) and Costs.of(config, torch.device("cuda")).whole is None
    assert Costs.of(config, CPU, flex=True).whole == "all"

    def shared(prompt, own, costs):
        ids, mask = torch.full((8, prompt + own), 3), torch.zeros(8, prompt + own)
        ids[:, prompt:] = torch.arange(4, 12)[:, None]
        mask[:, prompt:] = 1
        return plan(ids, mask, costs, layouts=True, device=CPU).layout is not None

    # Calls are what keeps short prompts unshared; here there is one either way.
    assert shared(64, 64, cuda) and not shared(64, 64, Costs.of(config, torch.device("cuda")))
    assert shared(512, 128, cuda)
    # All pairs of a pass are computed on a CPU: many completions of a short prompt are better off alone.
    assert shared(512, 128, Costs.of(config, CPU, flex=True)) and not shared(8, 512, Costs.of(config, CPU, flex=True))


def test_training_on_a_cpu_is_refused_before_anything_is_loaded(tiny_model, make_recipe_data, tmp_path, monkeypatch):
    import yaml

    for device, name in (("cpu", "sdpa"), ("cpu", None), ("cuda", "flex_attention")):
        check_gradients(ModelConfig(path="m", attn_implementation=name), device)
    data = make_recipe_data(tiny_model, tmp_path, {"name": "grpo"}, {"model.attn_implementation": "flex_attention"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml", [], {name: cls.Config for name, cls in METHODS.items()})
    monkeypatch.setattr("posttrain.trainers.run.device_type", lambda: "cpu")
    with pytest.raises(ModelError, match="no gradients for FlexAttention on a CPU") as raised:
        train(recipe)
    assert raised.value.where == "model.attn_implementation" and "sdpa" in raised.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(device_type() != "cpu", reason="of a machine without a GPU")
def test_a_loaded_policy_reads_prompts_that_begin_alike(tiny_model, monkeypatch):
    monkeypatch.setitem(shared_prompts.PASS_FLOPS, "cpu", 0.0)
    own, _ = load_policy(ModelConfig(path=str(tiny_model), attn_implementation="flex_attention"), seed=0)
    plain, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    assert own.config._attn_implementation == flex_attention.NAME and flexes(own)
    prompts = [[4, 5, 6, 7, 8, 9, 10, 4, 5, 6, end] for end in (3, 7, 8)] + [[4, 5, 6, 7, 8, 9, 10, 4, 5]]
    assert len(shared_prompts.plan_for(own, prompts)) > 1
    with torch.no_grad():
        found, expected = (shared_prompts.read(model, prompts, tokenizer.pad_token_id)[0] for model in (own, plain))
    torch.testing.assert_close(found, expected)
