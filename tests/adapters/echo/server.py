"""`python -m tests.adapters.echo.server HOST PORT BOOTSTRAP`: one engine of the echo kind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

DEADLINE_S = 10.0


class Engine:
    """One echo engine. Its rooms hold prompts that no decode engine has fetched yet."""

    def __init__(self) -> None:
        self.rooms: dict[str, asyncio.Future[str]] = {}
        self.running = self.tokens = 0
        self.token_s = float(os.environ.get("ECHO_TOKEN_S", "0.001"))

    def room(self, name: str) -> asyncio.Future[str]:
        """The room of that name. The first call creates it."""
        return self.rooms.setdefault(name, asyncio.get_running_loop().create_future())

    async def complete(self, request: Request) -> Response:
        """`keep`: hold the prompt for a decode engine; `fetch`: get it from a prefill engine; else: compute alone."""
        asked = await request.json()
        prompt, limit = str(asked.get("prompt") or asked["messages"][-1]["content"]), int(asked.get("max_tokens", 16))
        counts = {"prompt_tokens": len(prompt), "completion_tokens": limit}
        if "keep" in asked:
            self.room(asked["keep"]).set_result(prompt)
            return JSONResponse({"choices": [{"index": 0, "text": ""}], "usage": counts})
        if "fetch" in asked:
            try:
                async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
                    found = await client.get(f"http://{asked['fetch']}")
                    prompt = found.raise_for_status().text
            except httpx.HTTPError as failure:
                return JSONResponse({"error": {"message": f"no KV: {failure!r}", "type": "kv_lost"}}, 409)
        if asked.get("stream"):
            return StreamingResponse(
                self.stream(prompt, asked["so_far"], limit, counts), media_type="text/event-stream"
            )
        choice = {
            "index": 0,
            "text": "".join(prompt[at % len(prompt)] for at in range(limit)),
            "finish_reason": "length",
        }
        return JSONResponse({"choices": [choice], "usage": counts})

    async def stream(self, prompt: str, so_far: int, limit: int, counts: dict[str, int]) -> AsyncIterator[bytes]:
        """Send events, starting at token `so_far`."""
        self.running += 1
        try:
            for at in range(so_far, limit):
                await asyncio.sleep(self.token_s)
                self.tokens += 1
                token = prompt[at % len(prompt)]
                yield event(choices=[{
                    "index": 0, "text": token, "token_ids": [ord(token)],
                    "finish_reason": "length" if at == limit - 1 else None,
                }])  # fmt: skip
            yield event(choices=[], usage=counts) + b"data: [DONE]\n\n"
        finally:
            self.running -= 1

    async def fetch(self, request: Request) -> Response:
        """Return a room's prompt, once prefill has put it there."""
        name = request.path_params["room"]
        try:
            return Response(await asyncio.wait_for(self.room(name), DEADLINE_S))
        except (TimeoutError, asyncio.CancelledError):
            return Response(status_code=404)
        finally:
            self.rooms.pop(name, None)

    async def forget(self, request: Request) -> Response:
        """Remove a room: the proxy gave up the attempt."""
        if (room := self.rooms.pop((await request.json())["keep"], None)) is not None:
            room.cancel()
        return Response()

    async def progress(self, _: Request) -> Response:
        """Report progress to the supervisor."""
        return JSONResponse({"running": self.running, "tokens_total": self.tokens, "rooms": len(self.rooms)})


def event(**fields: Any) -> bytes:
    """One server-sent event."""
    return (
        f"data: {json.dumps({'id': 'e', 'created': 1, 'model': 'echo', **fields}, separators=(',', ':'))}\n\n".encode()
    )


async def main(host: str, port: int, bootstrap: int) -> None:
    """Serve on both ports until told to stop."""
    engine = Engine()
    paths = [Route(path, engine.complete, methods=["POST"]) for path in ("/v1/completions", "/v1/chat/completions")]
    paths += [Route("/forget", engine.forget, methods=["POST"]), Route("/progress", engine.progress)]
    paths += [Route("/health", lambda _: Response())]
    api, rooms = Starlette(routes=paths), Starlette(routes=[Route("/{room}", engine.fetch)])
    servers = [
        uvicorn.Server(uvicorn.Config(app, host, at, log_level="warning"))
        for app, at in ((api, port), (rooms, bootstrap))
    ]
    await asyncio.gather(*(server.serve() for server in servers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
