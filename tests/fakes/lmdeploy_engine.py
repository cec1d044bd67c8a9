"""A fake LMDeploy api_server of DistServe: its wire, its sessions and blocks, and its known faults. No model.

    python lmdeploy_engine.py --role Prefill --port PORT [--id-style int|neg1|uuid|real] [--cache-session-id] ...

A token is a byte. The KV of a prompt is the prompt, in blocks of a small pool; decode answers with what it reads there,
repeated, so a block that was overwritten or freed too early gives a wrong answer. As in LMDeploy 0.18:

- prefill ends after one token; it answers 500 in plain text if that token ends the answer (the prompt begins with EOS);
- a kept sequence is evicted when a new prompt needs its blocks;
- closing a running prefill call breaks the engine;
- decode tells prefill over ZeroMQ that it may free the KV, and waits for ever if prefill is not linked to it any more.

POST /_fault sets faults while it runs; GET /_stats tells what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

import httpx
import uvicorn
import zmq.asyncio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

EOS = "\x03"
BLOCK = 16
HEADER = "x-lmdeploy-distserve-proxy"


@dataclass
class Sequence:
    """One session's KV. `running`: not evictable."""

    blocks: list[int]
    running: bool = True


@dataclass
class Link:
    """One end of a link. `nonce`: of the peer's start when it was made."""

    push: zmq.asyncio.Socket
    pull: zmq.asyncio.Socket
    nonce: str = ""
    reader: asyncio.Task[None] | None = None

    def close(self) -> None:
        if self.reader is not None:
            self.reader.cancel()
        self.push.close(linger=0)
        self.pull.close(linger=0)


