"""Learns where pieces of prompts end in blocks: from the tokens of answered prompts, off the requests' path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Never

import msgspec

from pdctl.adapters import EngineError, RequestState
from pdctl.net.http_client import Unreachable, header_lines
from pdctl.net.prefixes.beginnings import Beginning
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.prefixes.places import Places

# Prompts that wait, and the longest one, in bytes. What comes beyond is not learned: the next one like it may be.
_MOST_WAITING, _MOST_BYTES = 16, 2**18
_CALL_S = 5.0
_LATER_S = 0.5
_TOKEN_LIMIT = 2**32
# Types of the parts of a message that are no text. In a text, their quotes would have backslashes.
_MEDIA = (b'"image_url"', b'"input_audio"', b'"audio_url"', b'"video_url"', b'"file"')
_JSON = header_lines({"content-type": "application/json"})

_decode_ids = msgspec.json.Decoder(list[int]).decode
_decode_text = msgspec.json.Decoder(str).decode


class Learner:
    """`put` never waits. `engines`: all, now; `learned`: prompts so far."""

    def __init__(self, places: Places, engines: Callable[[], Sequence[Engine]]) -> None:
        self.learned = 0
        self._places = places
        self._engines = engines
        self._waiting: asyncio.Queue[tuple[Engine, Beginning, RequestState]] = asyncio.Queue(_MOST_WAITING)

    def put(self, engine: Engine, beginning: Beginning, state: RequestState) -> None:
        """An engine has computed this prompt. Dropped if there is nothing to learn, or too much to do."""
        index = engine.prefixes.batches.index
        if (
            engine.dialect.tokenizer is None
            or not index.block_size
            or beginning.size > _MOST_BYTES
            or _has_media(state)
        ):
            return
        if not self._waiting.full() and not self._places.knows(beginning.pieces, index.block_size, index.has):
            self._waiting.put_nowait((engine, beginning, state))

    async def run_forever(self) -> Never:
        """Learn what was put, one prompt after the other."""
        while True:
            await self._learn(*await self._waiting.get())
            self._waiting.task_done()

    async def _learn(self, engine: Engine, beginning: Beginning, state: RequestState) -> None:
        if self._knows(beginning):
            return
        token_ids = await self._tokens(engine, state)
        # The numbers come from clients and engines.
        if not token_ids or not 0 <= min(token_ids) <= max(token_ids) < _TOKEN_LIMIT:
            return
        self._note(beginning, token_ids, _salt(state))
        if not self._knows(beginning):
            # The events of its blocks may be later than its answer.
            await asyncio.sleep(_LATER_S)
            self._note(beginning, token_ids, _salt(state))
        self.learned += 1

    def _note(self, beginning: Beginning, token_ids: Sequence[int], salt: str) -> None:
        for size in self._sizes():
            self._places.note(beginning, token_ids, salt, size, self._is_there)

    def _knows(self, beginning: Beginning) -> bool:
        return all(self._places.knows(beginning.pieces, size, self._is_there) for size in self._sizes())

    def _sizes(self) -> set[int]:
        """The block sizes of all engines that are followed."""
        return {size for engine in self._engines() if (size := engine.prefixes.batches.index.block_size)}

    def _is_there(self, block: int) -> bool:
        return any(engine.prefixes.batches.index.has(block) for engine in self._engines())

    async def _tokens(self, engine: Engine, state: RequestState) -> list[int]:
        """The prompt's tokens, as the engine or the client has told them; else the engine is asked. [] if unknown."""
        if found := state.prompt_ids or _given(state):
            return found
        tokenizer = engine.dialect.tokenizer
        assert tokenizer is not None
        call = tokenizer.call(state)
        try:
            lines = engine.headers + call.headers + _JSON
            answer = await engine.client.request("POST", call.path, lines, call.body, timeout_s=_CALL_S)
            return tokenizer.tokens(answer.body) if answer.status == 200 else []
        except (Unreachable, EngineError):
            return []


def _given(state: RequestState) -> list[int]:
    """The tokens, if the client has sent them instead of a text."""
    prompt = state.fields.get("prompt")
    if not isinstance(prompt, msgspec.Raw) or not bytes(prompt).startswith(b"["):
        return []
    try:
        return _decode_ids(prompt)
    except msgspec.DecodeError:
        return []


def _has_media(state: RequestState) -> bool:
    """The names of its blocks depend on more than tokens, and an engine that is asked would load the media again."""
    said = state.fields.get("messages")
    return isinstance(said, msgspec.Raw) and any(word in bytes(said) for word in _MEDIA)


def _salt(state: RequestState) -> str:
    found = state.fields.get("cache_salt")
    try:
        return _decode_text(found) if isinstance(found, msgspec.Raw) else ""
    except msgspec.DecodeError:
        return ""
