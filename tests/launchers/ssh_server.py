"""ssh servers on loopback, one for each NAME=PORT=FOLDER: commands run in a shell, with the folder first in PATH."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import asyncssh


async def _run(process: asyncssh.SSHServerProcess[bytes], folder: str) -> None:
    env = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_shell(process.command or "", stdin=pipe, stdout=pipe, stderr=pipe, env=env)
    out, told = await child.communicate(await process.stdin.read())
    process.stdout.write(out)
    process.stderr.write(told)
    process.exit(child.returncode or 0)


async def main(host_key: Path, users: Path, nodes: list[str]) -> None:
    """Serve until killed. Prints a line when all listen."""
    for node in nodes:
        _name, port, folder = node.split("=")
        await asyncssh.listen(
            "127.0.0.1", int(port), server_host_keys=[str(host_key)], authorized_client_keys=str(users), encoding=None,
            process_factory=lambda process, folder=folder: _run(process, folder),
        )  # fmt: skip
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
