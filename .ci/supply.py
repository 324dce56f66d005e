"""What posttrain is made of, from the metadata of the packages that are installed: a lock file, or a list for auditors.

`python .ci/supply.py lock` prints exact versions with hashes for `pip install --require-hashes -r`; with the name of an
extra, what that needs beside; with the name of a `launch/requirements-NAME.txt` and exact versions of packages that are
installed without what they declare, these and what the file lists. `python .ci/supply.py sbom` prints a CycloneDX
document; `python .ci/supply.py oldest` prints the lower end of every declared range, to test that end too. The lock and
the bill of materials hold posttrain's declared dependencies with its `dev` extra and all that these need, and nothing
else of the environment: no local paths, no package-registry hosts, no build tags such as `+cpu`.

Hashes are of what pip would take from the public index on Linux, for the Python versions and machines of `TARGETS`. Of
torch there is one more, of the build that pip takes here: the public index has builds for GPUs alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT, EXTRAS = "posttrain", ("dev",)
HEADER = (
    "# Made by `make lock` from an environment in which the test suite passes; edit pyproject.toml instead.\n"
    "# torch is pinned without its build, with hashes of those for GPUs and of the one for CPUs: pip takes what its\n"
    "# index has. What a build for GPUs needs beside is pinned by torch itself, without hashes.\n"
)
TARGETS = [(python, machine) for python in ("3.11", "3.12", "3.13") for machine in ("x86_64", "aarch64")]
LOCK = "requirements.lock"


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


def lock(extra: str = "", *alone: str) -> str:
    """`name==version` with hashes, sorted; without the root itself. Of an extra what `LOCK` does not have.

    Args:
        extra: of the root, or the name of a list of requirements in `launch/`.
        alone: `name==version` of what goes into the lock without the packages that it needs.
    """
    if extra:
        pinned = _resolved(_named(extra)) | pins("".join(f"{each}\n" for each in alone))
    else:
        pinned = {name: Version(found.version).public for name, found in closure().items() if name != ROOT}
    known = _hashes(pinned) if pinned else {}
    head = HEADER if not extra else f"# Made by `make lock`: what `{extra}` needs beside {LOCK}.\n"
    return head + "".join(
        f"{name}=={version}" + "".join(f" \\\n    --hash=sha256:{each}" for each in sorted(known[name])) + "\n"
        for name, version in sorted(pinned.items())
    )


def pins(text: str) -> dict[str, str]:
    """Name -> version of a lock."""
    return dict(re.findall(r"^([a-z0-9-]+)==([0-9a-z.]+)", text, re.MULTILINE))


def _named(extra: str) -> list[str]:
    """What an extra asks for, or a list of requirements."""
    file = Path("launch") / f"requirements-{extra}.txt"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line and not line.startswith("#")]
    wanted = [Requirement(text) for text in importlib.metadata.distribution(ROOT).requires or []]
    return [
        f"{each.name}[{','.join(each.extras)}]{each.specifier}" if each.extras else f"{each.name}{each.specifier}"
        for each in wanted
        if each.marker is not None and each.marker.evaluate({"extra": extra})
    ]


def _resolved(named: list[str]) -> dict[str, str]:
    """What pip would install for requirements beside the packages of `LOCK`."""
    there = pins(Path(LOCK).read_text(encoding="utf-8"))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in there.items())
        constraints.flush()
        found = _report([*named, "--constraint", constraints.name], dict(os.environ))
    return {name: version for name, (version, _) in found.items() if name not in there}


def _hashes(pinned: dict[str, str]) -> dict[str, set[str]]:
    """SHA-256 of the files that pip takes of each package, on every target that has all of them."""
    found: dict[str, set[str]] = {name: set() for name in pinned}
    public = dict(os.environ) | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    exact = [f"{name}=={version}" for name, version in pinned.items()]
    for python, machine in TARGETS:
        tags = [f"manylinux_2_{minor}_{machine}" for minor in range(5, 36)]
        tags += [f"{kind}_{machine}" for kind in ("manylinux1", "manylinux2010", "manylinux2014", "linux")]
        options = [word for tag in tags for word in ("--platform", tag)]
        nowhere = f"{tempfile.gettempdir()}/nothing-is-installed"
        options += ["--python-version", python, "--target", nowhere, "--no-deps"]
        try:
            report = _report([*options, *exact], public)
        except subprocess.CalledProcessError as error:
            print(f"no hashes for Python {python} on {machine}: {error.stderr.strip()[-300:]}", file=sys.stderr)
            continue
        for name, (_, sha256) in report.items():
            found[name].add(sha256)
    if "torch" in pinned:
        found["torch"].add(_report(["--no-deps", f"torch=={pinned['torch']}"], dict(os.environ))["torch"][1])
    return found


def _report(arguments: list[str], environment: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> version and hash of what pip would install."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=True, env=environment)
    return {
        canonicalize_name(each["metadata"]["name"]): (
            Version(each["metadata"]["version"]).public,
            each["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for each in json.loads(done.stdout)["install"]
    }


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
    print({"lock": lock, "oldest": oldest, "sbom": sbom}[sys.argv[1]](*sys.argv[2:]), end="")
