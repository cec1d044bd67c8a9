"""`pdctl version`: the versions of pdctl, of its Python, and of the environments that engines run in."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import __version__, console
from pdctl.commands.common import FileOption, JsonOption, read_topology, topology_file
from pdctl.host import program
from pdctl.host.packages import installed_package

if TYPE_CHECKING:
    from pdctl.adapters import Launcher

# Besides an engine's own package.
_ALSO = ("torch", "transformers", "triton")
_BUILTIN = "builtin"


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment of a group of engines. `packages`: versions by name, the engine's own package first, None if it
    is missing; `python_version` is "" if unknown."""

    group: str
    kind: str
    python: str
    python_version: str
    packages: dict[str, str | None]


def version(file: Path | None = FileOption, as_json: bool = JsonOption) -> None:
    """Show the versions of pdctl, its Python and the engines' environments. These are the environments that the
    topology names: their files are read, nothing is executed."""
    found = _environments(topology_file(file))
    if as_json:
        about = {
            "pdctl": __version__,
            "python": platform.python_version(),
            "program": program.lasting()[0],
            "is_binary": program.is_binary(),
            "engines": [asdict(one) for one in found],
        }
        console.out(json.dumps(about, indent=2))
        return
    kind = "a binary" if program.is_binary() else "a package"
    console.out(f"pdctl {__version__}, {kind}, with Python {platform.python_version()}: {program.lasting()[0]}")
    for one in found:
        packages = ", ".join(f"{name} {number or 'not installed'}" for name, number in one.packages.items())
        where = f"{f'Python {one.python_version}'.strip()}: {one.python}" if one.python else "no Python"
        console.out(f"{one.group} ({one.kind}): {packages}, {where}")


def _environments(path: Path | None) -> list[Environment]:
    """One for each group that pdctl starts. The rest of the file is not checked."""
    if path is None:
        return [_environment("engines", _BUILTIN, program.engine_python())]
    groups = read_topology(path).get("engines")
    found = []
    for group in groups if isinstance(groups, list) else []:
        if isinstance(group, dict) and "url" not in group:
            name, kind, python = (str(group.get(key, "")) for key in ("name", "kind", "python"))
            at = str(path.absolute().parent / Path(python).expanduser()) if python else program.engine_python()
            found.append(_environment(name, kind or _BUILTIN, at))
    return found


def _environment(group: str, kind: str, python: str) -> Environment:
    from pdctl.adapters import can_launch, kinds, launcher

    names = _own_packages(launcher(kind)) if kind in kinds() and can_launch(kind) else ()
    own = installed_package(python, names) if python else None
    packages = {own[0] if own else name: own[1] if own else None for name in names[:1]}
    for name in _ALSO:
        if python and (also := installed_package(python, (name,))):
            packages[name] = also[1]
    return Environment(group, kind, python, _python_version(python) if python else "", packages)


def _own_packages(starts: Launcher) -> tuple[str, ...]:
    return starts.distributions or ("pdctl",)


def _python_version(python: str) -> str:
    """The version of an interpreter: that of its virtual environment's file, else that of its library's folder."""
    prefix = Path(python).parent.parent
    try:
        told = (prefix / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    if found := re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+(?:\.\d+)?)", told, re.MULTILINE):
        return found[1]
    folders = sorted(folder.name.removeprefix("python") for folder in prefix.glob("lib/python3.*"))
    return folders[-1] if len(folders) == 1 else ""
