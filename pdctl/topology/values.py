"""Checks of single values in a topology file. Each says what is wrong with a value, or None."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from pdctl.speculative import Speculative

# Returns what is wrong with a value ("must be ..."), or None.
Check = Callable[[object], str | None]

_PORT = re.compile(r"[a-z][a-z0-9-]{0,31}(:[0-9]{1,5})?")
_ENV_NAME = re.compile(r"[^=\0]+")


def text(pattern: str = r".+", what: str = "a non-empty string") -> Check:
    """A string that matches the pattern completely."""
    compiled = re.compile(pattern)

    def check(value: object) -> str | None:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            return f"must be {what}"
        return _unusable(value)

    return check


# Limits of the kernel for a file name and for a path, in bytes.
_NAME_MAX, _PATH_MAX = 255, 4095


def _unusable(value: str) -> str | None:
    """Why a string cannot be used, or None. Many strings become paths or environment variables."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        return "must have no control characters"
    data = value.encode()
    if len(data) > _PATH_MAX or max(map(len, data.split(b"/"))) > _NAME_MAX:
        return f"must have at most {_PATH_MAX} bytes, {_NAME_MAX} between slashes"
    return None


def choice(*values: str) -> Check:
    """One of the given words."""
    listed = ", ".join(values)
    return lambda value: None if isinstance(value, str) and value in values else f"must be one of: {listed}"


def speculative() -> Check:
    """Settings of speculative decoding."""
    example = 'must be a table such as { kind = "ngram", tokens = 4 }'

    def check(value: object) -> str | None:
        try:
            found = msgspec.convert(value, Speculative)
        except msgspec.ValidationError as failure:
            return f"{example} ({failure})"
        return f"{example} ({found.wrong})" if found.wrong else None

    return check


def integer(low: int, high: int = 2**31) -> Check:
    """A whole number within bounds. TOML's true and false are not numbers."""
    # `type() is int`, because bool is a subclass of int.
    what = f"must be a whole number from {low} to {high}" if high < 2**31 else f"must be a whole number, at least {low}"
    return lambda value: None if type(value) is int and low <= value <= high else what


def choices(*values: str) -> Check:
    """A list of one or more of the given words."""
    listed = ", ".join(values)

    def check(value: object) -> str | None:
        good = isinstance(value, list) and value and all(isinstance(item, str) and item in values for item in value)
        return None if good else f"must be a list of one or more of: {listed}"

    return check


def strings() -> Check:
    """A table of strings: environment variables."""

    def check(value: object) -> str | None:
        good = isinstance(value, dict) and all(isinstance(item, str) and "\0" not in item for item in value.values())
        if not good or not isinstance(value, dict):
            return 'must be a table of strings, such as { NCCL_DEBUG = "WARN" }'
        taken = next((name for name in value if not _ENV_NAME.fullmatch(name)), None)
        if taken is not None:
            return f"sets {taken!r}, which is not a valid variable name"
        taken = next((name for name in value if name.startswith("PDCTL_")), None)
        return None if taken is None else f"sets {taken!r}, which is reserved for pdctl"

    return check


def number(above: float, most: float = 1e9) -> Check:
    """A number greater than `above`, at most `most`. A negative `above` allows 0."""
    what = f"must be a number greater than {above:g}" if above >= 0 else "must be a number, at least 0"
    what += f" and at most {most:.15g}" if most < 1e9 else ""
    # The largest negative float: `low < value` then allows 0, but no negative number.
    low = above if above >= 0 else -5e-324
    return lambda value: None if type(value) in (int, float) and low < float(str(value)) <= most else what


def boolean() -> Check:
    """A boolean."""
    return lambda value: None if isinstance(value, bool) else "must be true or false"


def switch() -> Check:
    """True, false, or the engine's own choice."""
    return lambda value: None if isinstance(value, bool) or value == "auto" else 'must be "auto", true or false'


def indices(what: str) -> Check:
    """A list of distinct device numbers."""

    def check(value: object) -> str | None:
        good = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        if not good or not isinstance(value, list):
            return f"must be a list of {what} numbers, such as [0, 1]"
        return None if len(set(value)) == len(value) else f"names a {what} twice"

    return check


def gpu_names() -> Check:
    """A list of distinct GPUs: driver indices, UUIDs (or prefixes of them), MIG slices."""

    def check(value: object) -> str | None:
        if not isinstance(value, list) or not all(_is_gpu(item) for item in value):
            return 'must be a list of GPUs: indices, such as 0, or names, such as "GPU-8932f937" or "MIG-..."'
        return None if len(set(value)) == len(value) else "names a GPU twice"

    return check


def _is_gpu(item: object) -> bool:
    return (type(item) is int and item >= 0) or (isinstance(item, str) and item.startswith(("GPU-", "MIG-")))


def texts(what: str) -> Check:
    """A list of distinct names."""

    def check(value: object) -> str | None:
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            return f"must be a list of {what} names"
        if (reason := next(filter(None, map(_unusable, value)), None)) is not None:
            return f"each name {reason}"
        return None if len(set(value)) == len(value) else f"names a {what} twice"

    return check


def port_range(least: int) -> Check:
    """[first, last] with at least `least` ports; an empty list for any port."""

    def check(value: object) -> str | None:
        if value == []:
            return None
        good = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
        if not good or not isinstance(value, list) or not 1024 <= value[0] <= value[1] - least + 1 <= 65536 - least:
            return f"must be [first, last] from 1024 to 65535, at least {least} ports"
        return None

    return check


def arguments(example: str = '["--max-num-seqs", "64"]', least: int = 0) -> Check:
    """A list of command line arguments. The same one may occur twice."""

    def check(value: object) -> str | None:
        good = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        if not good or not isinstance(value, list) or len(value) < least:
            return f"must be a list of strings, such as {example}"
        return next(filter(None, map(_unusable, value)), None)

    return check


def port_names() -> Check:
    """A list of the purposes of ports, each with a number if pdctl must not choose it."""

    def check(value: object) -> str | None:
        if not isinstance(value, list) or not all(isinstance(item, str) and _PORT.fullmatch(item) for item in value):
            return 'must be a list of purposes, such as ["http"], or ["http:9100"] for a certain port'
        numbers = [int(number) for item in value if (number := item.partition(":")[2])]
        if any(not 1 <= number <= 65535 for number in numbers):
            return "must have port numbers from 1 to 65535"
        purposes = [item.partition(":")[0] for item in value]
        is_distinct = len(set(purposes)) == len(purposes) and len(set(numbers)) == len(numbers)
        return None if is_distinct else "names a port twice"

    return check
