"""The interpreter of engines of pdctl's own kind: another environment, or none where pdctl is a binary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pdctl import __version__
from pdctl.errors import ConfigError
from pdctl.host import Host
from pdctl.plan import make_plan
from pdctl.topology.loader import load_text

TEXT = """
[service]
model = "sample:tiny-qwen3"
[[engines]]
name = "p"
role = "prefill"
{python}
[[engines]]
name = "d"
role = "decode"
{python}
"""
PACKAGES = ("pdctl", "torch", "transformers", "tokenizers", "pyzmq", "numpy", "jinja2")


def binary(root: Path, python: str = "") -> Host:
    """A machine on which pdctl is a binary."""
    missing = frozenset({"torch", "zmq"})
    return Host(
        (0, 1), (), 24 << 30, {}, python, root / "c", root / "r", root / "s", missing_packages=missing,
        program="/opt/pdctl",
    )  # fmt: skip


def environment(root: Path, versions: dict[str, str]) -> str:
    """An environment with these packages. Returns its interpreter."""
    python = root / "engine/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    for name, version in versions.items():
        (root / f"engine/lib/python3.12/site-packages/{name}-{version}.dist-info").mkdir(parents=True)
    return str(python)


def refused(text: str, on: Host) -> list[tuple[str, str, str]]:
    with pytest.raises(ConfigError) as found:
        load_text(text, "x.toml", on)
    return [(problem.key, problem.message, problem.hint or "") for problem in found.value.problems]


def test_a_binary_says_that_engines_need_a_python(tmp_path: Path) -> None:
    found = refused(TEXT.format(python=""), binary(tmp_path))
    assert [key for key, _, _ in found] == ["engines[0]", "engines[1]"]
    assert "python is missing: this pdctl is a binary" in found[0][1]
    assert "pip install 'pdctl[engine]'" in found[0][2]
    [(key, message, hint), *_] = refused(TEXT.format(python='kind = "vllm"'), binary(tmp_path))
    assert (key, "python is missing" in message, "vllm" in hint) == ("engines[0]", True, True)


def test_engines_run_under_the_python_of_their_group_and_the_proxy_under_the_binary(tmp_path: Path) -> None:
    python = environment(tmp_path, dict.fromkeys(PACKAGES, __version__))
    for text, on in (
        (TEXT.format(python=f'python = "{python}"'), binary(tmp_path)),
        (TEXT.format(python=""), binary(tmp_path, python)),  # PDCTL_PYTHON
    ):
        plan = make_plan(load_text(text, "x.toml", on), on)
        by_name = {spec.name: spec.argv[:3] for spec in plan.processes}
        assert by_name["p-0"] == by_name["d-0"] == (python, "-m", "pdctl.engine")
        assert by_name["proxy"] == ("/opt/pdctl", "-m", "pdctl.proxy")


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"pdctl": "0.0.1"}, f"has pdctl 0.0.1, and this is pdctl {__version__}"),
        ({"torch": "2.0"}, "has no package pdctl"),
        ({"pdctl": __version__, "torch": "2.0", "pyzmq": "26", "numpy": "2"}, "transformers, tokenizers, jinja2"),
    ],
)
def test_that_environment_must_have_the_same_pdctl_with_its_engine(
    tmp_path: Path, versions: dict[str, str], message: str
) -> None:
    python = environment(tmp_path, versions)
    for pip in (False, True):  # it is checked in the same way where pdctl itself came from pip
        on = binary(tmp_path)
        if pip:
            on = replace(on, python="/usr/bin/python3", program="/usr/bin/python3")
        [(key, said, hint), *_] = refused(TEXT.format(python=f'python = "{python}"'), on)
        assert key == "engines[0].python"
        assert message in said
        assert f"pip install 'pdctl[engine]=={__version__}'" in hint


def test_an_interpreter_that_does_not_exist(tmp_path: Path) -> None:
    [(key, said, hint), *_] = refused(TEXT.format(python='python = "/nowhere/e/bin/python"'), binary(tmp_path))
    assert (key, said) == ("engines[0].python", "/nowhere/e/bin/python does not exist or cannot be executed")
    assert "python3 -m venv /nowhere/e" in hint


def test_stores_need_one_too(tmp_path: Path) -> None:
    python = environment(tmp_path, dict.fromkeys(PACKAGES, __version__))
    text = TEXT.format(python=f'python = "{python}"') + '[[stores]]\nname = "kv"\nkind = "mooncake"\n'
    [said] = [message for key, message, _ in refused(text, binary(tmp_path)) if "stores" in key]
    assert "python is missing" in said
