"""Tokenizers from a path, from the Hub, or made here for `model.init`. Imports without torch and transformers.

No remote code unless asked.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from posttrain.config.adapters import resolved
from posttrain.config.foreign_files import check_files, read_json
from posttrain.config.schema import ModelConfig, TokenizerInit
from posttrain.data.template_bounds import bound_templates
from posttrain.errors import ModelError
from posttrain.models.chat_template import set_template
from posttrain.models.start_files import unloadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Ids 0 to 3 of every tokenizer made here."""

TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges.txt")
"""Files of which a folder with a tokenizer has at least one."""

PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \n"


def looks_local(path: str) -> bool:
    """Whether a model path means a folder on this machine: it exists, or is no `owner/name` or `name` of the Hub."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not folder.exists():
        parent = folder.parent if folder.parent.exists() else Path(".")
        names = sorted(p.name for p in parent.iterdir() if p.is_dir())
        close = difflib.get_close_matches(folder.name, names, n=1)
        hint = f"did you mean {str(parent / close[0])!r}?" if close else "give a folder made by save_pretrained"
        raise ModelError(f"no model folder {path!r}", where="model.path", hint=hint)
    if not (folder / "config.json").exists():
        raise ModelError(
            f"{path!r} holds no config.json, so it is no Hugging Face model folder",
            where="model.path",
            hint="a run's trained model is in its `model` folder",
        )
    check_files(folder)
    if not [file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_")]:
        raise ModelError(
            f"{path!r} holds no safetensors weights; pickled weights are not loaded",
            where="model.path",
            hint="convert it with model.save_pretrained(folder, safe_serialization=True)",
        )


def _check_type(file: Path) -> None:
    """Refuse a model of a type that neither transformers nor code beside it knows."""
    from transformers import CONFIG_MAPPING

    settings = read_json(file)
    kind = settings.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and "auto_map" not in settings:
        close = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=1)
        raise ModelError(
            f"model_type {kind!r} is none that transformers knows",
            where=str(file),
            hint=f"did you mean {close[0]!r}?" if close else "a newer transformers may know it",
        )


def load_tokenizer(
    config: ModelConfig, *, corpus: Iterable[str] | None = None, offline: bool = False
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. A missing pad token becomes the end token (masks never look at token values).

    Args:
        corpus: texts to learn a BPE vocabulary from; only for `model.init` with a bpe tokenizer.
        offline: use local files and the Hub cache only.

    Raises:
        ModelError: missing, without an end token, or a chat template that cannot be set (`models.chat_template`).
    """
    bound_templates()
    if config.pictures is not None:
        from posttrain.models.processor import bring_pictures, without_pictures

        tokenizer = _tokenizer(config, without_pictures(corpus), offline)
        bring_pictures(tokenizer, config, offline=offline)
    else:
        tokenizer = _tokenizer(config, corpus, offline)
    set_template(tokenizer, config)
    return tokenizer


def _tokenizer(config: ModelConfig, corpus: Iterable[str] | None, offline: bool) -> PreTrainedTokenizerBase:
    if config.init is not None:
        return build_tokenizer(config.init.tokenizer, corpus)
    from transformers import AutoTokenizer

    config = beside = resolved(config)  # an adapter's folder may hold the tokenizer that it was trained with
    if beside.adapter is not None and (Path(beside.adapter.path).expanduser() / "tokenizer_config.json").is_file():
        beside = beside.model_copy(update={"path": beside.adapter.path, "revision": None})
        check_files(Path(beside.path).expanduser())
    if looks_local(config.path):
        _check_folder(config.path)
        _check_type(Path(config.path) / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            beside.path,
            revision=beside.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=offline,
        )
    # Of tokenizers that cannot be, the package raises no narrower one, and transformers whatever it stumbles over.
    except Exception as error:
        if Path(beside.path).is_dir() and not any(any(Path(beside.path).glob(files)) for files in TOKENIZER_FILES):
            raise ModelError(
                f"{beside.path!r} holds a model and no tokenizer",
                where="model.path",
                hint="copy tokenizer.json and tokenizer_config.json from the model that it was made of",
            ) from error
        raise unloadable(config, error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.path!r} has no end token, so completions could not stop", where="model.path"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_embeddings(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        ModelError: the tokenizer has more tokens than the embedding matrix has rows.
    """
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {rows} embeddings", where="model.path"
        )


def build_tokenizer(config: TokenizerInit, corpus: Iterable[str] | None) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template; neither BOS nor EOS is added to text.

    Args:
        corpus: texts that a BPE vocabulary is learnt from; a character tokenizer ignores it.

    Raises:
        ModelError: a BPE vocabulary is asked for without a corpus.
    """
    from transformers import PreTrainedTokenizerFast

    backend = _character_backend(config) if config.type == "characters" else _bpe_backend(config, corpus)
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _character_backend(config: TokenizerInit) -> Tokenizer:
    characters = dict.fromkeys(PRINTABLE if config.alphabet is None else config.alphabet)
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _bpe_backend(config: TokenizerInit, corpus: Iterable[str] | None) -> Tokenizer:
    if corpus is None:
        raise ModelError(
            "a bpe tokenizer is learnt from the recipe's data, and there is none here",
            where="model.init.tokenizer",
            hint="give `data.prompts` or `data.completions`, or use `type: characters`",
        )
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return backend
