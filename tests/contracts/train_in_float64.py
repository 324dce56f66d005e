"""Trains the recipes named on the command line in float64, every row whole; started on several ranks by a test."""

import runpy
import sys
from pathlib import Path

import torch

from posttrain.models import saving, scoring_pass, sharing
from posttrain.models.loading import DTYPES

train_recipe = runpy.run_path(str(Path(__file__).with_name("train_recipes.py")))["train_recipe"]
plan = scoring_pass.plan


def of_whole_rows(*arguments, **keywords):
    made = plan(*arguments, **keywords)
    assert made.layout is None
    return made


DTYPES["float32"] = torch.float64
saving.BYTES["float64"] = 8
sharing.SHAREABLE = frozenset()
scoring_pass.plan = of_whole_rows
for path in sys.argv[1:]:
    train_recipe(path)
