"""GRPO on pictures, ours and stock TRL in turn on the same rows: speed, memory, equality.

    python bench/picture_speed.py                            eight completions of a picture, and one each of eight
    python bench/picture_speed.py gemma3 --groups 8 --memory     one family, with peak memory, a process for each side
    python bench/picture_speed.py --frozen                   tower and projector are not trained
    python bench/picture_speed.py --check                    equality alone, of tiny models; ends with 1 without it

Speed is the median over repeats of the ratio of CPU seconds of forward and backward, on one thread. Memory is the peak
above model and gradients, in MiB. Models are built from a config, all with the same language model of 8 layers.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import gradients, in_a_fresh_process, interleaved, peak_memory, quiet, ratio, relative_difference, show
from PIL import Image
from speed_sides import advantages_of, grpo_trainer, our_policy
from transformers import AutoModelForImageTextToText

from posttrain.data.picture_text import PicturedEncoder, PictureText
from posttrain.data.pictures import mark, take_in
from posttrain.data.sample import Origin, Sample
from posttrain.models.eyes import open_eyes, parts

_spec = importlib.util.spec_from_file_location(
    "tiny_vlms", Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "tiny_vlms.py"
)
vlms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vlms)

SIDES = {"qwen2_5_vl": 128, "qwen3_vl": 128, "gemma3": 128, "idefics3": 64, "llava_onevision": 32}
"""Pixels of a picture or tile: 256 tokens, or 320 and 144 of several tiles."""

QUESTION, COMPLETION, VOCABULARY = 32, 64, 32_000

TOLERANCE = 1e-4
"""Largest relative difference of loss and gradients."""

EVERYTHING = ["language", "projector", "tower"]


class Case:
    """`prompts` pictures with a question, `group` completions of each."""

    def __init__(self, family: str, group: int, options: argparse.Namespace) -> None:
        side = SIDES[family]
        size = vlms.Size(256, 8, 8, 4, vision=128, vision_layers=4, side=side, vocab=VOCABULARY)
        self.config, self.processor = vlms.FAMILIES[family](vlms.TINY if options.check else size)
        self.prompts, self.group, self.frozen = 8 // group, group, options.frozen
        random, generator = np.random.RandomState(0), torch.Generator().manual_seed(0)
        pixels = random.randint(0, 255, (self.prompts, side, side, 3), dtype=np.uint8)
        self.images = [Image.fromarray(each) for each in pixels for _ in range(group)]
        text, tokens = self.config.get_text_config(), len(self.processor.tokenizer)
        shape, first = (8, COMPLETION), 4 if options.check else tokens
        self.completions = torch.randint(first, text.vocab_size if first > 4 else 40, shape, generator=generator)

    def model(self) -> Any:
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(self.config, dtype=torch.float32).train()

    def step(self, side: str, model: Any) -> Callable[[], torch.Tensor]:
        loss = self.ours(model) if side == "ours" else self.trl(model)

        def run() -> torch.Tensor:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            value = loss()
            value.backward()
            return value.detach()

        return run

    def ours(self, model: Any) -> Callable[[], torch.Tensor]:
        tokenizer = self.processor.tokenizer
        tokenizer.pictures = PictureText(self.processor, self.config.image_token_id)
        encoder = PicturedEncoder(tokenizer, tokenizer.pictures)
        open_eyes(model, tokenizer.pictures, tokenizer.pad_token_id, ["language"] if self.frozen else EVERYTHING)
        samples = []
        for image, completion in zip(self.images, self.completions.tolist(), strict=True):
            prompt = encoder.encode(mark(take_in(image, None, "bench")) + "a" * QUESTION)
            samples.append(Sample(prompt + completion, [0] * len(prompt) + [1] * COMPLETION, Origin.POLICY))
        return our_policy(model, None, samples, False)[0]

    def trl(self, model: Any) -> Callable[[], torch.Tensor]:
        if self.frozen:
            kept = {name for part in ("projector", "tower") for name in parts(model)[part]}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in kept)
        trainer = grpo_trainer(model, self.group, 8, False, self.processor)
        text, images = self.processor.image_token + "a" * QUESTION, [[image] for image in self.images]
        how = {"return_tensors": "pt", "return_mm_token_type_ids": True}
        made = dict(self.processor(text=[text] * 8, images=images, **how))
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in made:
                made[name] = torch.cat([made[name], torch.zeros_like(self.completions)], dim=1)
        ones = torch.ones_like(self.completions)
        inputs = {"prompt_ids": made.pop("input_ids"), "prompt_mask": made.pop("attention_mask"), **made}
        inputs |= {"completion_ids": self.completions, "completion_mask": ones, "num_images": [1] * 8}
        inputs |= {"advantages": advantages_of(8), "num_items_in_batch": ones.sum()}
        return lambda: trainer._compute_loss(model, inputs)


def measure(family: str, group: int, options: argparse.Namespace) -> tuple[list[str], bool]:
    """A row of the table, and whether both sides are equal."""
    case = Case(family, group, options)
    models = {side: case.model() for side in ("trl", "ours")}
    steps = {side: case.step(side, model) for side, model in models.items()}
    losses = {side: float(step()) for side, step in steps.items()}
    differs = relative_difference(gradients(models["ours"]), gradients(models["trl"]))
    apart = abs(losses["ours"] - losses["trl"]) / abs(losses["trl"])
    cells = [family, f"{case.prompts} x {group}", f"{apart:.1e}", f"{differs:.1e}"]
    if not options.check:
        times = interleaved(steps, options.repeats)
        medians = [f"{sorted(times[side]['cpu'])[options.repeats // 2]:.2f}" for side in ("trl", "ours")]
        cells += [*medians, f"{ratio(times, 'trl', 'ours'):.2f}"]
    if options.memory:
        command = [__file__, family, "--groups", str(group), *["--frozen"] * options.frozen, "--peak-of"]
        freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        peaks = [in_a_fresh_process([*command, side], **freed) for side in ("trl", "ours")]
        cells.append(f"{peaks[0]:.0f} / {peaks[1]:.0f} = {peaks[0] / peaks[1]:.1f}")
    return cells, max(apart, differs) <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(SIDES))
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--repeats", type=int, default=7)
    for flag in ("frozen", "memory", "check"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.peak_of:
        case = Case(options.families[0], options.groups[0], options)
        show(peak_memory(case.step(options.peak_of, case.model())))
        return 0
    print(
        "| family | pictures x completions | loss differs | gradient differs | TRL s | ours s | speed | memory, MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    equal = True
    for family in options.families:
        for group in options.groups:
            cells, same = measure(family, group, options)
            print(f"| {' | '.join(cells + ['-'] * (8 - len(cells)))} |", flush=True)
            equal &= same
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
