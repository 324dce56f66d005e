"""What a recipe has done on this machine and beyond it, in words: whose code runs, who gets what. Runs none of it.

A recipe is a program: whoever trains by it trusts it as much as a script. `posttrain check` is for reading one first.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from posttrain.config.loading import load_config
from posttrain.config.own_code import find_file
from posttrain.config.plugins import digest
from posttrain.config.registered import RegisteredSection
from posttrain.config.schema import (
    BenchmarkFile,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    RolloutConfig,
)
from posttrain.config.teacher_server import TeacherServer
from posttrain.config.verifier import VerifierConfig
from posttrain.config.workers import WorkerSettings
from posttrain.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Trusted:
    """One thing that whoever runs a recipe trusts it with.

    Attributes:
        key: of the recipe.
        what: what a run does with it.
        code: whether it is code that the recipe brings, which `check` runs only if it is told to.
    """

    key: str
    what: str
    code: bool = False


def trusted(config: BaseModel | Sequence[BaseModel], folder: Path, *, path: str = "") -> list[Trusted]:
    """What one trusts by running a recipe, or what another file says, most powerful first.

    Args:
        config: a recipe, an evaluation, the settings of a stage, ...; whatever stands in it is looked at.
        folder: its own, from which paths of plugins are taken.
        path: of the config, if it stands in another.

    Raises:
        RecipeError: a plugin is not there, or a file of benchmarks cannot be read.
    """
    sections = list(_sections(config, path))
    found = [each for path, section in sections for each in _code(path, section, folder)]
    found += [each for path, section in sections for each in _written_by_the_model(path, section)]
    found += [each for path, section in sections for each in _sent(path, section)]
    return list(dict.fromkeys(found))


def _sections(value: Any, path: str) -> Iterator[tuple[str, BaseModel]]:
    """All sections with their dotted paths, those of benchmarks in files of their own too."""
    if isinstance(value, BaseModel):
        yield path, value
        for name in type(value).model_fields:
            yield from _sections(getattr(value, name, None), f"{path}.{name}" if path else name)
        if isinstance(value, EvaluationConfig):
            for file in value.benchmarks:
                if isinstance(file, str) and file.endswith((".yaml", ".yml")):
                    yield from _sections(load_config(file, BenchmarkFile), file)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sections(item, path)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _sections(item, f"{path}.{name}")


def _code(path: str, section: BaseModel, folder: Path) -> Iterator[Trusted]:
    if isinstance(section, Recipe):
        yield from (_plugin(name, folder) for name in section.plugins)
    elif isinstance(section, ModelConfig) and section.trust_remote_code:
        what = f"runs the Python code in the repository of {section.path}"
        yield Trusted(f"{path}.trust_remote_code", what, code=True)
    elif isinstance(section, RegisteredSection):
        key = f"{path}.{section.type}" if isinstance(section, VerifierConfig) else path
        yield from (Trusted(key, f"runs {what}", code=True) for what in section.runs)


def _plugin(name: str, folder: Path) -> Trusted:
    try:
        place = str(find_file(name, folder)) if name.endswith(".py") or "/" in name else name
    except ValueError as error:
        raise RecipeError(str(error), where="plugins") from error
    return Trusted("plugins", f"runs {place} (sha256 {digest(place)[:12]})", code=True)


def _written_by_the_model(path: str, section: BaseModel) -> Iterator[Trusted]:
    if isinstance(section, VerifierConfig) and section.unboxed:
        what = "runs the code that the model writes with this user's files and network, for it has no sandbox"
        yield Trusted(f"{path}.{section.type}.isolation", what)


def _sent(path: str, section: BaseModel) -> Iterator[Trusted]:
    if isinstance(section, VerifierConfig):
        if section.sends_to is not None and not is_this_machine(section.sends_to[0]):
            what = f"sends problems, references and completions to {section.sends_to[0]}"
            yield Trusted(f"{path}.{section.type}", what + _key(*section.sends_to))
    elif isinstance(section, RolloutConfig):
        url = section.vllm.url
        if section.engine == "vllm" and section.mode == "server" and not is_this_machine(url):
            yield Trusted(f"{path}.vllm", f"sends prompts to {url}" + _key(url, section.vllm.api_key_env))
    elif isinstance(section, TeacherServer):
        if not is_this_machine(section.url):
            what = f"sends prompts and completions to {section.url}"
            yield Trusted(path, what + _key(section.url, section.api_key_env))
    elif isinstance(section, Recipe):
        if section.training.report_to:
            texts = ", prompts and completions of samples.jsonl" if section.tracking.send_samples else ""
            what = f"sends metrics and settings{texts} to {', '.join(section.training.report_to)}"
            yield Trusted("training.report_to", what)
        if section.training.push_to_hub:
            yield Trusted("training.push_to_hub", "uploads the model")
    if isinstance(section, WorkerSettings) and section.address is not None:
        key = f"{path}.address" if path else "address"
        yield Trusted(key, f"sends everything to the Ray cluster {section.address}, and runs there")


def _key(url: str, name: str | None) -> str:
    text = "" if name is None else f", with the key in ${name}"
    return text + (", which others on the way can read" if url.startswith("http:") else "")


def is_this_machine(url: str) -> bool:
    """Whether an address is one of this machine's own, which nobody else answers at."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
