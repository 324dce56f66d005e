"""Rows of files to token ids with a loss mask: posttrain beside TRL's SFTTrainer, on the same rows, in CPU seconds.

    python bench/data_speed.py --rows 20000 --pairs 3

Both read the same JSON Lines file and make the same token ids: as text with a completion, as chat messages with a
completion, and as whole conversations of two turns. Each measurement is a process of its own, one thread, and the two
sides take turns. Counted are user and system seconds from before the file is opened until the rows can be trained on;
for TRL that includes the Arrow tables it writes, which the next start reads again in place of rendering. posttrain
writes none: it renders again, or as steps need the rows (`data.streaming`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORMS = ("text", "chat", "conversation")
WORDS = 230
"""Words of a row, which are some 300 tokens."""


def corpus() -> list[str]:
    """The pages of this project, as text that a tokenizer is learnt from and rows are drawn from."""
    root = Path(__file__).resolve().parents[1]
    return [path.read_text(encoding="utf-8") for path in sorted((root / "docs").rglob("*.md"))]


def make_tokenizer(folder: Path, given: Path | None = None) -> None:
    """A byte-level BPE tokenizer, or the given one, with a chat template that tells TRL which turns are replies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if given is not None:
        known = AutoTokenizer.from_pretrained(given)
        known.chat_template = TEMPLATE
        known.save_pretrained(folder)
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_rows(file: Path, form: str, number: int) -> None:
    """Rows of one form."""
    words, draw = " ".join(corpus()).split(), random.Random(0)

    def text(size: int) -> str:
        start = draw.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(number):
            out.write(json.dumps(_row(form, text)) + "\n")


def _row(form: str, text) -> dict:
    def user(size: int) -> dict:
        return {"role": "user", "content": text(size)}

    def reply(size: int) -> dict:
        return {"role": "assistant", "content": text(size)}

    if form == "text":
        return {"prompt": text(WORDS // 2), "completion": " " + text(WORDS // 2)}
    if form == "chat":
        return {"prompt": [user(WORDS // 2)], "completion": [reply(WORDS // 2)]}
    quarter = WORDS // 4
    return {"messages": [user(quarter), reply(quarter), user(quarter), reply(quarter)]}


def ours(file: Path, form: str, tokenizer: Path) -> int:
    """Rows as posttrain trains on them; the number of tokens."""
    from transformers import AutoTokenizer

    from posttrain.config.schema import FileSource
    from posttrain.data.rendering import Renderer
    from posttrain.data.sources import examples
    from posttrain.data.truncation import fit_samples

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if form == "text":
        loaded.chat_template = None
    renderer = Renderer(loaded)
    seconds = _used()
    samples = [s for row in examples(FileSource(path=str(file)), "rows") for s in renderer.samples(row)]
    fitted, _ = fit_samples(samples, None, 4096)
    return _report(seconds, sum(len(sample.ids) for sample in fitted), sum(sum(s.loss_mask) for s in fitted))


def trl(file: Path, form: str, tokenizer: Path) -> int:
    """Rows as TRL's trainer prepares them; the number of tokens."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if form == "text":
        loaded.chat_template = None
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **sizes))
    config = SFTConfig(
        output_dir=str(file.parent / "out"),
        max_length=4096,
        assistant_only_loss=form == "conversation",
        completion_only_loss=None if form == "conversation" else True,
        report_to="none",
        use_cpu=True,
    )
    seconds = _used()
    rows = load_dataset("json", data_files=str(file), cache_dir=str(file.parent / "cache"), split="train")
    trainer = SFTTrainer(small, config, train_dataset=rows, processing_class=loaded)
    used = _used() - seconds
    rows = trainer.train_dataset
    tokens = sum(len(ids) for ids in rows["input_ids"])
    return _report(_used() - used, tokens, sum(label != -100 for labels in rows["labels"] for label in labels))


def _used() -> float:
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return mine.ru_utime + mine.ru_stime


def _report(started: float, tokens: int, trained: int) -> int:
    print(json.dumps({"seconds": _used() - started, "tokens": tokens, "trained": trained}))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokenizer", type=Path, help="folder of one; default: a BPE tokenizer learnt from docs/")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side, in turn")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, form, folder = options.side
        {"posttrain": ours, "trl": trl}[side](Path(folder) / f"{form}.jsonl", form, Path(folder) / "tokenizer")
        return
    with tempfile.TemporaryDirectory(prefix="data-speed-") as folder:
        make_tokenizer(Path(folder) / "tokenizer", options.tokenizer)
        for form in FORMS:
            make_rows(Path(folder) / f"{form}.jsonl", form, options.rows)
            _compare(form, folder, options)


def _compare(form: str, folder: str, options: argparse.Namespace) -> None:
    found: dict[str, list[dict]] = {"posttrain": [], "trl": []}
    for number in range(options.pairs):
        for side, runs in found.items():
            with tempfile.TemporaryDirectory(prefix="hf-") as home:
                environment = os.environ | {"HF_HOME": home, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
                command = [sys.executable, __file__, "--side", side, form, folder]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
            cache = Path(folder) / "cache"
            if cache.exists():
                subprocess.run(["rm", "-r", str(cache)], check=True)
        print(f"  {form}, pair {number + 1}: " + ", ".join(f"{s} {r[-1]['seconds']:.1f} s" for s, r in found.items()))
    ratios = [t["seconds"] / o["seconds"] for o, t in zip(found["posttrain"], found["trl"], strict=True)]
    one, other = found["posttrain"][0], found["trl"][0]
    same = "the same tokens" if one["tokens"] == other["tokens"] else f"tokens {one['tokens']} and {other['tokens']}"
    same += ", the same trained" if one["trained"] == other["trained"] else f", {one['trained']}/{other['trained']}"
    rates = [options.rows / statistics.median(run["seconds"] for run in runs) for runs in found.values()]
    print(f"{form}: {one['tokens'] / options.rows:.0f} tokens a row, {same}; rows per CPU second: ", end="")
    print(f"posttrain {rates[0]:.0f}, TRL {rates[1]:.0f}; TRL's seconds over posttrain's: ", end="")
    print(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
