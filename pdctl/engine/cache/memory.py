"""The memory of a KV pool. On the host: an anonymous memory file, so that peers on this host can map it.

It has no name, so nothing can be left behind: it disappears with the last process that maps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14
LABEL = "pdctl-kv-"

Bytes = npt.NDArray[np.uint8]


class NoMemory(Exception):
    """The host has too little memory for a pool."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A pool in a GPU's memory: its address there, and the GPU's number in this process. `place`: of one that another
    process of this engine has allocated, as OFFSET/HANDLE: see CudaRuntime.place."""

    base: int
    num_bytes: int
    device: int
    place: str = ""


class Memory:
    """`num_bytes` of zeroed shared memory with its pages populated. The descriptor is open as long as this object.
    `fd`: that of such memory of another process, which is used instead of a new one. `populated`: False if the other
    process populates it, nearer to where it computes."""

    def __init__(self, num_bytes: int, epoch: str, fd: int | None = None, populated: bool = True) -> None:
        self.num_bytes = num_bytes
        self.fd = os.memfd_create(LABEL + epoch) if fd is None else fd
        try:
            if fd is None:
                os.ftruncate(self.fd, num_bytes)
            mapped = mmap.mmap(self.fd, num_bytes)
        except (OSError, ValueError) as failure:
            os.close(self.fd)
            raise NoMemory(f"no shared memory of {num_bytes / 2**30:.2f} GiB: {failure}") from failure
        self.view = memoryview(mapped)
        self.bytes: Bytes = np.frombuffer(mapped, dtype=np.uint8)
        self.base = int(self.bytes.ctypes.data)
        self.close = weakref.finalize(self, os.close, self.fd)
        if populated:
            self._populate()

    def _populate(self) -> None:
        """Populate the pages now: zeroing them during the first transfers would triple the transfer time."""
        with contextlib.suppress(OSError):  # older kernels populate pages when they are first used
            libc = ctypes.CDLL(None, use_errno=True)
            libc.madvise(
                ctypes.c_void_p(self.base), ctypes.c_size_t(self.num_bytes), ctypes.c_int(_MADV_POPULATE_WRITE)
            )
