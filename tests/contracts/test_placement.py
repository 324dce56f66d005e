"""Every shell trains as if on an accelerator: a tensor left on the CPU, or sent through NumPy, fails here and not on a
user's GPU. In a process of its own, because PyTorch forgets no device once it is told of one.
"""

from pathlib import Path

import pytest
import yaml

METHODS = {
    "sft": {"name": "sft"},
    "dpo": {"name": "dpo"},
    "grpo": {"name": "grpo", "beta": 0.1, "updates_per_rollout": 2},  # a reference, old log-probs
    "oreo": {"name": "oreo", "kl_reg": 0.1, "unbiased_kl": True},  # a critic, the KL over the whole vocabulary
    "reward": {"name": "reward"},
}


@pytest.fixture(scope="module")
def output(tiny_model, make_recipe_data, apart, tmp_path_factory):
    """What the script printed."""
    folder, recipes = tmp_path_factory.mktemp("placement"), []
    for name in (*METHODS, "faulty"):
        changes = {"training.max_steps": 1, "output": str(folder / name)}
        data = make_recipe_data(tiny_model, folder, METHODS.get(name, METHODS["sft"]), changes)
        recipes.append(folder / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump(data))
    said = folder / "said"
    process = apart([Path(__file__).with_name("pretended_device.py"), *recipes], said)
    process.join(600)
    assert process.exitcode == 0, said.read_text()[-6000:]
    return said.read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_shell_trains_on_a_device(output, name):
    assert any(line.startswith("trained: ") and line.endswith(f"/{name}.yaml") for line in output.splitlines())


def test_mistakes_of_placement_are_caught(output):
    """The test of this test."""
    caught = dict(line.split(": ", 2)[1:] for line in output.splitlines() if line.startswith("caught: "))
    assert caught.keys() == {"left on the CPU", "through NumPy"}
    assert "on the CPU" in caught["left on the CPU"] and "numpy" in caught["through NumPy"]
