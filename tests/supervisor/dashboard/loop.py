"""Tests that are coroutines."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


def in_loop(test: Callable[Arguments, Coroutine[None, None, None]]) -> Callable[Arguments, None]:
    """Run the test in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        asyncio.run(test(*arguments, **named))

    return run
