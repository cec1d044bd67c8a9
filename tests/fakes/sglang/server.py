"""`python -m sglang.launch_server`, mocked: the API, and for prefill the bootstrap server."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.fakes.kv_events import Publisher, serve
from tests.fakes.sglang import shapes
from tests.fakes.sglang.shapes import Json, Shapes
from tests.fakes.sglang.state import FAKE_HOST, Engine, Faults, Room, next_token


class Lost(Exception):
    """The KV did not come."""


class Api:
    """The engine's HTTP API."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def generate(self, request: Request) -> Response:
        """A completion or a chat. Like SGLang's, it does not notice that its client has left before the first token."""
        engine, body, chat = self.engine, await request.json(), "chat" in request.url.path
        engine.counts["requests"] += 1
        if refusal := self._refusal(body, chat):
            return refusal
        task = asyncio.current_task()
        assert task is not None
        rid = str(body.get("rid") or f"none-{engine.counts['requests']}")
        engine.waiting[rid] = task
        try:
            prompt = await self._prompt(body, rid)
        except asyncio.CancelledError:
            # Aborted by its rid: the client, if there is still one, gets SGLang's failure.
            task.uncancel()
            return shapes.error("Prefill bootstrap failed for request: aborted by AbortReq.", 500, "500")
        except Lost as failure:
            if body.get("stream"):
                failed = shapes.error_event(str(failure), 500) + b"data: [DONE]\n\n"
                return Response(failed, media_type="text/event-stream")
            return shapes.error(str(failure), 500, "500")
        finally:
            engine.waiting.pop(rid, None)
        return await self._answer(body, Shapes(body, chat, prompt), rid)

    def _refusal(self, body: Json, chat: bool) -> Response | None:
        engine, room = self.engine, body.get("bootstrap_room")
        if status := engine.faults.status:
            engine.faults.status = 0
            return shapes.error("told to fail", status, "InternalServerError")
        if chat and body.get("stream") and body.get("return_token_ids"):
            return shapes.error("return_token_ids is not supported with streaming on /v1/chat/completions.")
        if engine.mode == "null":
            return None
        if room is None:
            engine.counts["without_room"] += 1
            return shapes.error("Invalid request: Disaggregated request received without bootstrap room id.")
        if body.get("bootstrap_host") != FAKE_HOST:
            if room in engine.used:
                engine.counts["reused"] += 1
                return shapes.error(f"room {room} was used before")
            engine.used.add(room)
        return None

    async def _prompt(self, body: Json, rid: str) -> list[int]:
        engine, mode = self.engine, self.engine.mode
        ids = _tokenized(body)
        if mode != "decode":
            engine.compute(ids)
        if mode == "null" or body.get("bootstrap_host") == FAKE_HOST:
            return ids
        if mode == "prefill":
            return await self._handed_over(ids, int(body["bootstrap_room"]), rid)
        if engine.faults.die_before_pull:
            os._exit(1)
        pulled = await self._pulled(body)
        if pulled != ids:
            os._exit(77)  # another request's KV: never happens if rooms are unique
        return ids

    async def _handed_over(self, ids: list[int], number: int, rid: str) -> list[int]:
        """Compute the prompt, and keep it until decode has it."""
        engine = self.engine
        room = engine.rooms[number] = Room()
        try:
            await asyncio.sleep(engine.prefill_s)
            engine.steps += 1
            engine.counts["prefilled"] += 1
            room.ids = ids
            async with asyncio.timeout(engine.bootstrap_s):
                await room.pulled.wait()
        except TimeoutError:
            engine.counts["timeouts"] += 1
            raise Lost(f"Prefill bootstrap failed for request req.rid='{rid}': timed out in Bootstrapping") from None
        finally:
            del engine.rooms[number]
        return ids

    async def _pulled(self, body: Json) -> list[int]:
        """Get the prompt from prefill. A prefill that is gone is noticed by its missed heartbeats."""
        engine = self.engine
        base = f"http://{body['bootstrap_host']}:{body['bootstrap_port']}"
        query = "prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
        try:
            client = httpx.AsyncClient(timeout=None, trust_env=False)
            async with asyncio.timeout(engine.waiting_s), client:
                if engine.faults.never_match:
                    await asyncio.Event().wait()
                (await client.get(f"{base}/route?{query}")).raise_for_status()
                found = await client.post(f"{base}/rooms/{body['bootstrap_room']}")
                engine.counts["pulled"] += 1
                return list(found.raise_for_status().json())
        except TimeoutError:
            engine.counts["timeouts"] += 1
            raise Lost("Decode transfer failed for request: timed out in WaitingForInput") from None
        except httpx.HTTPError as failure:
            await asyncio.sleep(engine.lost_s)
            raise Lost(f"Decode transfer failed for request: lost connection with prefill ({failure!r})") from None

    async def _answer(self, body: Json, made: Shapes, rid: str) -> Response:
        stream = self._tokens(body, made, rid)
        if body.get("stream"):
            return StreamingResponse(stream, media_type="text/event-stream")
        tokens = [token async for token in self._each(body, made.prompt)]
        return made.whole(tokens, "length")

    async def _each(self, body: Json, prompt: list[int]) -> AsyncIterator[int]:
        engine, ids = self.engine, list(prompt)
        count = 1 if engine.mode == "prefill" else _limit(body)
        engine.streams += 1
        try:
            for number in range(count):
                if number == engine.faults.die_after:
                    os._exit(1)
                await asyncio.sleep(engine.token_s)
                engine.tokens += 1
                engine.steps += 1
                ids.append(next_token(ids))
                yield ids[-1]
        finally:
            engine.streams -= 1

    async def _tokens(self, body: Json, made: Shapes, rid: str) -> AsyncIterator[bytes]:
        limit, count = _limit(body), 0
        if begin := made.begin():
            yield begin
        async for token in self._each(body, made.prompt):
            count += 1
            if count == self.engine.faults.retract_after:
                yield shapes.error_event("The request was retracted and cannot be resumed.", 503) + b"data: [DONE]\n\n"
                return
            if rid in self.engine.aborted:
                yield made.token(token, count, "abort") + made.end(count)
                return
            yield made.token(token, count, "length" if count == limit else None)
        yield made.end(count)

    async def abort(self, request: Request) -> Response:
        """End a request by its rid."""
        rid = (await request.json())["rid"]
        self.engine.aborted.append(rid)
        for name, task in list(self.engine.waiting.items()):
            if name.startswith(rid):
                task.cancel()
        return Response()

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt or a chat."""
        self.engine.counts["tokenized"] += 1
        ids = _tokenized(await request.json())
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": 2048})

    async def flush_cache(self, _: Request) -> Response:
        """Drop all blocks."""
        self.engine.publish(self.engine.cache.clear())
        return Response("Cache flushed.")

    async def loads(self, _: Request) -> Response:
        """What the scheduler published last."""
        core: Json = {
            "timestamp": time.time(), "dp_rank": 0, "num_running_reqs": len(self.engine.waiting) + self.engine.streams,
            "num_used_tokens": 0, "max_total_num_tokens": 100_000, "max_running_requests": 64,
            "total_prefill_uncached_tokens": self.engine.steps,
        }  # fmt: skip
        return JSONResponse({"version": "0.5.23", "loads": [core]})

    async def ready(self, _: Request) -> Response:
        """200 once the engine takes requests."""
        return Response(status_code=200 if self.engine.registered else 503)

    async def mock(self, request: Request) -> Response:
        """Set faults, or tell what happened."""
        if request.method == "POST":
            self.engine.faults = Faults(**await request.json())
        return JSONResponse(self.engine.told())


class Bootstrap:
    """The bootstrap server of a prefill engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def route(self, _: Request) -> Response:
        """What the instance is: 503 until its ranks have registered."""
        if not self.engine.registered:
            return Response("Prefill server not fully registered yet", 503)
        return JSONResponse({"attn_tp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16})

    async def pull(self, request: Request) -> Response:
        """Decode has found the room: it gets the KV when prefill has computed it."""
        number, rooms = int(request.path_params["room"]), self.engine.rooms
        while (room := rooms.get(number)) is None or room.ids is None:
            if await request.is_disconnected():
                return Response(status_code=404)
            await asyncio.sleep(0.005)
        self.engine.counts["pulled"] += 1
        room.pulled.set()
        return JSONResponse(room.ids)


def _limit(body: Json) -> int:
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)


def _tokenized(body: Json) -> list[int]:
    if "messages" in body:
        return list("".join(f"{m['role']}:{m['content']};" for m in body["messages"]).encode())
    prompt = body["prompt"]
    return list(prompt.encode()) if isinstance(prompt, str) else list(prompt)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sglang serve")
    for option in ("--model-path", "--served-model-name", "--dtype", "--device", "--disaggregation-transfer-backend"):
        parser.add_argument(option)
    for option in ("--port", "--nccl-port", "--context-length", "--max-running-requests", "--chunked-prefill-size"):
        parser.add_argument(option, type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--disaggregation-mode", default="null", choices=["null", "prefill", "decode"])
    parser.add_argument("--disaggregation-bootstrap-port", type=int, default=8998)
    parser.add_argument("--disaggregation-enable-kv-checksum", action="store_true")
    parser.add_argument("--disaggregation-decode-retraction-backup")
    parser.add_argument("--attention-backend")
    parser.add_argument("--enable-metrics", action="store_true")
    parser.add_argument("--kv-events-config", type=json.loads)
    return parser.parse_args(argv)


def _server(routes: list[Route], host: str, port: int) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(Starlette(routes=routes), host, port, log_level="warning"))


async def main(argv: list[str] | None = None) -> None:
    """Serve until told to stop."""
    arguments = _arguments(argv)
    engine = Engine(arguments.disaggregation_mode)
    if (config := arguments.kv_events_config) is not None:
        assert config["publisher"] == "zmq"
        engine.publisher = Publisher(config["endpoint"], config["replay_endpoint"])
    api, bootstrap = Api(engine), Bootstrap(engine)
    paths: list[tuple[str, Any, str]] = [
        ("/v1/completions", api.generate, "POST"), ("/v1/chat/completions", api.generate, "POST"),
        ("/abort_request", api.abort, "POST"), ("/v1/loads", api.loads, "GET"), ("/ready", api.ready, "GET"),
        ("/health", api.ready, "GET"), ("/health_generate", api.ready, "GET"),
        ("/tokenize", api.tokenize, "POST"), ("/flush_cache", api.flush_cache, "POST"),
    ]  # fmt: skip
    routes = [Route(path, handler, methods=[method]) for path, handler, method in paths]
    routes.append(Route("/mock", api.mock, methods=["GET", "POST"]))
    servers = [_server(routes, arguments.host, arguments.port)]
    if engine.mode == "prefill":
        meeting = [Route("/route", bootstrap.route), Route("/rooms/{room:int}", bootstrap.pull, methods=["POST"])]
        servers.append(_server(meeting, arguments.host, arguments.disaggregation_bootstrap_port))
    async with asyncio.TaskGroup() as tasks:
        if engine.publisher is not None:
            tasks.create_task(serve(engine.publisher))
        for server in servers:
            tasks.create_task(server.serve())
        engine.registered = True


if __name__ == "__main__":
    asyncio.run(main())
