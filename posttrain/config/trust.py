"""What a recipe has done on this machine and beyond it, in words: whose code runs, who gets what. Runs none of it.

A recipe is a program: whoever trains by it trusts it as much as a script. `posttrain check` is for reading one first.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from posttrain.config.mixtures import all_verifiers
from posttrain.config.own_code import digests, find_file
from posttrain.config.plugins import digest
from posttrain.config.schema import Recipe


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


def trusted(recipe: Recipe, folder: Path) -> list[Trusted]:
    """What one trusts by running a recipe, most powerful first.

    Args:
        recipe: the recipe.
        folder: its own, from which paths of plugins are taken.
    """
    return [*_code(recipe, folder), *_written_by_the_model(recipe), *_sent(recipe)]


def _code(recipe: Recipe, folder: Path) -> Iterator[Trusted]:
    for name in recipe.plugins:
        place = str(find_file(name, folder)) if name.endswith(".py") or "/" in name else name
        yield Trusted("plugins", f"runs {place} (sha256 {digest(place)[:12]})", code=True)
    if recipe.model.trust_remote_code:
        what = f"runs the Python code in the repository of {recipe.model.path}"
        yield Trusted("model.trust_remote_code", what, code=True)
    for function, code in digests(all_verifiers(recipe)).items():
        yield Trusted("verifier.python", f"runs {function} (sha256 {code[:12]})", code=True)
    for factory, code in digests((), recipe.environment).items():
        yield Trusted("environment", f"runs {factory} (sha256 {code[:12]})", code=True)


def _written_by_the_model(recipe: Recipe) -> Iterator[Trusted]:
    for verifier in all_verifiers(recipe):
        if verifier.unboxed:
            what = "runs the code that the model writes with this user's files and network, for it has no sandbox"
            yield Trusted(f"verifier.{verifier.type}.isolation", what)


def _sent(recipe: Recipe) -> Iterator[Trusted]:
    for verifier in all_verifiers(recipe):
        if verifier.sends_to is not None and not is_this_machine(verifier.sends_to[0]):
            what = f"sends problems, references and completions to {verifier.sends_to[0]}"
            yield Trusted(f"verifier.{verifier.type}", what + _key(*verifier.sends_to))
    rollouts = recipe.rollouts
    if rollouts is not None and rollouts.engine == "vllm" and rollouts.mode == "server":
        url = rollouts.vllm.url
        if not is_this_machine(url):
            yield Trusted("rollouts.vllm", f"sends prompts to {url}" + _key(url, rollouts.vllm.api_key_env))
    if recipe.training.report_to:
        texts = ", prompts and completions of samples.jsonl" if recipe.tracking.send_samples else ""
        what = f"sends metrics and settings{texts} to {', '.join(recipe.training.report_to)}"
        yield Trusted("training.report_to", what)
    if recipe.training.push_to_hub:
        yield Trusted("training.push_to_hub", "uploads the model")


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
