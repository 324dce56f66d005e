"""What posttrain is made of, from the metadata of the packages that are installed: a lock file, or a list for auditors.

`python .ci/supply.py lock` prints exact versions for `pip install -r`; `python .ci/supply.py sbom` prints a CycloneDX
document; `python .ci/supply.py oldest` prints the lower end of every declared range, to test that end too. The first
two hold posttrain's declared dependencies with its `dev` extra and all that these need, and nothing else of
the environment: no local paths, no package-registry hosts, no build tags such as `+cpu`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT, EXTRAS = "posttrain", ("dev",)
HEADER = (
    "# Made by `make lock` from an environment in which the test suite passes; edit pyproject.toml instead.\n"
    "# torch is pinned without its build: take the CPU or CUDA build of this version that fits the machine.\n"
)


def closure() -> dict[str, importlib.metadata.Distribution]:
    """Canonical name -> installed distribution, for everything that the root needs, the root included.

    Raises:
        importlib.metadata.PackageNotFoundError: something that is needed is not installed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(ROOT, extra) for extra in ("", *EXTRAS)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), wanted) for wanted in ("", *needed.extras)]
    return found


def lock() -> str:
    """One `name==version` per line, sorted; without the root itself."""
    pinned = {name: Version(distribution.version).public for name, distribution in closure().items() if name != ROOT}
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pinned.items()))


def oldest() -> str:
    """The oldest version that each declared range allows, as constraints for `pip install -c`."""
    lines = []
    for text in importlib.metadata.distribution(ROOT).requires or []:
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            (bound,) = [part.version for part in needed.specifier if part.operator in (">=", "==", "~=")]
            lines.append(f"{canonicalize_name(needed.name)}=={bound}\n")
    return "".join(sorted(lines))


def sbom() -> str:
    """A software bill of materials, CycloneDX 1.6 JSON. The same environment gives the same text."""
    parts = {name: _component(distribution) for name, distribution in sorted(closure().items())}
    root = parts.pop(ROOT)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": root | {"type": "application"}},
        "components": list(parts.values()),
    }
    return json.dumps(document, indent=2) + "\n"


def _component(distribution: importlib.metadata.Distribution) -> dict[str, Any]:
    name, version = canonicalize_name(distribution.name), Version(distribution.version).public
    licence = distribution.metadata.get("License-Expression") or distribution.metadata.get("License") or ""
    component: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
        "bom-ref": f"pkg:pypi/{name}@{version}",
    }
    if licence and "\n" not in licence:  # some packages put the whole text there
        component["licenses"] = [{"license": {"name": licence}}]
    return component


if __name__ == "__main__":
    print({"lock": lock, "oldest": oldest, "sbom": sbom}[sys.argv[1]](), end="")
