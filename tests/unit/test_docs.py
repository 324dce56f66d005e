"""The pages lead to each other: no link is broken, and every page can be reached from the first one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "data").rglob("*.md"),
]
FIRST = ROOT / "docs" / "README.md"


def text_of(page):
    """Without blocks of code, in which nothing is a link."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def links(page):
    """(target, anchor) of every link that stays within the project."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text_of(page))
    return [(link.partition("#")[0], link.partition("#")[2]) for link in found if "://" not in link]


def anchors(page):
    """As a forge makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_broken(page):
    for target, anchor in links(page):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{target} is not there"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target} has no heading {anchor!r}"


def test_every_page_is_two_links_from_the_first():
    def linked(page):
        return {(page.parent / target).resolve() for target, _ in links(page) if target.endswith(".md")}

    near = linked(FIRST)
    reached = near | {found for page in near if page.exists() for found in linked(page)}
    pages = {page for page in PAGES if "design" not in page.parts and page.name not in ("README.md", "CHANGELOG.md")}
    assert not {str(page.relative_to(ROOT)) for page in pages - reached}
