"""Forward and backward over episodes of eight turns: what their rows have in common once (a tree), against whole rows.

    python bench/turn_tree.py                    all workloads of the 25m model
    python bench/turn_tree.py turns --size 1m
    python bench/turn_tree.py --check            equality alone; ends with 1 where a difference is too large

Both sides run the same scoring pass, one of them without sharing; micro-batches are of eight rows on both. The factor
is the median ratio of CPU seconds, in turn, on one thread; the gradients' difference is relative to their size.
`turns`: each turn of two episodes is a row, scored on its action. `cuts`: eight continuations of one trace, each from
behind another of its turns. `group`: eight episodes of one world that take one of two actions at each turn and are
answered alike. `prompt`: eight episodes with the prompt in common alone. `apart`: nothing in common.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from common import FIRST, PAD, SIZES, gradients, interleaved, model_of, quiet, ratio, relative_difference

from posttrain.data.sample import Origin, Sample
from posttrain.models.collate import collate, split
from posttrain.models.token_logps import prepare, token_logps

PROMPT, ACTION, OBSERVATION, TURNS = 128, 24, 48, 8
TOLERANCE = 1e-4


def row(parts: list[list[int]], trained: set[int]) -> Sample:
    """Of parts, some of which are trained on."""
    mask = [int(number in trained) for number, part in enumerate(parts) for _ in part]
    return Sample([token for part in parts for token in part], mask, Origin.POLICY)


def workload(name: str, vocab: int) -> list[Sample]:
    """Its rows; random tokens."""
    draw = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(FIRST, vocab) for _ in range(n)]

    def episode(prompt: list[int], actions: int, known: dict[tuple[int, ...], list[list[int]]]) -> list[list[int]]:
        """Prompt and turns, each action one of so many; what an action is and is answered depends on all before it."""
        parts, taken = [prompt], ()
        for _ in range(TURNS):
            taken = (*taken, draw.randrange(actions))
            if taken not in known:
                known[taken] = [tokens(ACTION), tokens(OBSERVATION)]
            parts += known[taken]
        return parts[:-1]

    prompt, known, places = tokens(PROMPT), {}, range(1, 2 * TURNS, 2)
    if name == "turns":
        episodes = [episode(tokens(PROMPT), 1, {}) for _ in range(2)]
        return [row(parts[: place + 1], {place}) for parts in episodes for place in places]
    if name == "cuts":
        trace = episode(prompt, 1, known)
        return [row([*trace[:place], tokens(ACTION)], {place}) for place in places]
    if name == "group":
        return [row(episode(prompt, 2, known), set(places)) for _ in range(8)]
    return [row(episode(prompt if name == "prompt" else tokens(PROMPT), 1, {}), set(places)) for _ in range(8)]


WORKLOADS = ("turns", "cuts", "group", "prompt", "apart")


def step(model: torch.nn.Module, rows: list[Sample], *, packs: bool) -> Callable[[], None]:
    """Forward and backward over micro-batches of eight rows."""
    batches = [collate([rows[i] for i in part], PAD) for part in split(rows, 8, packs=packs)]

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            logps = token_logps(model, batch["ids"], batch["attention_mask"], batch["mask"]).logps
            (-(logps * batch["mask"]).sum() / len(rows)).backward()

    return run


def compare(name: str, size: str, repeats: int) -> tuple[float, float]:
    """The factor, and the relative difference of the gradients."""
    tree, plain = model_of(size), model_of(size)
    prepare(tree)
    with patch("posttrain.models.proof.sharing_obstacle", lambda model: "the other side of a benchmark"):
        prepare(plain)
    rows = workload(name, SIZES[size][0])
    sides = {"tree": step(tree, rows, packs=True), "rows": step(plain, rows, packs=False)}
    for run in sides.values():
        run()
    differs = relative_difference(gradients(tree), gradients(plain))
    return (ratio(interleaved(sides, repeats), "rows", "tree") if repeats else 1.0), differs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, help=", ".join(WORKLOADS))
    parser.add_argument("--size", default="25m", choices=[size for size in SIZES if size != "smollm2"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    wrong = False
    for name in given.workloads:
        factor, differs = compare(name, given.size, 0 if given.check else given.repeats)
        wrong |= differs > TOLERANCE
        speed = "" if given.check else f"tree against rows {factor:.2f}x, "
        print(f"{name:8} {given.size:5} {speed}gradients differ by {differs:.1e}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
