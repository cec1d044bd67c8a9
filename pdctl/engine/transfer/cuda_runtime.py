"""The few functions of the CUDA runtime and driver that the transport `cuda_ipc` needs, by ctypes.

torch is not imported for them: the libraries that it has loaded into this process are found in /proc/self/maps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import NamedTuple

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_NON_BLOCKING = 1
_MEMCPY_DEFAULT = 4
_NOT_READY = 600
_MAPS = Path("/proc/self/maps")


class CudaError(Exception):
    """A call of the CUDA runtime failed; the message is its own."""


class Rows(NamedTuple):
    """Rows at `start` and then every `pitch` bytes, of which CUDA allows less than 2^31."""

    start: int
    pitch: int


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", c_char * HANDLE_BYTES)]


class CudaRuntime:
    """The loaded runtime. All methods raise CudaError."""

    def __init__(self) -> None:
        runtime, driver = _loaded("libcudart.so"), _loaded("libcuda.so")
        self._error_text = runtime.cudaGetErrorString
        self._error_text.restype = c_char_p
        self._get_handle = _typed(runtime.cudaIpcGetMemHandle, POINTER(_Handle), c_void_p)
        self._open_handle = _typed(runtime.cudaIpcOpenMemHandle, POINTER(c_void_p), _Handle, c_uint)
        self._close_handle = _typed(runtime.cudaIpcCloseMemHandle, c_void_p)
        self._set_device = _typed(runtime.cudaSetDevice, c_int)
        self._create_stream = _typed(runtime.cudaStreamCreateWithFlags, POINTER(c_void_p), c_uint)
        self._destroy_stream = _typed(runtime.cudaStreamDestroy, c_void_p)
        self._query_stream = _typed(runtime.cudaStreamQuery, c_void_p)
        self._copy = _typed(runtime.cudaMemcpyAsync, c_void_p, c_void_p, c_size_t, c_int, c_void_p)
        sizes = (c_void_p, c_size_t, c_void_p, c_size_t, c_size_t, c_size_t, c_int, c_void_p)
        self._copy_rows = _typed(runtime.cudaMemcpy2DAsync, *sizes)
        self._range = _typed(driver.cuMemGetAddressRange_v2, POINTER(c_void_p), POINTER(c_size_t), c_void_p)

    def set_device(self, device: int) -> None:
        """Make `device` this thread's own."""
        self._check(self._set_device(device), "cudaSetDevice")

    def allocation(self, pointer: int) -> tuple[int, int]:
        """(address, bytes) of the allocation that `pointer` lies in."""
        base, size = c_void_p(), c_size_t()
        if self._range(byref(base), byref(size), pointer):
            raise CudaError("cuMemGetAddressRange: the address is not in the memory of a GPU")
        return base.value or 0, size.value

    def export(self, pointer: int) -> bytes:
        """The handle by which other processes of this host can map the allocation of `pointer`."""
        handle = _Handle()
        self._check(self._get_handle(byref(handle), pointer), "cudaIpcGetMemHandle")
        return ctypes.string_at(byref(handle), HANDLE_BYTES)

    def place(self, pointer: int) -> str:
        """OFFSET/HANDLE: where other processes of this host find `pointer`."""
        base, _ = self.allocation(pointer)
        return f"{pointer - base}/{self.export(base).hex()}"

    def map(self, handle: bytes) -> int:
        """Map another process's allocation; its address here."""
        pointer = c_void_p()
        given = _Handle.from_buffer_copy(handle)
        self._check(self._open_handle(byref(pointer), given, _LAZY_PEER_ACCESS), "cudaIpcOpenMemHandle")
        return pointer.value or 0

    def unmap(self, pointer: int) -> None:
        """Undo `map`."""
        self._check(self._close_handle(pointer), "cudaIpcCloseMemHandle")

    def create_stream(self) -> int:
        """A stream that waits for no other."""
        stream = c_void_p()
        self._check(self._create_stream(byref(stream), _NON_BLOCKING), "cudaStreamCreateWithFlags")
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Free a stream, once it is done."""
        self._check(self._destroy_stream(stream), "cudaStreamDestroy")

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Queue a copy between any two places."""
        self._check(self._copy(target, source, num_bytes, _MEMCPY_DEFAULT, stream), "cudaMemcpyAsync")

    def copy_rows(self, target: Rows, source: Rows, num_bytes: int, count: int, stream: int) -> None:
        """Queue a copy of `count` rows of `num_bytes` between any two places."""
        result = self._copy_rows(*target, *source, num_bytes, count, _MEMCPY_DEFAULT, stream)
        self._check(result, "cudaMemcpy2DAsync")

    def is_done(self, stream: int) -> bool:
        """Whether everything that was queued is done."""
        result = self._query_stream(stream)
        if result != _NOT_READY:
            self._check(result, "cudaStreamQuery")
        return result != _NOT_READY

    def _check(self, result: int, call: str) -> None:
        if result:
            text = self._error_text(c_int(result)) or b"unknown error"
            raise CudaError(f"{call}: {text.decode(errors='replace')} ({result})")


def _typed(function: Callable[..., int], *types: type) -> Callable[..., int]:
    function.argtypes = list(types)  # type: ignore[attr-defined]
    function.restype = c_int  # type: ignore[attr-defined]
    return function


def _loaded(name: str) -> ctypes.CDLL:
    """The library of this process whose file name begins with `name`."""
    paths = (line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines() if name in line)
    path = next((path for path in paths if Path(path).name.startswith(name)), None)
    if path is None:
        raise CudaError(f"{name} is not loaded in this process: it does not use a GPU")
    return ctypes.CDLL(path)
