"""Build the binary: PyInstaller makes a folder, which is appended to a small program that unpacks it once.

`build.py OUT_DIR`, with a Python that has pdctl's dependencies and PyInstaller. Needs a C compiler and zlib's static
library (Debian: zlib1g-dev). launcher.c describes the format.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
MAGIC = b"pdctl-binary-01\n"
TRAILER = struct.Struct("<QQQQ64s16s")


def version() -> str:
    """The version of pdctl in this tree."""
    found = re.search(r'__version__ = "(.+)"', (REPOSITORY / "pdctl/__init__.py").read_text())
    assert found is not None
    return found[1]


def freeze(work: Path) -> Path:
    """The folder that PyInstaller makes."""
    argv = [sys.executable, "-m", "PyInstaller", "--distpath", str(work / "dist"), "--workpath", str(work / "work"),
            "--log-level", "WARN", "--noconfirm", str(HERE / "pdctl.spec")]  # fmt: skip
    # The modules of this tree, not of an installed pdctl; the same hashes, and so the same bytes, in every build.
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "946684800"}
    subprocess.run(argv, check=True, env=env, cwd=work)
    return work / "dist" / "pdctl"


def compile_launcher(target: Path) -> None:
    """The program that all this is appended to."""
    flags = ["-O2", "-Wall", "-Wextra", "-Wno-format-truncation", "-s"]
    subprocess.run(
        [os.environ.get("CC", "cc"), *flags, "-o", str(target), str(HERE / "launcher.c"), "-l:libz.a"], check=True
    )


def pack(folder: Path, launcher: Path, target: Path, named: str) -> str:
    """Write the binary. Returns the name of the folder that it unpacks into."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    squeezer, stream, digest, lines = zlib.compressobj(9), bytearray(), hashlib.sha256(), []
    for path in paths:
        content = path.read_bytes()  # of the target, where it is a link
        mode = 0o755 if os.access(path, os.X_OK) else 0o644
        lines.append(f"{mode:o} {len(content)} {zlib.crc32(content):x} {path.relative_to(folder)}\n")
        digest.update(lines[-1].encode() + content)
        stream += squeezer.compress(content)
    stream += squeezer.flush()
    key = f"{named}-{digest.hexdigest()[:16]}"
    assert len(key) < 64
    start, listed = launcher.read_bytes(), "".join(lines).encode()
    trailer = TRAILER.pack(len(start), len(stream), len(start) + len(stream), len(listed), key.encode(), MAGIC)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_bytes(start + stream + listed + trailer)
    scratch.chmod(0o755)
    scratch.replace(target)
    return key


def main() -> None:
    """Build into the folder given as the only argument."""
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"pdctl-{version()}-linux-{os.uname().machine}"
    work = Path(tempfile.mkdtemp(prefix="pdctl-binary-"))
    try:
        launcher = work / "launcher"
        compile_launcher(launcher)
        key = pack(freeze(work), launcher, target, version())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.stdout.write(f"{target}: {target.stat().st_size / 1e6:.1f} MB, unpacks into {key}\n")


if __name__ == "__main__":
    main()