@dataclass
class Engine:
    options: argparse.Namespace
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))
    started: float = field(default_factory=time.time)
    sessions: itertools.count[int] = field(default_factory=itertools.count)
    pool: dict[int, str] = field(default_factory=dict)
    held: dict[int, Sequence] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    stats: Counter[str] = field(default_factory=Counter)
    faults: set[str] = field(default_factory=set)
    running: int = 0
    broken: bool = False
    most_held: int = 0
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    context: zmq.asyncio.Context = field(default_factory=zmq.asyncio.Context)

    # -- blocks --------------------------------------------------------------------------------------------

    async def allocate(self, session: int, text: str) -> Sequence:
        """Write a prompt into the pool. Evicts kept sequences, oldest first, as LMDeploy does."""
        wanted = -(-len(text) // BLOCK) or 1
        while len(free := [b for b in range(self.options.blocks) if b not in self.taken()]) < wanted:
            victim = next((s for s, kept in self.held.items() if not kept.running and kept.blocks), None)
            if victim is None:
                self.freed.clear()
                await self.freed.wait()
                continue
            self.stats["evicted"] += 1
            self.held[victim].blocks = []
        found = Sequence(free[:wanted])
        for number, block in enumerate(found.blocks):
            self.pool[block] = text[number * BLOCK : (number + 1) * BLOCK]
        self.held[session] = found
        self.most_held = max(self.most_held, len(self.taken()))
        return found

    def taken(self) -> set[int]:
        return {block for kept in self.held.values() for block in kept.blocks}

    def end(self, session: int, how: str) -> None:
        self.stats[how] += 1
        if self.held.pop(session, None) is None:
            self.stats["unknown_frees"] += 1
        self.freed.set()

    # -- links ---------------------------------------------------------------------------------------------

    async def engine_info(self, _: Request) -> Response:
        config = {
            "tp_size": self.options.tp, "ep_size": 1, "dp_size": 1, "pp_size": None, "dp_rank": 0,
            "block_size": BLOCK, "num_cpu_blocks": 0, "num_gpu_blocks": self.options.blocks,
        }  # fmt: skip
        return JSONResponse(json.dumps(config))

    async def initialize(self, request: Request) -> Response:
        body = await request.json()
        self.stats["initialized"] += 1
        if "p2p_initialize" in self.faults:
            return PlainTextResponse("Internal Server Error", 500)
        if "p2p_initialize_hangs" in self.faults:
            await self.released.wait()
        if "p2p_status" in self.faults:
            nothing = {"engine_endpoint_info": {"zmq_address": ""}, "kvtransfer_endpoint_info": []}
            return JSONResponse({"status": 2, **nothing})
        if body["remote_engine_id"] in self.links:
            self.stats["leaked_links"] += 1
        host = urlparse(body["local_engine_id"]).hostname
        push = self.context.socket(zmq.PUSH)
        port = push.bind_to_random_port(f"tcp://{host}")
        self.links[body["remote_engine_id"]] = Link(push, self.context.socket(zmq.PULL))
        pools = [{"shape": [2, self.options.blocks, BLOCK, 1, 8], "dtype": self.options.dtype, "element_size": 2,
                  "entry_axis": 1}]  # fmt: skip
        rank = {"protocol": body["protocol"], "endpoint_info": json.dumps({"nonce": self.nonce}), "cache_pools": pools}
        return JSONResponse({
            "status": 1,
            "engine_endpoint_info": {"zmq_address": f"tcp://{host}:{port}"},
            "kvtransfer_endpoint_info": [rank] * self.options.tp,
        })  # fmt: skip

    async def connect(self, request: Request) -> Response:
        body = await request.json()
        self.stats["connected"] += 1
        if "p2p_connect" in self.faults:
            return PlainTextResponse("Internal Server Error", 500)
        link = self.links[body["remote_engine_id"]]
        link.pull.connect(body["remote_engine_endpoint_info"]["zmq_address"])
        link.nonce = json.loads(body["remote_kvtransfer_endpoint_info"][0]["endpoint_info"])["nonce"]
        link.reader = asyncio.ensure_future(self.receive(link))
        return JSONResponse({"status": 1})

    async def receive(self, link: Link) -> None:
        while True:
            self.end(int((await link.pull.recv_json())["remote_session_id"]), "freed_by_decode")

    async def drop(self, request: Request) -> Response:
        body = await request.json()
        self.stats["dropped"] += 1
        self.links.pop(body["remote_engine_id"]).close()  # KeyError: 500, as in LMDeploy
        return JSONResponse({"success": True})

    async def free_cache(self, request: Request) -> Response:
        self.end(int((await request.json())["remote_session_id"]), "freed_by_call")
        return JSONResponse({"status": "SUCCESS"})

    async def kv(self, request: Request) -> Response:
        """What a one-sided read would see."""
        if request.query_params["nonce"] != self.nonce:
            return Response(status_code=404)
        blocks = map(int, request.query_params["blocks"].split(","))
        return PlainTextResponse("".join(self.pool.get(block, "?") for block in blocks))

    # -- requests ------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self.generate(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self.generate(request, chat=True)

    async def generate(self, request: Request, chat: bool) -> Response:
        body = await request.json()
        self.stats["requests"] += 1
        self.stats["named_sessions"] += "session_id" in body
        if self.broken or "hang" in self.faults:
            self.stats["hung"] += 1
            await self.wait(request)
        session = next(self.sessions)
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        if (refused := self.refusal(request, body, prompt)) is not None:
            return refused
        answer_id = self.id_of(chat, session, body)
        if body.get("with_cache"):
            return await self.prefill(request, body, prompt, session, answer_id, chat)
        self.running += 1
        source = body.get("migration_request")
        try:
            text = prompt if source is None else await self.migrate(request, source)
        except BaseException:
            self.running -= 1
            raise
        count = 1 if self.options.role == "Prefill" else min(
            int(body.get("max_completion_tokens") or body.get("max_tokens") or 512), 512
        )  # fmt: skip
        if prompt.startswith(EOS):
            count = 0
        stream = self.stream(body, text, count, answer_id, chat)
        if body.get("stream"):
            return StreamingResponse(stream, media_type="text/event-stream")
        parts = [part async for part in stream]
        if "aborted" in parts[-1]:
            return error(500, "aborted")
        return JSONResponse(self.whole(body, text, count, answer_id, chat))

    def refusal(self, request: Request, body: dict[str, Any], prompt: str) -> Response | None:
        is_hand_over = bool({"with_cache", "migration_request"} & body.keys())
        if is_hand_over and self.options.needs_header and HEADER not in request.headers:
            return error(400, "hand-overs are for the proxy only")
        if "busy" in self.faults:
            return error(503, "The inference engine is unavailable.", "server_error")
        if "too long" in prompt:
            return error(400, "The request exceeds the model context length.")
        if "error200" in self.faults:
            return JSONResponse({"error_code": 10402, "text": "Failed to get response after a period of time"})
        return None

    async def prefill(
        self, request: Request, body: dict[str, Any], prompt: str, session: int, answer_id: str, chat: bool
    ) -> Response:
        if "prefill500" in self.faults:
            return PlainTextResponse("Internal Server Error", 500)
        self.running += 1
        kept = await self.allocate(session, prompt)
        try:
            while "slow_prefill" in self.faults:
                await asyncio.sleep(0.01)
            if await request.is_disconnected():
                self.stats["closed_prefills"] += 1
                self.broken = True
        finally:
            self.running -= 1
            kept.running = False
        self.stats["succeeded"] += 1
        if prompt.startswith(EOS):
            return PlainTextResponse("Internal Server Error", 500)
        answer = self.whole(body, prompt, 1, answer_id, chat)
        answer |= {"cache_block_ids": kept.blocks, "remote_token_ids": [ord(prompt[0])]}
        if self.options.cache_session_id:
            answer["cache_session_id"] = session
        return JSONResponse(answer)

    async def wait(self, request: Request) -> None:
        """Until a test clears the faults. Raises ClientDisconnect."""
        released = self.released
        while not released.is_set():
            if await request.is_disconnected():
                self.stats["left"] += 1
                raise ClientDisconnect
            await asyncio.sleep(0.02)

    async def migrate(self, request: Request, source: dict[str, Any]) -> str:
        """Read KV, and tell prefill that it may free it. Never returns if prefill is another one than when linked."""
        self.stats["migrations"] += 1
        link = self.links.get(source["remote_engine_id"])
        if link is not None and "no_migration" not in self.faults:
            blocks = ",".join(map(str, source["remote_block_ids"]))
            with suppress(httpx.TransportError):
                async with httpx.AsyncClient(trust_env=False) as client:
                    found = await client.get(
                        f"{source['remote_engine_id']}/_kv", params={"blocks": blocks, "nonce": link.nonce},
                        headers=self.authorization,
                    )  # fmt: skip
                if found.status_code == 200:
                    await link.push.send_json({
                        "remote_engine_id": source["remote_engine_id"],
                        "remote_session_id": source["remote_session_id"],
                    })  # fmt: skip
                    return found.text
        self.stats["stuck_migrations"] += 1
        await self.wait(request)
        raise ClientDisconnect

    async def stream(
        self, body: dict[str, Any], text: str, count: int, answer_id: str, chat: bool
    ) -> AsyncIterator[str]:
        try:
            for at in range(count):
                token = text[at % len(text)]
                choice: dict[str, Any] = {"index": 0}
                choice |= {"delta": {"role": "assistant", "content": token}} if chat else {"text": token}
                if chat and body.get("return_token_ids"):
                    choice["output_ids"] = [ord(token)]
                yield self.event(body, answer_id, [choice])
                if at == 3 and "die_mid_stream" in self.faults:
                    os._exit(1)
                if at == 3 and "abort_mid_stream" in self.faults:
                    yield self.event(body, answer_id, [{"index": 0, **empty(chat), "finish_reason": "abort"}])
                    return
                if at == 3 and "error_mid_stream" in self.faults:
                    yield f"data: {json.dumps({'error': failure(500, 'aborted')})}\n\n"
                    yield "data: [DONE]\n\n"
                    return
                await asyncio.sleep(self.options.token_s)
            reason = "length" if count else "stop"
            yield self.event(body, answer_id, [{"index": 0, **empty(chat), "finish_reason": reason}])
            if (body.get("stream_options") or {}).get("include_usage"):
                yield self.event(body, answer_id, [], self.usage(text, count))
            yield "data: [DONE]\n\n"
            self.stats["succeeded"] += 1
        finally:
            self.running -= 1
            self.stats["tokens"] += count

    def event(
        self, body: dict[str, Any], answer_id: str, choices: list[Any], usage: dict[str, int] | None = None
    ) -> str:
        outer = {"id": answer_id, "object": "chunk", "created": 1, "model": body["model"]}
        return f"data: {json.dumps({**outer, 'choices': choices, 'usage': usage})}\n\n"

    def whole(self, body: dict[str, Any], text: str, count: int, answer_id: str, chat: bool) -> dict[str, Any]:
        said = "".join(text[at % len(text)] for at in range(count))
        message = {"role": "assistant", "content": said, "tool_calls": None}
        part: dict[str, Any] = {"message": message} if chat else {"text": said}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": "length" if count else "stop"}
        return {
            "id": answer_id, "object": "text_completion", "created": 1, "model": body["model"], "choices": [choice],
            "usage": self.usage(text, count),
        }  # fmt: skip

    def usage(self, text: str, count: int) -> dict[str, int]:
        return {"prompt_tokens": len(text), "total_tokens": len(text) + count, "completion_tokens": count}

    def id_of(self, chat: bool, session: int, body: dict[str, Any]) -> str:
        style = self.options.id_style
        if style == "real":
            style = "uuid" if chat else "neg1"
        if style == "uuid":
            return f"chatcmpl-{secrets.token_urlsafe(16)}"
        return str(body.get("session_id", -1)) if style == "neg1" else str(session)

    # -- the rest ------------------------------------------------------------------------------------------

    @property
    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.options.api_key}"} if self.options.api_key else {}

    async def health(self, _: Request) -> Response:
        ill = self.broken or "unhealthy" in self.faults
        return JSONResponse({"status": "unhealthy" if ill else "healthy"}, 503 if ill else 200)

    async def terminate(self, _: Request) -> Response:
        if not self.options.allow_terminate_by_client:
            return error(400, "The server can not be terminated.")
        os.kill(os.getpid(), signal.SIGTERM)
        return Response()

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def metrics(self, _: Request) -> Response:
        labels = '{engine="0",model_name="m"}'
        lines = {
            f"lmdeploy:num_requests_running{labels}": float(self.running),
            f"lmdeploy:num_requests_succeeded{labels}": float(self.stats["succeeded"]),
            f"lmdeploy:num_requests_failed{labels}": 0.0,
            f"lmdeploy:generation_tokens_total{labels}": float(self.stats["tokens"]),
            "process_start_time_seconds": self.started,
        }
        return PlainTextResponse("# HELP x y\n" + "".join(f"{name} {value}\n" for name, value in lines.items()))

    async def fault(self, request: Request) -> Response:
        self.faults = set((await request.json())["fail"])
        if not self.faults:
            self.released.set()
            self.released = asyncio.Event()
        return Response()

    async def told(self, _: Request) -> Response:
        return JSONResponse({
            **self.stats, "held": len(self.held), "held_blocks": len(self.taken()), "running": self.running,
            "links": len(self.links), "broken": self.broken, "most_held": self.most_held,
        })  # fmt: skip


