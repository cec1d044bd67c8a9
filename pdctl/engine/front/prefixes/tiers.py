"""Brings KV of a prompt's beginning back from the tiers that this engine's core has."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from uuid import uuid4

from pdctl.engine.front.core_client import CoreClient, RequestEvents
from pdctl.engine.front.prefixes.prompt import Prompt, Totals, Way, patience_s
from pdctl.engine.ipc.messages import Keep, Load, Look, Pulled, Reserve, Reserved, Seen

_log = logging.getLogger(__name__)

# The tiers answer within their own deadlines; this one is for a core that is busy.
_LOOK_S = 1.0


class TierLoader:
    """See Source: the tiers of this engine."""

    def __init__(self, core: CoreClient) -> None:
        self.totals = Totals()
        self._core = core

    async def ways(self, prompt: Prompt) -> list[Way]:
        """See Source.ways: all that the first tier has, and what the next ones have after that."""
        own = prompt.own(prompt.num_blocks)
        if own == prompt.num_blocks:
            return []
        runs = await self._look(prompt.names(prompt.num_blocks)[own:])
        return [Way(own + count, seconds, partial(self._load, prompt, own + count, seconds)) for count, seconds in runs]

    async def _look(self, names: list[bytes]) -> list[tuple[int, float]]:
        request_id = f"look.{uuid4().hex}"
        events = self._core.open(request_id)
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._core.send(Look(request_id, names))
                seen = await events.get()
            assert isinstance(seen, Seen)
            return seen.runs
        except TimeoutError:
            return []
        finally:
            self._core.keep(request_id)

    async def _load(self, prompt: Prompt, num_blocks: int, predicted_s: float) -> None:
        """Load blocks for whoever asks for them next."""
        request_id, is_kept = f"load.{uuid4().hex}", False
        events = self._core.open(request_id)
        try:
            async with asyncio.timeout(patience_s(predicted_s)):
                found, loaded = await self._loaded(request_id, events, prompt, num_blocks)
                if loaded:
                    tokens = (found + loaded) * prompt.block_size
                    # What is in the tiers was computed as this engine computes.
                    await self._core.send(Keep(request_id, self._core.endpoint.manifest.segment, tokens))
                    is_kept = True
                    self.totals.note(loaded * prompt.block_size)
        except TimeoutError:
            _log.info("KV did not come back in time, and is computed")
        finally:
            self._core.keep(request_id)
            if not is_kept:
                self.totals.lost += 1
                self._core.abort(request_id)

    async def _loaded(self, request_id: str, events: RequestEvents, prompt: Prompt, num_blocks: int) -> tuple[int, int]:
        """Reserve blocks and have them filled; how many were here already, and how many came."""
        tokens = num_blocks * prompt.block_size
        reserve = Reserve(request_id, tokens, list(prompt.token_ids[:tokens]), prompt.salt, only_now=True)
        await self._core.send(reserve)
        if not isinstance(reserved := await events.get(), Reserved):
            return 0, 0
        found = reserved.cached // prompt.block_size
        await self._core.send(Load(request_id, prompt.names(num_blocks)[found:], reserved.block_ids[found:]))
        pulled = await events.get()
        if not isinstance(pulled, Pulled) or pulled.error:
            _log.info("KV did not come back, and is computed: %s", pulled)
            return found, 0
        return found, pulled.blocks
