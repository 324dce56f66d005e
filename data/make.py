"""Makes the small data sets of this folder: `python data/make.py`. The same files come out every time.

They are arithmetic with small numbers, written by the rules below: enough to see each form that posttrain reads, and to
run each recipe of recipes/data in a minute. They teach nothing worth knowing. README.md has a card for each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
Row = dict[str, Any]


def steps(a: int, b: int, c: int, slip: int = 0) -> list[str]:
    """The sum of three numbers in two steps; with `slip` the first one is wrong by that much."""
    first = a + b + slip
    return [f"{a}+{b}={first}", f"{first}+{c}={first + c}"]


def sums(seed: str, rows: int) -> Iterator[tuple[random.Random, int, int, int]]:
    draw = random.Random(seed)
    for _ in range(rows):
        yield draw, draw.randint(1, 30), draw.randint(1, 30), draw.randint(1, 9)


def conversations(rows: int = 160) -> Iterator[Row]:
    """OpenAI's form: a question, its answer, and a second question about the result; every eighth answer is wrong and
    has weight 0."""
    for number, (draw, a, b, c) in enumerate(sums("conversations", rows)):
        slip = draw.choice([1, 2]) if number % 8 == 7 else 0
        reply: Row = {"role": "assistant", "content": str(a + b + slip)} | ({"weight": 0} if slip else {})
        follow = "no, again" if slip else f"and {c} more?"
        last = str(a + b) if slip else str(a + b + c)
        yield {
            "messages": [
                {"role": "system", "content": "Answer with a number."},
                {"role": "user", "content": f"{a} plus {b}?"},
                reply,
                {"role": "user", "content": follow},
                {"role": "assistant", "content": last},
            ]
        }


def tools(rows: int = 80) -> Iterator[Row]:
    """The assistant calls a function and reads its answer out."""
    number = {"type": "number"}
    schema = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
    add = {"type": "function", "function": {"name": "add", "description": "Adds two numbers.", "parameters": schema}}
    for _, a, b, _ in sums("tools", rows):
        call = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": a, "b": b})}}
        yield {
            "messages": [
                {"role": "user", "content": f"{a} plus {b}?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "name": "add", "content": str(a + b)},
                {"role": "assistant", "content": f"It is {a + b}."},
            ],
            "tools": [add],
        }


def sharegpt(rows: int = 80) -> Iterator[Row]:
    for _, a, b, _ in sums("sharegpt", rows):
        yield {
            "conversations": [{"from": "human", "value": f"{a} plus {b}?"}, {"from": "gpt", "value": str(a + b)}],
            "system": "Answer with a number.",
        }


def instructions(rows: int = 160) -> Iterator[Row]:
    """Alpaca's form."""
    for _, a, b, c in sums("instructions", rows):
        yield {"instruction": "Add the numbers.", "input": f"{a} {b} {c}", "output": ";".join(steps(a, b, c))}


def pairs(rows: int = 160) -> Iterator[Row]:
    """A right chain and one with a slip in its first step."""
    for draw, a, b, c in sums("pairs", rows):
        wrong = steps(a, b, c, draw.choice([-2, -1, 1, 2]))
        yield {"prompt": f"{a}+{b}+{c}", "chosen": " " + ";".join(steps(a, b, c)), "rejected": " " + ";".join(wrong)}


def unpaired(rows: int = 160) -> Iterator[Row]:
    """One chain, right or not, with a label."""
    for draw, a, b, c in sums("unpaired", rows):
        slip = draw.choice([0, 0, 1, -1])
        yield {"prompt": f"{a}+{b}+{c}", "completion": " " + ";".join(steps(a, b, c, slip)), "label": slip == 0}


def stepwise(rows: int = 160) -> Iterator[Row]:
    """Chains whose steps are labelled each by itself: a step that follows a slip is right if it adds rightly."""
    for draw, a, b, c in sums("stepwise", rows):
        slip = draw.choice([0, 0, 1, -1])
        yield {"prompt": f"{a}+{b}+{c}", "completions": steps(a, b, c, slip), "labels": [slip == 0, True]}


def prompts(rows: int = 160) -> Iterator[Row]:
    """Questions with their gold answers, for rollouts and a verifier."""
    for _, a, b, c in sums("prompts", rows):
        yield {"question": f"{a}+{b}+{c}=", "answer": f"adding from the left #### {a + b + c}"}


def solutions(rows: int = 80) -> Iterator[Row]:
    """Questions with a written solution: `posttrain prepare traces data/solutions.yaml` makes traces of them."""
    for _, a, b, c in sums("solutions", rows):
        yield {"question": f"{a}+{b}+{c}=", "solution": ";".join(steps(a, b, c)), "answer": str(a + b + c)}


def episodes(rows: int = 80) -> Iterator[Row]:
    """Trajectories of an agent that looks for a number by halves, in the form of `posttrain play --out`."""
    rules = "Find my number from 1 to 30. I say higher, lower or right. Answer with a number."
    for index, (draw, *_) in enumerate(sums("episodes", rows)):
        number, low, high = draw.randint(1, 30), 1, 30
        turns: list[Row] = []
        while not turns or not turns[-1]["done"]:
            guess = (low + high) // 2
            right = guess == number
            said = "right" if right else "higher" if number > guess else "lower"
            low, high = (guess + 1, high) if number > guess else (low, guess - 1)
            step = {"observation": said, "reward": float(right), "done": right, "success": right or None}
            turns.append({"action": str(guess)} | step | {"valid": True})
        talk = [{"role": "user", "content": rules}]
        for turn in turns:
            talk += [{"role": "assistant", "content": turn["action"]}, {"role": "user", "content": turn["observation"]}]
        yield {
            "problem": {"id": f"guess/{index}", "prompt": rules, "meta": {"number": number}},
            "sample": 0,
            "seed": index,
            "opening": rules,
            "messages": talk[:-1],
            "turns": turns,
            "prompt_ids": [],
            "stop": "done",
            "detail": "",
            "return": 1.0,
            "outcome": 1.0,
        }


SETS = (conversations, tools, sharegpt, instructions, pairs, unpaired, stepwise, prompts, solutions, episodes)


def main() -> None:
    for make in SETS:
        lines = [json.dumps(row) + "\n" for row in make()]
        (FOLDER / f"{make.__name__}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{make.__name__}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
