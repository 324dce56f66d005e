"""Sync, sampling and verification of two checkouts in turn: `python bench/two_trees.py BEFORE [AFTER] [--rounds 12]`.

Both trees run at once, each with a server of its own, started by its own launch/vllm_server.sh, and a trainer's side
that waits for its turn; then one round of each, A B B A, so that what else the machine does falls on both. Printed are
medians and the ratio after / before, by rounds. Needs vLLM; `--data` names a folder with humaneval.jsonl.gz, whose
solutions are verified in the sandbox.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

KEY, POSITIONS, CODE_ROWS = "a-key-of-this-bench", 256, 24
WORK = ("sync", "sampling", "math", "code")


def side(folder: Path, port: int, data: Path | None) -> None:
    """Serve the names of `WORK` from the standard input, with the tree of PYTHONPATH: seconds of each."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from posttrain.config import schema
    from posttrain.data.sample import Problem
    from posttrain.rollouts.engine import Sampling
    from posttrain.rollouts.vllm_client import VllmClient
    from posttrain.rollouts.vllm_server import ServedVllm
    from posttrain.rollouts.weight_sync import PolicyWeights
    from posttrain.verifiers.code import CodeVerifier
    from posttrain.verifiers.math import MathVerifier
    from posttrain.verifiers.pool import VerifierPool

    def section(verifier: type) -> Any:
        """The class of a verifier's section, which stood elsewhere once."""
        return getattr(verifier, "Config", None) or getattr(schema, f"{verifier.__name__}Config")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [[1, *(4 + (7 * i + 3 * j) % 90 for j in range(20))] for i in range(16)]
    client = VllmClient(f"http://127.0.0.1:{port}", api_key=KEY)
    weights = PolicyWeights(model, Accelerator(cpu=True))
    engine = ServedVllm(weights, prompts[:4], client=client, stop_ids=[2], max_batch=64, start_timeout=300.0)
    numbers = [Problem(str(n), "", f"#### {n}") for n in range(4000)]
    answers = [rf"so it is \boxed{{{n if n % 3 else n + 1}}}." for n in range(4000)]
    math = VerifierPool(
        [MathVerifier(section(MathVerifier)(type="math"))], schema.VerifierPoolConfig(workers=1, timeout=60.0)
    )
    rows = []
    if data is not None:
        with gzip.open(data / "humaneval.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:CODE_ROWS]
    tasks = [Problem(row["task_id"], row["prompt"], None, row) for row in rows]
    code = CodeVerifier(section(CodeVerifier)(type="code", timeout=30.0))
    coded = VerifierPool([code], schema.VerifierPoolConfig(workers=1, timeout=60.0)) if rows else None
    version = 0

    def work(name: str) -> None:
        nonlocal version
        if name == "sync":
            version += 1
            engine.sync(version)
        elif name == "sampling":
            engine.generate(prompts, Sampling(n=4, max_new_tokens=32, seed=version))
        elif name == "math":
            math.verify(numbers, answers)
        elif coded is not None:
            found = coded.verify(tasks, [row["canonical_solution"] for row in rows])
            assert all(verdict.status == "correct" for (verdict,) in found)

    for name in WORK:  # what is built at the first call
        work(name)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        started = time.perf_counter()
        work(line.strip())
        sys.stdout.write(f"{time.perf_counter() - started}\n")
        sys.stdout.flush()
    math.close()
    if coded is not None:
        coded.close()


class Tree:
    """A checkout at work: its server and its trainer's side."""

    def __init__(self, root: Path, model: Path, scratch: Path, data: Path | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(root), "PYTHON": sys.executable, "POSTTRAIN_VLLM_API_KEY": KEY}
        options = ["--dtype", "float32", "--max-model-len", str(POSITIONS), "--kv-cache-memory-bytes", str(128 << 20)]
        log = (scratch / f"server-{port}.log").open("w")
        command = [str(root / "launch" / "vllm_server.sh"), str(model), "--port", str(port), *options]
        how = {"stdout": log, "stderr": log, "env": environment, "start_new_session": True, "cwd": root}
        self.server = subprocess.Popen(command, **how)
        command = [sys.executable, __file__, "--side", str(model), str(port), *([str(data)] if data else [])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.side = subprocess.Popen(command, env=environment, cwd=root, **pipes)

    def ask(self, name: str) -> float:
        """Seconds of one piece of work."""
        self.side.stdin.write(f"{name}\n")
        self.side.stdin.flush()
        return float(self._said())

    def wait(self) -> None:
        """Until its side has done each piece of work once."""
        while self._said() != "ready":
            pass

    def end(self) -> None:
        """End both."""
        self.side.stdin.close()
        self.side.wait(60)
        self.server.terminate()
        self.server.wait(60)

    def _said(self) -> str:
        line: Any = self.side.stdout.readline()
        if not line:
            raise SystemExit("a side has ended; see its error above")
        return line.strip()


def make_model(folder: Path) -> None:
    """A random model of 19M parameters, 76 MB of weights a sync."""
    from posttrain.config.schema import ModelConfig
    from posttrain.models.loading import load_policy

    init = {"hidden_size": 384, "layers": 8, "heads": 6, "intermediate_size": 1536, "max_length": POSITIONS}
    model, tokenizer = load_policy(ModelConfig(init=init), seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["--side"]:
        side(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_model(model)
        trees = [Tree(root.resolve(), model, Path(scratch), options.data) for root in (options.before, options.after)]
        for tree in trees:
            tree.wait()
        found: dict[str, list[tuple[float, float]]] = {}
        for name in WORK[: None if options.data else -1]:
            for number in range(options.rounds):
                order = (0, 1) if number % 2 else (1, 0)
                seconds = {which: trees[which].ask(name) for which in order}
                found.setdefault(name, []).append((seconds[0], seconds[1]))
        for tree in trees:
            tree.end()
    for name, pairs in found.items():
        ratios = sorted(after / before for before, after in pairs)
        medians = [median(column) for column in zip(*pairs, strict=True)]
        middle = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"{name:9} {medians[0]:.3f} s before, {medians[1]:.3f} after; by {len(pairs)} pairs {median(ratios):.3f}, "
            f"middle half {middle[0]:.3f} to {middle[1]:.3f}"
        )


if __name__ == "__main__":
    main()
