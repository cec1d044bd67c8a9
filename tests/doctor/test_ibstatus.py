"""pdctl's output compared with Debian's `ibstatus`, byte for byte and with exit codes, over fake trees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdctl.doctor.ibstatus import ibstatus
from tests.doctor.trees import TREES, Port, Tree

FORMS: list[list[str]] = [
    [], ["mlx5_0"], ["mlx5_0:1"], ["mlx5_0:9"], ["mlx5_0:+"], ["mlx5_0:"], ["nope"], ["nope:1"], ["-h"],
    ["mlx5_0", "mlx5_1"],
    ["mlx5_0", "nope", "mlx5_1"], ["mlx5_bond_0:2"], ["mlx5_0", "-h"], [""], ["mlx5_0", ""], ["-n"], ["mlx5_0:mlx5_0"],
    ["a:b:c"], [":1"], ["mlx5_0:1:2"], ["mlx5_1:1", "mlx5_0"], ["MLX5_0"], ["0"],
]  # fmt: skip


@pytest.fixture(scope="module")
def real() -> str:
    found = shutil.which("ibstatus", path=f"/usr/sbin:{os.environ['PATH']}")
    if found is None:
        pytest.skip("Debian's infiniband-diags is not installed: apt-get install infiniband-diags")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here, in which a tree could take the place of /sys")
    return found


def real_over(real: str, tree: Path, forms: list[list[str]], cwd: Path) -> list[tuple[bytes, int]]:
    """The real tool's output and exit code for each form, in a namespace with the tree as /sys."""
    script = 'mount --rbind "$1" /sys && cd "$2" && shift 2 && exec "$@"'
    runner = (
        "import subprocess, sys, json\n"
        "def run(form): return subprocess.run(['/bin/sh', sys.argv[1], *form], capture_output=True)\n"
        "found = [run(form) for form in json.loads(sys.argv[2])]\n"
        "print(json.dumps([[done.stdout.decode('latin-1'), done.returncode] for done in found]))\n"
    )
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(tree), str(cwd)]
    done = subprocess.run(
        [*argv, sys.executable, "-I", "-S", "-c", runner, real, json.dumps(forms)],
        capture_output=True, check=True, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    return [(output.encode("latin-1"), code) for output, code in json.loads(done.stdout)]


@pytest.mark.parametrize("name", TREES)
def test_every_tree_in_every_form(real: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, here = TREES[name](tmp_path / "sys"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    # Argument parsing does not depend on the content of the files.
    forms = FORMS if name in ("two devices", "dual port", "empty", "no class", "digits") else FORMS[:8]
    theirs = real_over(real, tree.root, forms, here)
    for form, expected in zip(forms, theirs, strict=True):
        assert ibstatus(form, tree.root) == expected, form


def test_there_are_enough_trees() -> None:
    assert len(TREES) >= 40


TEXT = st.one_of(st.none(), st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=24))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("abcxyz0189_-.", min_size=1, max_size=9).filter(lambda name: not name.startswith((".", "-"))),
        st.dictionaries(st.integers(0, 40), st.builds(Port, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT), max_size=3),
        max_size=4,
    )
)
def test_any_tree(real: str, tmp_path_factory: pytest.TempPathFactory, devices: dict[str, dict[int, Port]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    tree, here = Tree(folder / "sys"), folder / "here"
    here.mkdir()
    for number, (name, ports) in enumerate(devices.items()):
        tree.hca(name, ports, bus=2 * number + 1)
    forms = [[], *([name] for name in devices), *([f"{name}:1"] for name in devices)]
    before = Path.cwd()
    os.chdir(here)
    try:
        for form, expected in zip(forms, real_over(real, tree.root, forms, here), strict=True):
            assert ibstatus(form, tree.root) == expected, form
    finally:
        os.chdir(before)


def test_this_machine(real: str, tmp_path: Path) -> None:
    done = subprocess.run(["/bin/sh", real], capture_output=True, cwd=tmp_path, env={**os.environ, "LC_ALL": "C"})
    assert ibstatus([]) == (done.stdout, done.returncode)
