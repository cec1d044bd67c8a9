"""Mistral: [TOOL_CALLS] [{"name": "f", "arguments": {}}], and since the tokenizer's version 11
[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable

from pdctl.engine.front.api.parsers.tool_calls.calls import NAME, GrowingText, JsonText, Namer, ToolText, text_of

_OPEN, _ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*{NAME}\s*,\s*"arguments"\s*:\s*(?=\{{)')
# A name, an id that the model may give, and a mark, before arguments.
_NAMED = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_NAMED_SO_FAR = re.compile(r"\s*[\w.:/-]*\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?")
# Mistral's templates accept only ids of nine letters and digits.
_LETTERS, _ID_LENGTH = string.ascii_letters + string.digits, 9


class MistralText(GrowingText):
    """See ToolText."""

    def __init__(self, namer: Namer) -> None:
        super().__init__(namer)
        self._now: Callable[[], bool] = self._text
        # Text of a call so far, in case that it is none.
        self._before = ""
        self._in_list = self._in_object = False
        self._arguments = JsonText()
        self._outer = JsonText()

    def _step(self) -> bool:
        return self._now()

    def _text(self) -> bool:
        if not self._show_until(_OPEN):
            return False
        self._before, self._now = _OPEN, self._opened
        return True

    def _opened(self) -> bool:
        rest = self._held.lstrip()
        if not rest:
            return False
        self._in_list = rest.startswith("[")
        if self._in_list:
            self._before += self._held[: len(self._held) - len(rest) + 1]
            self._held = rest[1:]
        self._now = self._item if self._in_list or rest.startswith("{") else self._name
        return True

    def _name(self) -> bool:
        """A name before its arguments."""
        named = _NAMED.match(self._held)
        if named is not None:
            self._held = self._held[named.end() :]
            self._begin(named[1], "")
            self._now, self._arguments, self._in_object = self._grow, JsonText(), False
            return True
        mark = max((n for m in (_ID, _ARGS) for n in range(len(m)) if self._held.endswith(m[:n])), default=0)
        if _NAMED_SO_FAR.fullmatch(self._held[: len(self._held) - mark]):
            return False
        return self._no_call()

    def _no_call(self) -> bool:
        """What is held is text."""
        self._show(self._before)
        self._before, self._now = "", self._text
        return True

    def _item(self) -> bool:
        """An object that is a call."""
        head = _HEAD.match(self._held)
        name = None if head is None else text_of(head[1])
        if head is not None and name is not None:
            self._held = self._held[head.end() :]
            self._begin(name, "")
            self._now, self._arguments, self._in_object = self._grow, JsonText(), True
            self._outer = JsonText(depth=1)
            return True
        rest = self._held.lstrip()
        if not rest:
            return False
        if not rest.startswith("{"):
            return self._no_call()
        self._before += self._held[: len(self._held) - len(rest)]
        self._held = rest
        whole = self._whole_object()
        if whole is None:
            return False
        if not self._whole(whole, "arguments"):
            return self._no_call()
        self._held, self._now = self._held[len(whole) :], self._after
        return True

    def _grow(self) -> bool:
        more, self._held = self._arguments.take(self._held)
        self._more(more)
        if self._arguments.ended:
            self._before = ""
            self._now = self._tail if self._in_object else self._after
        return self._arguments.ended

    def _tail(self) -> bool:
        """The rest of an object after its arguments."""
        _, self._held = self._outer.take(self._held)
        if self._outer.ended:
            self._now = self._after
        return self._outer.ended

    def _after(self) -> bool:
        """After a call: another object of the list, or its end."""
        self._before = ""
        rest = self._held.lstrip()
        if not rest:
            return False
        if self._in_list and rest[0] in ",]":
            self._held = rest[1:]
            self._now = self._item if rest[0] == "," else self._after
            self._in_list = rest[0] == ","
            return True
        self._held, self._now = rest, self._text
        return True

    def _finish(self) -> None:
        if self._now in (self._grow, self._tail) or (self._now == self._after and not self._held.strip()):
            return
        self._show(self._before + self._held)


class _Mistral:
    """See Family."""

    markers: tuple[str, ...] = (_OPEN, _ID, _ARGS)
    openers: tuple[str, ...] = (_OPEN,)

    def recognizes(self, template: str) -> bool:
        """See Family.recognizes."""
        return _OPEN in template or "[AVAILABLE_TOOLS]" in template

    def namer(self, request_id: str) -> Namer:
        """See Family.namer."""

        def named(number: int) -> str:
            digest = hashlib.sha256(f"{request_id} {number}".encode()).digest()
            return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:_ID_LENGTH])

        return named

    def parser(self, namer: Namer, tools: list[dict[str, object]]) -> ToolText:
        """See Family.parser."""
        return MistralText(namer)


FAMILY = _Mistral()
