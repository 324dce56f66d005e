"""A model beyond another one: the paper's numbers where log-probs are linear in the weights, and real folders."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.contract.recipes import write_model
from posttrain.errors import ModelError
from posttrain.models.extrapolation import extrapolated, write_extrapolated


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_step_of_the_paper_in_logits():
    before, model = {"logits": t(0.5, 0.3, 0.2).log()}, {"logits": t(0.6, 0.27, 0.13).log()}
    policy = extrapolated(model, before, 0.3)["logits"].softmax(0)
    assert policy.tolist() == pytest.approx([0.627724018844, 0.259119226948, 0.113156754208], abs=1e-11)


def test_the_reward_in_the_log_probs_grows_as_with_momentum():
    """Exact rounds with 1 / beta = 1: the weight c of the reward in log pi, and that before the step, hat c."""
    alpha, rounds = 0.3, []
    policy, before = {"c": t(0.0)}, {"c": t(0.0)}
    for _ in range(5):
        solved = {"c": policy["c"] + 1.0}
        policy = extrapolated(solved, before, alpha)
        rounds.append((float(solved["c"]), float(policy["c"])))
        before = solved
    assert [hat for hat, _ in rounds] == pytest.approx([1, 2.3, 3.69, 5.107, 6.5321])
    assert [c for _, c in rounds] == pytest.approx([1.3, 2.69, 4.107, 5.5321, 6.95963])


def test_without_momentum_it_is_the_model_bit_for_bit(tiny_model, tmp_path):
    other = write_model(tmp_path / "other", seed=5)
    (tmp_path / "out").mkdir()
    write_extrapolated(str(other), str(tiny_model), 0.0, tmp_path / "out")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", other))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_folder_that_others_load(tiny_model, tmp_path):
    other = write_model(tmp_path / "other", seed=5)
    (tmp_path / "out").mkdir()
    write_extrapolated(str(other), str(tiny_model), 0.5, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    name = "model.layers.0.self_attn.q_proj.weight"
    start, end = (load_file(folder / "model.safetensors")[name] for folder in (tiny_model, other))
    torch.testing.assert_close(model.get_parameter(name).detach(), 1.5 * end - 0.5 * start)


def test_models_with_other_tensors_are_refused():
    with pytest.raises(ModelError, match="differ in head, tail"):
        extrapolated({"head": t(1.0)}, {"head": t(1.0, 2.0), "tail": t(1.0)}, 0.3)
