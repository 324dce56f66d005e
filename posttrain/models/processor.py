"""The processor of a vision-language model, for its pictures alone, and the tokenizer that brings it.

transformers' processors of most families want a processor of videos beside that of pictures, and that one wants
torchvision, which the CPU builds of PyTorch do not go with. Pictures need neither: their processors have a form on
Pillow, which is taken everywhere, so that a picture is the same on every machine. So the processor is put together
here, of the tokenizer, the processor of pictures and its own settings. Imports without torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from posttrain.config.adapters import resolved
from posttrain.config.foreign_files import read_json
from posttrain.config.pictures import TowerInit
from posttrain.config.schema import ModelConfig
from posttrain.data.encoding import unmarked
from posttrain.data.picture_text import PictureText
from posttrain.errors import ModelError, StackError
from posttrain.models.start_files import load_config, start_file, unloadable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

OLDEST = Version("5.19")
"""Version of transformers whose models take what was seen of pictures apart from the pictures."""

FILES = ("chat_template.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Of a processor."""

SPECIAL = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
"""Tokens that a tokenizer made here gets for pictures."""


def bring_pictures(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, *, offline: bool = False) -> None:
    """Let a tokenizer bring what writes pictures, as `pictures`, for a model that reads them.

    A template that only the processor has becomes the tokenizer's.

    Args:
        config: with `pictures`.
        offline: use local files and the Hub cache only.

    Raises:
        StackError: transformers is too old.
        ModelError: the model is none of text and pictures, or its processor cannot be put together.
    """
    assert config.pictures is not None
    import transformers

    if Version(transformers.__version__) < OLDEST:
        raise StackError(
            f"pictures need transformers {OLDEST} or newer, and here is {transformers.__version__}",
            where="model.pictures",
            hint=f"pip install 'transformers>={OLDEST}'",
        )
    if config.init is not None:
        tokenizer.add_special_tokens({"extra_special_tokens": [*SPECIAL]})
        processor, token = _made(tokenizer, config.pictures.init), tokenizer.convert_tokens_to_ids("<image>")
    else:
        config = resolved(config)
        settings = _settings(config, offline)
        if tokenizer.chat_template is None and settings.get("chat_template"):
            tokenizer.chat_template = settings["chat_template"]

        known = load_config(config)
        token = getattr(known, "image_token_id", None)
        if not isinstance(token, int):
            raise _no_pictures(config, known)
        processor = _loaded(config, known, tokenizer, settings, offline)
    if not 0 <= token < len(tokenizer) or not getattr(processor, "image_token", None):
        raise ModelError(
            f"the token of pictures ({token}) of {config.path!r} is none of its tokenizer's", where="model.path"
        )
    tokenizer.pictures = PictureText(processor, token)


def without_pictures(corpus: Iterable[str] | None) -> Iterable[str] | None:
    """Texts to learn a vocabulary from, without the marks of their pictures."""
    return None if corpus is None else map(unmarked, corpus)


def _no_pictures(config: ModelConfig, known: PretrainedConfig) -> ModelError:
    return ModelError(
        f"a model of type {known.model_type!r} reads no pictures",
        where="model.path",
        hint="take one of text and pictures (docs/pictures.md), or leave out `model.pictures` and `images`",
    )


def _settings(config: ModelConfig, offline: bool) -> dict[str, Any]:
    """What the files of a processor say beside the processors of its parts.

    All of its files are here afterwards, also those that are only copied with the trained model.
    """
    found: dict[str, Any] = {}
    try:
        files = {name: start_file(config, name, fetch=not offline) for name in FILES}
    except OSError as error:
        raise unloadable(config, error) from error
    for name in ("chat_template.json", "processor_config.json"):
        file = files[name]
        found |= {} if file is None else read_json(file)
    return found


def _loaded(
    config: ModelConfig,
    known: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    offline: bool,
) -> Any:
    from transformers import PROCESSOR_MAPPING, AutoImageProcessor

    kind = PROCESSOR_MAPPING.get(type(known), None)
    if kind is None:
        raise _no_pictures(config, known)
    try:
        images = AutoImageProcessor.from_pretrained(
            config.path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=offline,
            backend="pil",
        )
        # Its settings are sizes, factors and the like; whatever else stands in the file is not for it.
        wanted = inspect.signature(kind.__init__).parameters
        own = {name: value for name, value in settings.items() if name in wanted and not isinstance(value, dict)}
        own |= {"video_processor": None} if "video_processor" in wanted else {}
        own |= {"image_processor": images, "tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
        return images_only(kind)(**own)
    # A processor may want packages that are not here, and tokens that the tokenizer lacks.
    except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
        raise unloadable(config, error) from error


def images_only(kind: Any) -> Any:
    """The class of processors, with None taken for a processor of videos."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return type(None) if argument is None else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def _made(tokenizer: PreTrainedTokenizerBase, tower: TowerInit) -> Any:
    """The processor of a model that is made here, which scales every picture to one square."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    side = {"longest_edge": tower.image_size}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer, image_seq_len=tower.tokens)


def save_processor(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the processor of a model that was made here; that of another is copied from its start."""
    tokenizer.pictures.processor.save_pretrained(folder)
