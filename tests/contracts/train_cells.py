"""Trains the cells of a launch of `test_precision`: each recipe, and its last step again from the checkpoint before it.

What a loss reads must reach it as the shell made it: no engine may have cast it on the way. Completions are those of
one rank, which writes them into the folder ROLLOUTS (in the environment): where a logit rounds otherwise, a draw at the
edge of two tokens falls on the other side, and from there on two runs have nothing in common. All ranks sample all the
same, and how many completions agree is left in the run's folder.
"""

import dataclasses
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from posttrain.objectives.batch import PreferenceBatch
from posttrain.rollouts.engine import Completion
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.shell import Shell

train_recipe = runpy.run_path(str(Path(__file__).with_name("train_recipes.py")))["train_recipe"]
ROLLOUTS = Path(os.environ["ROLLOUTS"])
ALONE = "RANK" not in os.environ
KEPT = ("model", "critic", "adapter")

known: dict[str, dict] = {}
agreed = [0, 0]
generate, compute_loss = TransformersEngine.generate, Shell.compute_loss


def generate_the_same(self, prompts, sampling, limits=None):
    found = generate(self, prompts, sampling, limits)
    for place, group in enumerate(found):
        for i, completion in enumerate(group):
            key = f"{sampling.seed} {sampling.draw(place, i)}"
            if ALONE:
                known.setdefault(key, dataclasses.asdict(completion))
            same = Completion(**known[key])
            agreed[0] += same.ids == completion.ids
            agreed[1] += 1
            group[i] = dataclasses.replace(same, policy_version=completion.policy_version)
    return found


def token_batches(batch):
    if not isinstance(batch, PreferenceBatch):
        return [batch]
    return [*batch.responses.values(), *([] if batch.samples is None else [batch.samples])]


def loss_of_what_was_made(self, model, inputs, *arguments, **keywords):
    made, loss = self.step_inputs[len(self.step_losses)], self.method.loss
    assert made.keys() == inputs.keys()
    for name, value in made.items():
        assert inputs[name].dtype == value.dtype and torch.equal(inputs[name].cpu(), value), name

    def exact_loss(batch):
        for tokens in token_batches(batch):
            named = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)} | tokens.further
            for name, value in named.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    assert value.dtype == torch.float32, (name, value.dtype)
        return loss(batch)

    self.method.loss = exact_loss
    try:
        return compute_loss(self, model, inputs, *arguments, **keywords)
    finally:
        del self.method.loss


TransformersEngine.generate, Shell.compute_loss = generate_the_same, loss_of_what_was_made

for path in map(Path, sys.argv[1:]):
    rollouts = ROLLOUTS / f"{path.stem}.json"
    known, agreed[:] = {} if ALONE else json.loads(rollouts.read_text()), [0, 0]
    run = train_recipe(path).run_dir
    ranks = PartialState()
    ranks.wait_for_everyone()
    if ALONE:
        rollouts.write_text(json.dumps(known))
    (run / f"agreed-{ranks.process_index}.json").write_text(json.dumps(agreed))
    if ranks.is_main_process:
        (run / "first").mkdir()
        for name in KEPT:
            if (run / name).exists():
                shutil.move(run / name, run / "first" / name)
        shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    ranks.wait_for_everyone()
    train_recipe(path, "auto")
