"""The wheel and the source distribution: what is in them, and what an index says of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from pdctl import __version__
from tests.service import REPOSITORY


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    out = tmp_path_factory.mktemp("dist")
    here = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    argv = [sys.executable, "-m", "build", *here, "--outdir", str(out), str(REPOSITORY)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def tracked(*folders: str) -> set[str]:
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (REPOSITORY / name).is_file()}


def wheel_of(folder: Path) -> zipfile.ZipFile:
    [path] = folder.glob("*.whl")
    assert path.name == f"pdctl-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_package_and_the_man_page_and_nothing_else(made: Path) -> None:
    with wheel_of(made) as wheel:
        names = set(wheel.namelist())
    about, data = f"pdctl-{__version__}.dist-info/", f"pdctl-{__version__}.data/data/"
    assert {name for name in names if name.startswith("pdctl/")} == tracked("pdctl")
    assert {name.removeprefix(data) for name in names if name.startswith(data)} == {"share/man/man1/pdctl.1"}
    assert {name.removeprefix(about) for name in names if name.startswith(about)} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip
    assert not [name for name in names if not name.startswith(("pdctl/", about, data))]


def test_the_source_distribution_has_what_builds_and_tests_need(made: Path) -> None:
    [path] = made.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    root = f"pdctl-{__version__}/"
    names = {member.name.removeprefix(root) for member in members if not member.isdir()}
    assert all(member.name.startswith(root) for member in members)
    assert tracked("pdctl", "tests", "docs", "scripts") <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Containerfile"} <= names
    unwanted = (".venv", "dist/", "build/", ".git/")
    assert not [name for name in names if "__pycache__" in name or name.startswith(unwanted)]


def test_the_metadata(made: Path) -> None:
    with wheel_of(made) as wheel:
        about = HeaderParser().parsestr(wheel.read(f"pdctl-{__version__}.dist-info/METADATA").decode())
        entries = wheel.read(f"pdctl-{__version__}.dist-info/entry_points.txt").decode()
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("pdctl", __version__, "Apache-2.0")
    assert about["Requires-Python"] == ">=3.11"
    assert {"engine", "cuda", "otlp"} <= set(about.get_all("Provides-Extra", []))
    assert "pdctl = pdctl.cli:main" in entries
    # The control plane alone: no torch without an extra.
    plain = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in plain if line.startswith(("torch", "transformers", "numpy"))]


def test_an_index_would_take_them(made: Path) -> None:
    if importlib.util.find_spec("twine") is None:
        pytest.skip("NOT TESTED: twine is not installed")
    argv = [sys.executable, "-m", "twine", "check", "--strict", *map(str, made.iterdir())]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
