"""Request fields that no engine of the pool knows: dropped and reported to the client, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from pdctl.net.openai.api import ApiError

# Limits of names in an answer's header, and of names with their own counter: clients can invent names.
_TOLD = 16
_COUNTED = 64
_SHOWABLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
OTHER = "other"
IGNORED_HEADER = b"x-pdctl-ignored-fields"

Fields = Mapping[str, msgspec.Raw]


class UnknownFields:
    """Finds unknown fields. `refuse`: answer 400 instead of dropping them."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self._counted: set[str] = set()

    def of(self, fields: Iterable[str], known: frozenset[str] | None) -> list[str]:
        """The unknown fields, if the engines report which they know. Raises ApiError 400 if these are refused."""
        if known is None or known.issuperset(fields):
            return []
        found = [name for name in fields if name not in known]
        if self.refuse:
            raise ApiError(400, f"unknown field {shown_name(found[0])}", param=shown_name(found[0]))
        return found

    def labels(self, names: Sequence[str]) -> list[str]:
        """Counter labels of fields; for a request with very many, of the first ones."""
        return [self.label(name) for name in names[:_COUNTED]]

    def label(self, name: str) -> str:
        """The counter label of a field. The number of labels is limited, because clients can invent names."""
        if name not in self._counted:
            if len(self._counted) >= _COUNTED or not _SHOWABLE.fullmatch(name):
                return OTHER
            self._counted.add(name)
        return name


def shown_name(name: str) -> str:
    """A client's field name, made safe for headers and messages."""
    return name if _SHOWABLE.fullmatch(name) else OTHER


def header(names: list[str]) -> tuple[bytes, bytes]:
    """The header that lists dropped fields."""
    told = sorted({shown_name(name) for name in names[:_TOLD]})
    more = [f"and {len(names) - _TOLD} more"] if len(names) > _TOLD else []
    return IGNORED_HEADER, ", ".join([*told, *more]).encode()
