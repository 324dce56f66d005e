"""What the site's generator is told beside `mkdocs.yml`: pages from outside of docs/, lists of folders, and links.

The pages in docs/ are written for a forge, where a link may lead anywhere in the project. On the site a link to one of
the pages that are taken in leads there, and one to any other file becomes its name.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

TAKEN_IN = {
    "README.md": "project.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "data-files.md",
}
"""Page of the project -> its name on the site."""

MODULES = {
    "Running it": ("posttrain.api", "posttrain.errors"),
    "Methods": ("posttrain.methods.base", "posttrain.config.needs"),
    "Objectives": tuple(
        f"posttrain.objectives.{path.stem}"
        for path in sorted((ROOT / "posttrain" / "objectives").glob("*.py"))
        if path.stem != "__init__"
    ),
    "Verifiers": ("posttrain.verifiers.verdict", "posttrain.config.verifier"),
    "Data": ("posttrain.data.sample", "posttrain.data.tasks.base", "posttrain.data.traces"),
    "Environments": ("posttrain.environments.base",),
    "Plugins": ("posttrain.registry", "posttrain.trainers.callbacks"),
}
"""Chapters of the page `api.md`: what is meant for use by others."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


SHIM = "https://unpkg.com/iframe-worker/shim"
"""What the plugin `offline` would have a reader's browser fetch."""

PACKED = ROOT / "build" / "iframe-worker" / "package" / "shim" / "index.js"
"""The same from the package, where `make docs` could get that."""


def on_config(config: Any) -> Any:
    """Fill in the lists of folders in the navigation."""
    config["nav"] = _filled(config["nav"])
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside, and that of the modules."""
    for source, name in TAKEN_IN.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    chapters = ["# Python API\n\nFrom the docstrings. How to begin: [from Python](python.md), [plugins](plugins.md).\n"]
    for title, modules in MODULES.items():
        chapters.append(
            f"## {title}\n\n" + "\n\n".join(f"::: {module}\n    options:\n      heading_level: 3" for module in modules)
        )
    files.append(File.generated(config, "api.md", content="\n\n".join(chapters) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links of a page to where things are on the site."""
    here = page.file.src_uri
    origin = next((source for source, name in TAKEN_IN.items() if name == here), f"docs/{here}")

    def led(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        name = TAKEN_IN.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else None)
        if name is not None and files.get_file_from_path(name) is None:
            name = f"{name}/README.md" if files.get_file_from_path(f"{name}/README.md") else None
        if name is None:
            return text
        return f"{image}[{text}]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{hash_}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if place % 2 else LINK.sub(led, part) for place, part in enumerate(parts))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Have the page fetch nothing from elsewhere."""
    if PACKED.is_file():
        return output.replace(SHIM, posixpath.relpath("assets/iframe-worker.js", posixpath.dirname(page.url) or "."))
    return output.replace(f'<script src="{SHIM}"></script>', "")


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same for pages that are none of ours, as that of a missing page."""
    return output_content.replace(f'<script src="{SHIM}"></script>', "")


def on_post_build(config: Any) -> None:
    """Put what pages fetch beside them."""
    if PACKED.is_file():
        shutil.copy(PACKED, Path(config["site_dir"]) / "assets" / "iframe-worker.js")


def _filled(nav: list[Any]) -> list[Any]:
    filled: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, inside),) = entry.items()
            if title == "*":
                pages = sorted((ROOT / "docs" / inside).glob("*.md"))
                filled += [f"{inside}/{path.name}" for path in pages if path.name != "README.md"]
                continue
            entry = {title: _filled(inside) if isinstance(inside, list) else inside}
        filled.append(entry)
    return filled
