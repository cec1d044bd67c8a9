"""What the clients' scripts share: where to ask, a schema and a tool."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, Field

BASE_URL, API_KEY, MODEL = os.environ["BASE_URL"], os.environ["API_KEY"], "m"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]


class Animal(BaseModel):
    """An animal."""

    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)


def done(what: str, value: object) -> None:
    """Say what worked."""
    print(f"  {what}: {str(value)[:80]!r}")
