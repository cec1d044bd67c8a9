"""Shared by the clients' scripts: the address, a schema and a tool."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

BASE_URL, API_KEY, MODEL = os.environ["BASE_URL"], os.environ["API_KEY"], "m"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


class Animal(BaseModel):
    """An animal."""

    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)


def done(what: str, value: object) -> None:
    """Report what worked."""
    print(f"  {what}: {str(value)[:80]!r}")
