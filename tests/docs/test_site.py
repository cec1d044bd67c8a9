"""What scripts/docs builds, as far as it can be checked without MkDocs: every page is in the navigation, links lead
somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
# Made by scripts/_docs_hook.py from files of the root.
_MADE = {"index.md", "contributing.md", "security.md", "changelog.md"}


def without_code(text: str) -> str:
    """The text without blocks and spans of code: what they hold are no links and headings."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(path: Path) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in _LINK.findall(without_code(path.read_text())):
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        assert not anchor or anchor in set(anchors(there)), f"{target}#{anchor}"


def test_the_navigation_names_pages_that_exist() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"\s([\w/-]+\.md)$", text[text.index("\nnav:") :], re.M))
    assert {name for name in named - _MADE if not (DOCS / name).exists()} == set()
    assert len(named) > 30


def test_requirements_are_pinned() -> None:
    lines = (ROOT / "scripts/docs-requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", line) for line in lines if line and not line.startswith("#"))
