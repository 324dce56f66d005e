"""Trains the recipes named on the command line, one after the other; started on several ranks by a test.

With RESUME=auto in the environment it goes on from checkpoints that are there.
"""

import os
import sys

from posttrain.config.loading import load_recipe
from posttrain.methods import METHODS
from posttrain.trainers.run import train

for path in sys.argv[1:]:
    train(load_recipe(path, [], {name: cls.Config for name, cls in METHODS.items()}), resume=os.environ.get("RESUME"))
