"""Rows of files to token ids with a loss mask: posttrain beside TRL's SFTTrainer, on the same rows, in CPU seconds.

    python bench/data_speed.py --rows 20000 --pairs 3

Both read the same JSON Lines file and make the same token ids: as text with a completion, as chat messages with a
completion, and as whole conversations of two turns. Each measurement is a process of its own, one thread, and the two
sides take turns. Counted are CPU seconds from before the file is opened until the rows can be trained on; for TRL that
includes the Arrow tables it writes, which the next start reads again in place of rendering. posttrain writes none: it
renders again, or as steps need the rows (`data.streaming`).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import SMOLLM2, in_a_fresh_process, show

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Tells TRL which turns are replies."""
FORMS = ("text", "chat", "conversation")
WORDS = 230
"""Words of a row, which are some 300 tokens."""


def make_rows(file: Path, form: str, number: int) -> None:
    """Rows of one form, drawn from the pages of this project."""
    pages = sorted((Path(__file__).resolve().parents[1] / "docs").rglob("*.md"))
    words, draw = " ".join(page.read_text(encoding="utf-8") for page in pages).split(), random.Random(0)

    def text(size: int) -> str:
        start = draw.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(number):
            out.write(json.dumps(_row(form, text)) + "\n")


def _row(form: str, text: Callable[[int], str]) -> dict[str, Any]:
    if form == "text":
        return {"prompt": text(WORDS // 2), "completion": " " + text(WORDS // 2)}
    turns = 2 if form == "chat" else 4
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text(WORDS // turns)} for turn in range(turns)]
    return {"messages": messages} if form == "conversation" else {"prompt": messages[:1], "completion": messages[1:]}


def ours(file: Path, form: str, tokenizer: Any) -> dict[str, float]:
    """Rows as posttrain trains on them."""
    from posttrain.config.schema import FileSource
    from posttrain.data.rendering import Renderer
    from posttrain.data.sources import examples
    from posttrain.data.truncation import fit_samples

    renderer = Renderer(tokenizer)
    started = time.process_time()
    samples = [s for row in examples(FileSource(path=str(file)), "rows") for s in renderer.samples(row)]
    fitted, _ = fit_samples(samples, None, 4096)
    seconds = time.process_time() - started
    trained = sum(sum(sample.loss_mask) for sample in fitted)
    return {"seconds": seconds, "tokens": sum(len(sample.ids) for sample in fitted), "trained": trained}


def trl(file: Path, form: str, tokenizer: Any) -> dict[str, float]:
    """Rows as TRL's trainer prepares them."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    own = {"assistant_only_loss": True} if form == "conversation" else {"completion_only_loss": True}
    config = SFTConfig(output_dir=str(file.parent / "out"), max_length=4096, report_to="none", use_cpu=True, **own)
    started = time.process_time()
    rows = load_dataset("json", data_files=str(file), cache_dir=str(file.parent / "cache"), split="train")
    rows = SFTTrainer(small, config, train_dataset=rows, processing_class=tokenizer).train_dataset
    seconds = time.process_time() - started
    trained = sum(label != -100 for labels in rows["labels"] for label in labels)
    return {"seconds": seconds, "tokens": sum(map(len, rows["input_ids"])), "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokenizer", type=Path, default=SMOLLM2, help="folder of one")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side, in turn")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        from transformers import AutoTokenizer

        file, tokenizer = Path(options.side[1]), AutoTokenizer.from_pretrained(options.tokenizer)
        tokenizer.chat_template = None if file.stem == "text" else TEMPLATE
        show({"posttrain": ours, "trl": trl}[options.side[0]](file, file.stem, tokenizer))
        return
    with tempfile.TemporaryDirectory(prefix="data-speed-") as folder:
        for form in FORMS:
            make_rows(Path(folder) / f"{form}.jsonl", form, options.rows)
            _compare(Path(folder) / f"{form}.jsonl", options)


def _compare(file: Path, options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {"posttrain": [], "trl": []}
    for _ in range(options.pairs):
        for side, runs in found.items():
            with tempfile.TemporaryDirectory(prefix="hf-") as home:
                command = [__file__, "--side", side, str(file), "--tokenizer", str(options.tokenizer)]
                runs.append(in_a_fresh_process(command, HF_HOME=home, TOKENIZERS_PARALLELISM="false"))
            shutil.rmtree(file.parent / "cache", ignore_errors=True)
        print(f"  {file.stem}: " + ", ".join(f"{s} {r[-1]['seconds']:.1f} s" for s, r in found.items()), flush=True)
    ratios = [t["seconds"] / o["seconds"] for o, t in zip(found["posttrain"], found["trl"], strict=True)]
    one, other = found["posttrain"][0], found["trl"][0]
    counts = ", ".join(f"{name} {one[name]:,} and {other[name]:,}" for name in ("tokens", "trained"))
    rates = [options.rows / statistics.median(run["seconds"] for run in runs) for runs in found.values()]
    print(
        f"{file.stem}: {counts}; rows per CPU second: posttrain {rates[0]:.0f}, TRL {rates[1]:.0f}; TRL's seconds over "
        f"posttrain's: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
