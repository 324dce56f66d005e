"""Trains the recipes named on the command line with the engine of test_pipelined; started on two ranks by it.

With FAIL=<rank> in the environment that rank's third batch fails; what each rank then says is printed.
"""

import os
import runpy
import sys
from pathlib import Path

from posttrain.config.loading import load_recipe
from posttrain.errors import EngineError
from posttrain.methods import METHODS
from posttrain.trainers import run

CopyEngine = runpy.run_path(str(Path(__file__).with_name("test_pipelined.py")))["CopyEngine"]
generate, failing = CopyEngine.generate, os.environ.get("FAIL")


def fail_at_the_third(engine, *arguments):
    found = generate(engine, *arguments)
    if os.environ["RANK"] == failing and len(engine.threads) == 3:
        raise EngineError("sampling with weights 1: the server went away")
    return found


CopyEngine.generate = fail_at_the_third
run.build_engine = lambda recipe, needs, shell, renderer, tokenizer, *_: CopyEngine(shell, renderer, tokenizer)
for path in sys.argv[1:]:
    recipe = load_recipe(path, [], {name: cls.Config for name, cls in METHODS.items()})
    try:
        run.train(recipe, resume="auto")
    except EngineError as error:
        print(f"rank {os.environ['RANK']}: {error}", flush=True)
