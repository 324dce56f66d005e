"""Time and memory of a divergence from a teacher over a large vocabulary, beside TRL's on the same rows.

    python bench/distillation.py [--vocabulary 49152] [--rows 8] [--tokens 256] [--prompt 64] [--repeats 3]

Each side is a process of its own: forward of student and teacher, the generalised JSD (beta 0.5) over the completions,
backward. Ours goes through the tiled head; TRL's is what `GKDTrainer.compute_loss` does: logits of all tokens of both
models, then `generalized_jsd_loss` with labels. Same weights, same rows, no optimizer. Prints CPU seconds (the
median), the growth of the peak of resident memory over what models, their gradients and libraries take (a few tokens
went through before), and by how much loss and gradient differ.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.models.reference import Reference
from posttrain.models.token_logps import prepare, token_logps_and_divergence
from posttrain.objectives.next_token import generalised_jsd

BETA = 0.5


def model(seed: int, vocabulary: int) -> LlamaForCausalLM:
    """Two layers of width 256 and a large vocabulary: the head is most of the work."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape))


def ours(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: torch.Tensor, prompt: int
) -> Callable[[], torch.Tensor]:
    """The loss of opd with `objective: full`."""
    for each in (student, teacher):
        prepare(each)
    reference, attending = Reference(teacher.eval()), torch.ones_like(ids)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, prompt:] = True

    def loss() -> torch.Tensor:
        states = reference.token_states(ids, attending, mask)
        found = token_logps_and_divergence(
            student, ids, attending, mask, states, lambda own, other: generalised_jsd(own, other, BETA), entropy=True
        )
        return found[2].sum() / mask.sum()

    return loss


def trls(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: torch.Tensor, prompt: int
) -> Callable[[], torch.Tensor]:
    """The loss of TRL's GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer

    teacher.eval()
    labels = ids.clone()
    labels[:, :prompt] = -100

    def loss() -> torch.Tensor:
        own = student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with torch.no_grad():
            other = teacher(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        shifted, wanted = [logits[:, :-1, :] for logits in (own, other)], labels[:, 1:]
        n = int((wanted != -100).sum())
        return GKDTrainer.generalized_jsd_loss(*shifted, labels=wanted, beta=BETA, num_items_in_batch=n)

    return loss


def measure(side: str, vocabulary: int, rows: int, tokens: int, prompt: int, repeats: int) -> dict[str, float]:
    """Of this process."""
    student, teacher = model(0, vocabulary), model(1, vocabulary).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocabulary, (rows, prompt + tokens), generator=generator)
    loss = {"ours": ours, "trl": trls}[side](student, teacher, ids, prompt)
    {"ours": ours, "trl": trls}[side](student, teacher, ids[:1, : prompt + 1], prompt)().backward()
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats):
        student.zero_grad()
        started = time.process_time()
        found = loss()
        found.backward()
        seconds.append(time.process_time() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    norm = torch.cat([p.grad.flatten() for p in student.parameters()]).norm()
    return {
        "seconds": statistics.median(seconds),
        "mebibytes": grown / 1024,
        "loss": float(found.detach()),
        "gradient_norm": float(norm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"vocabulary": 49152, "rows": 8, "tokens": 256, "prompt": 64, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=["ours", "trl"])
    given = vars(parser.parse_args())
    side = given.pop("side")
    if side is not None:
        print(json.dumps(measure(side, **given)))
        return
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items())]
    found = {}
    for each in ("ours", "trl"):
        done = subprocess.run([*command, "--side", each], check=True, capture_output=True, text=True)
        found[each] = json.loads(done.stdout.splitlines()[-1])
        print(each, found[each])
    for name in ("seconds", "mebibytes", "loss", "gradient_norm"):
        print(f"trl / ours, {name}: {found['trl'][name] / found['ours'][name]:.4f}")


if __name__ == "__main__":
    main()