def empty(chat: bool) -> dict[str, Any]:
    return {"delta": {"role": "assistant", "content": ""}} if chat else {"text": ""}


def failure(status: int, message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"message": message, "type": kind, "code": status, "param": None, "object": "error"}


def error(status: int, message: str, kind: str = "invalid_request_error") -> Response:
    return JSONResponse(failure(status, message, kind), status)


class Keys:
    """LMDeploy's own check: every path but /health needs the key. And JSON must be sent as JSON."""

    def __init__(self, app: Starlette, key: str) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            if self.key and not scope["path"].startswith(("/health", "/_")) and (
                headers.get(b"authorization") != f"Bearer {self.key}".encode()
            ):  # fmt: skip
                await error(401, "Unauthorized.", "authentication_error")(scope, receive, send)
                return
            if scope["method"] == "POST" and headers.get(b"content-type") != b"application/json":
                await Response(status_code=422)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def register(options: argparse.Namespace) -> None:
    """As LMDeploy: once, before it listens; a failure is only logged. httpx, as LMDeploy's requests, makes an
    Authorization header of the user and password in a URL."""
    role = {"Hybrid": 1, "Prefill": 2, "Decode": 3}[options.role]
    data = {"url": f"http://{options.host}:{options.port}", "status": {"models": ["m"], "role": role}}
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"{options.proxy_url}/nodes/add", json=data, headers={"accept": "application/json"})
    if answer.status_code != 200:
        print(f"Service registration failed: {answer.status_code}: {answer.text}", flush=True)


