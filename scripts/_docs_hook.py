"""A hook of MkDocs: README, CONTRIBUTING, SECURITY and CHANGELOG as pages, and a place for pages without one."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Files of the repository's root that are pages of the site.
PAGES = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md",
}  # fmt: skip
# Where pages go that the navigation does not name: by their folder, or their name.
_SECTIONS = {
    "guides": "Tasks", "engines": "Engines", "reference": "Reference", "decisions": "Inside", "install.md": "Tasks",
}  # fmt: skip
_LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?(?=\))")
_PICTURE = re.compile(
    r'<picture>\s*<source[^>]*srcset="docs/([^"]+)"[^>]*>\s*<img([^>]*)src="docs/([^"]+)"([^>]*)>\s*</picture>'
)


def on_config(config: Any) -> Any:
    """Pages that nobody placed come last in the section of their folder, or in one of their own."""
    named = set(_named(config.nav))
    docs = Path(config.docs_dir)
    found = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    left = sorted(found - named)
    sections = {title: pages for entry in config.nav for title, pages in entry.items() if isinstance(pages, list)}
    for page in left:
        folder = PurePosixPath(page).parts[0]
        sections[_SECTIONS.get(folder, "Running a service")].append(page)
    return config


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [name for value in values for name in _named(value)]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=_moved((ROOT / source).read_text(encoding="utf-8"))))
    return files


def _moved(text: str) -> str:
    """The text of a file of the root, as if it were in docs/."""
    text = _PICTURE.sub(r'<img\2src="\3#only-light"\4><img\2src="\1#only-dark"\4>', text)
    return _LINK.sub(lambda found: _target(found[1]) + (found[2] or ""), re.sub(r'src="docs/', 'src="', text))


def _target(path: str) -> str:
    return PAGES.get(path, path.removeprefix("docs/"))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ to the pages of the root."""
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)
    for source, name in PAGES.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{name}")
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """GitHub needs a backslash before a bar within code in a table, and hides it; Python-Markdown shows it."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|"), html, flags=re.S)
