"""The output and exit code of Debian's `ibstatus` (infiniband-diags), byte for byte, for any sysfs root.

The original is a shell script: it prints files through an unquoted command substitution, which splits them at white
space and expands the words as file names; an unreadable file gives a fixed word. Its oddities are kept: fatal errors go
to stdout with exit code 255, an unknown port prints `unknown` and succeeds, an empty class directory is treated as a
device named `*`. Devices are in the order of the C locale.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_BASE = "class/infiniband"
_SHOWN = "/sys/class/infiniband"
_FATAL = 255
_FIELDS = (
    ("\tdefault gid:\t", "gids/0", b"unknown"),
    ("\tbase lid:\t", "lid", b"unknown"),
    ("\tsm lid:\t\t", "sm_lid", b"unknown"),
    ("\tstate:\t\t", "state", b"unknown"),
    ("\tphys state:\t", "phys_state", b"unknown"),
    ("\trate:\t\t", "rate", b"unknown"),
    ("\tlink_layer:\t", "link_layer", b"IB"),
)
_USAGE = """Usage:  ibstatus  [-h] [devname[:portnum]]
	-h:	this help screen
	Examples:
		ibstatus mthca1		# shows status of all ports of 'mthca1'
		ibstatus mthca0:2	# shows status port number 2 of 'mthca0'
		ibstatus		# default: shows status of all 'mthca0' ports
"""


class _Fatal(Exception):
    """Ends the output with an error."""


def ibstatus(arguments: Sequence[str], sysfs_root: Path = Path("/sys")) -> tuple[bytes, int]:
    """The output and the exit code."""
    if arguments and arguments[0] == "-h":
        return _USAGE.encode(), _FATAL
    found: list[bytes] = []
    try:
        for part in _parts(arguments, sysfs_root / _BASE):
            found.append(part)
    except _Fatal as failure:
        return b"".join(found) + f"Fatal error:  {failure}\n".encode(), _FATAL
    return b"".join(found), 0


def _parts(arguments: Sequence[str], base: Path) -> Iterator[bytes]:
    if not arguments or not arguments[0]:
        if not os.access(base, os.X_OK) or not base.is_dir():
            raise _Fatal("No devices")
        for name in _names(base) or ["*"]:
            # The script has changed into the class directory by then, so patterns match there.
            yield from _device(base, name, "+", base)
        return
    for argument in arguments:
        if not argument:
            return
        # `echo -n` prints nothing.
        name, colon, _ = ("" if argument == "-n" else argument).partition(":")
        port = argument.rpartition(":")[2] if colon else "+"
        # A port named like its device means all ports. An empty device name disappears as a word, and the port takes
        # its place.
        port = "+" if port == name else port
        yield from _device(base, *((name, port) if name else (port, "")), Path())


def _device(base: Path, name: str, port: str, here: Path) -> Iterator[bytes]:
    folder = base / name / "ports"
    if not folder.is_dir():
        raise _Fatal(f"device '{name}': sys files not found ({_SHOWN}/{name}/ports)")
    for number in (_names(folder) or ["*"]) if port == "+" else port.split():
        yield _port(base, name, number, here)


def _port(base: Path, name: str, port: str, here: Path) -> bytes:
    lines = [f"Infiniband device '{name}' port {port} status:\n".encode()]
    for label, file, otherwise in _FIELDS:
        words = _words(base / name / "ports" / port / file, otherwise, here)
        lines.append(_echoed(b" ".join([label.encode(), *words])))
    return b"".join(lines) + b"\n"


def _words(path: Path, otherwise: bytes, here: Path) -> list[bytes]:
    """A file's words, as an unquoted `cat` passes them to `echo`."""
    if not os.access(path, os.R_OK):
        return [otherwise]
    try:
        data = path.read_bytes()
    except OSError:
        # cat fails; echo prints the fixed word.
        return [otherwise]
    words = [word for word in re.split(rb"[ \t\n]+", data.replace(b"\0", b"")) if word]
    return [found for word in words for found in _matching(word, here)]


def _matching(word: bytes, here: Path) -> list[bytes]:
    """Expand a word with `*`, `?` or `[` to the matching files, or to itself if there are none."""
    if not re.search(rb"[*?\[]", word) or b"/" in word:
        return [word]
    pattern = os.fsdecode(word)
    return [os.fsencode(name) for name in _names(here) if fnmatch.fnmatchcase(name, pattern)] or [word]


def _echoed(line: bytes) -> bytes:
    """Expand backslashes as dash's `echo` does; `\\c` ends the output without a newline."""
    cut = re.search(rb"(?<!\\)(?:\\\\)*\\c", line)
    text = line[: cut.end() - 2] if cut else line
    text = re.sub(rb"\\(0[0-7]{0,3}|[1-7][0-7]{0,2}|[abefnrtv\\])", lambda found: _escape(found[1]), text)
    return text if cut else text + b"\n"


def _escape(name: bytes) -> bytes:
    if name[:1].isdigit():
        return bytes([int(name, 8) & 0xFF])
    return {
        b"a": b"\a",
        b"b": b"\b",
        b"e": b"\x1b",
        b"f": b"\f",
        b"n": b"\n",
        b"r": b"\r",
        b"t": b"\t",
        b"v": b"\v",
        b"\\": b"\\",
    }[name]


def _names(folder: Path) -> list[str]:
    """File names in the order of the shell's `*`."""
    return sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=os.fsencode)  # noqa: PTH208
