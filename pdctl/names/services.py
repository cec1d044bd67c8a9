"""Names of services. They are also names of folders and files: one that is not checked could lead to any folder."""

from __future__ import annotations

import re

from pdctl.errors import PdctlError

NAME = r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?"
NAME_WORDS = "lower-case letters, digits and inner dashes, at most 40"


def checked_service(service: str) -> str:
    """The name of a service. Raises PdctlError for one that no topology has."""
    if not re.fullmatch(NAME, service):
        raise PdctlError(f"{service!r} is not a service's name", f"use {NAME_WORDS}")
    return service