async def serve(options: argparse.Namespace) -> None:
    engine = Engine(options)
    posts = {
        "/v1/completions": engine.completions, "/v1/chat/completions": engine.chat,
        "/distserve/p2p_initialize": engine.initialize, "/distserve/p2p_connect": engine.connect,
        "/distserve/p2p_drop_connect": engine.drop, "/distserve/free_cache": engine.free_cache, "/_fault": engine.fault,
    }  # fmt: skip
    gets = {
        "/health": engine.health, "/v1/models": engine.models, "/metrics": engine.metrics, "/_stats": engine.told,
        "/distserve/engine_info": engine.engine_info, "/_kv": engine.kv, "/terminate": engine.terminate,
    }  # fmt: skip
    routes = [Route(path, act, methods=["POST"]) for path, act in posts.items()]
    routes += [Route(path, act) for path, act in gets.items()]
    app = Keys(Starlette(routes=routes), options.api_key)
    if options.proxy_url:
        await register(options)
    await uvicorn.Server(uvicorn.Config(app, options.host, options.port, log_level="error")).serve()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", choices=["Hybrid", "Prefill", "Decode"], required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--id-style", choices=["int", "neg1", "uuid", "real"], default="int")
    parser.add_argument("--cache-session-id", action="store_true")
    parser.add_argument("--needs-header", action="store_true")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--proxy-url", default="")
    parser.add_argument("--allow-terminate-by-client", action="store_true")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="torch.bfloat16")
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--token-s", type=float, default=0.0)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
