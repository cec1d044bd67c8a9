"""How messages say what their fields mean."""

from __future__ import annotations

import msgspec


def says(text: str) -> msgspec.Meta:
    """The meaning of a field, for docs/status-json.md."""
    return msgspec.Meta(description=text)
