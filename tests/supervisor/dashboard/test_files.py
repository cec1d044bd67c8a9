"""The page's files: all are served, small, safe, and load nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pdctl.supervisor.dashboard
from pdctl.supervisor.dashboard.files import file_answer

FOLDER = Path(pdctl.supervisor.dashboard.__file__).parent / "page"
OURS = sorted(path for path in FOLDER.iterdir() if path.is_file())
THEIRS = sorted((FOLDER / "uplot").iterdir())


def body(path: str, method: str = "GET") -> tuple[int, bytes]:
    answer = file_answer(method, path)
    return answer.status_code, bytes(answer.body)


@pytest.mark.parametrize("path", [*OURS, *THEIRS], ids=lambda path: path.name)
def test_every_file_is_served(path: Path) -> None:
    name = "" if path.name == "index.html" else str(path.relative_to(FOLDER))
    assert body(f"/{name}") == (200, path.read_bytes())


@pytest.mark.parametrize("path", ["/index.htm", "/../access.py", "/uplot", "/uplot/../../access.py", "//", "/dash.js/"])
def test_nothing_else_is(path: str) -> None:
    assert body(path)[0] == 404


def test_files_are_only_read() -> None:
    assert body("/", "POST")[0] == 405


def test_a_browser_is_told_to_load_nothing_else() -> None:
    headers = file_answer("GET", "/").headers
    assert headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["x-frame-options"], headers["referrer-policy"]) == ("DENY", "no-referrer")


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_no_other_address_is_in_a_file(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?://|(?:src|href)=[\"'](?![/#])|@import|url\(", text)
    assert len(text.splitlines()) <= 400
    assert " style=" not in text, "the policy refuses such styles"


@pytest.mark.parametrize("path", [path for path in OURS if path.suffix == ".js"], ids=lambda path: path.name)
def test_modules_import_what_there_is(path: Path) -> None:
    for names, module in re.findall(r"import \{([^}]+)\} from \"\./(\w+\.js)\"", path.read_text()):
        exported = re.findall(r"export (?:async )?(?:function|const|class) (\w+)", (FOLDER / module).read_text())
        wanted = {name.strip() for name in names.split(",") if name.strip()}
        assert wanted <= set(exported)
        text = path.read_text()
        assert all(len(re.findall(rf"\b{name}\b", text)) > 1 for name in wanted), "imported, but not used"


def test_the_chart_library_has_its_licence_and_is_small() -> None:
    assert b"The MIT License" in body("/uplot/LICENSE")[1]
    assert len(body("/uplot/uPlot.iife.min.js")[1]) < 60_000
