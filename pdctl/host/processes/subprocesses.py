"""Processes that are started for one answer. Whatever they do, nobody waits for them longer than told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

# A process that was killed has so long to end. One in a driver's call may never do so.
_END_S = 5.0


@asynccontextmanager
async def started(
    argv: Sequence[str], most_bytes: int = 2**16, env: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """A process with pipes. If it still runs afterwards, it is killed with its process group. `most_bytes`: of a line
    that it prints, and of what is read ahead; `env`: its whole environment, None: as ours. Raises OSError."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=pipe, stdout=pipe, stderr=pipe, limit=most_bytes, start_new_session=True, env=env
    )
    try:
        yield process
    finally:
        await _end(process)


async def last_words(process: Process) -> str:
    """The last line on stderr of a process that ends now."""
    said = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            _, said = await process.communicate()
    return last_line(said, process.returncode)


def last_line(said: bytes, code: int | None) -> str:
    """The last line of what a process said; else its exit code."""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {code}"


async def _end(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(_END_S):
            # Reads what is left, too: a pipe that is full would keep its end from being seen.
            await process.communicate()
    except TimeoutError:
        # asyncio has no other way to give up a process and its pipes, which somebody else may hold.
        process._transport.close()  # type: ignore[attr-defined]
