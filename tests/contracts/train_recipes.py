"""Trains the recipes named on the command line, one after the other; started on several ranks by a test.

With RESUME=auto in the environment it goes on from checkpoints that are there, with TRUST=yes from anybody's.
"""

import os
import sys

from posttrain.imports import importing

with importing():
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from posttrain.config.loading import load_recipe
    from posttrain.methods import METHODS
    from posttrain.trainers.run import train

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # On a CPU accelerate leaves FSDP out and trains with DDP, without a word. PyTorch's FSDP2 does run on one.
    started = PartialState.__init__

    def start(self, *arguments, **keywords):
        first = PartialState._shared_state == {}
        started(self, *arguments, **keywords)
        if first:  # later ones would put DDP back where accelerate has noted FSDP by then
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = start


def train_recipe(path, resume=None, trust=False):
    """The result of a run."""
    recipe = load_recipe(path, [], {name: cls.Config for name, cls in METHODS.items()})
    return train(recipe, resume=resume, trust_checkpoint=trust)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        train_recipe(path, os.environ.get("RESUME"), os.environ.get("TRUST") == "yes")
