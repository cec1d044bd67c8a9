"""A fake vLLM worker for a real proxy: real sockets, its own process, no model. The prompt selects its behaviour.

    python vllm_worker.py PORT

"poison": dies. "stall": three tokens, then silence. "slow": 30 ms per token. "busy": refuses. "half": every third token
is half a character, and the process dies within the second one. Others are answered at once. Tokens are 0, 1, 2 and so
on by position, so that a continuation can be distinguished from a repetition."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TypedDict, cast

# The first token of a prompt that is answered with half characters.
HALVES = 8


class Stats(TypedDict):
    """What GET /stats tells; `headers`: the last request's."""

    requests: int
    open: int
    headers: dict[str, str]


STATS: Stats = {"requests": 0, "open": 0, "headers": {}}


def usage(prompt: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def choice(token: int, last: bool, halves: bool = False, **more: object) -> dict[str, object]:
    reason = "length" if last else None
    text = f" {token}"
    if halves:
        text = {0: text, 1: "", 2: f" {token - 1}{text}"}[token % 3]
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "token_ids": [token], **more}


async def answer(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
    prompt = cast("str | list[int]", body["prompt"])
    count = int(str(body.get("max_tokens", 16)))
    words = prompt if isinstance(prompt, str) else "resumed"
    if "poison" in words:
        os._exit(1)
    if "busy" in words:
        return whole(writer, {"error": {"message": "busy", "type": "server_error"}}, "503 Service Unavailable")
    params = body.get("kv_transfer_params")
    if isinstance(params, dict) and params.get("do_remote_decode"):
        held = {"do_remote_prefill": True, "remote_block_ids": [1], "remote_host": "h", "remote_port": 1}
        return whole(writer, {"choices": [choice(0, True)], "usage": usage(3, 1), "kv_transfer_params": held})
    first = 0 if isinstance(prompt, str) else len(prompt) - 3
    if not body.get("stream"):
        if "slow" in words:
            await asyncio.sleep(0.03 * count)
        text = "".join(f" {n}" for n in range(first, first + count))
        reply = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
        return whole(writer, {"id": "cmpl-x", "choices": [reply], "usage": usage(3, count)})
    halves = "half" in words or prompt[0] == HALVES
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for n in range(count):
        if "stall" in words and n == 3:
            await asyncio.sleep(3600)
        prompt_ids = {"prompt_token_ids": [HALVES if halves else 7, 7, 7]} if n == 0 else {}
        event(writer, {"choices": [choice(first + n, n == count - 1, halves, **prompt_ids)]})
        await writer.drain()
        if "half" in words and n == 4:
            await asyncio.sleep(0.1)
            os._exit(1)
        if "slow" in words:
            await asyncio.sleep(0.03)
    event(writer, {"choices": [], "usage": usage(3, count)})
    part(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    return None


def event(writer: asyncio.StreamWriter, found: dict[str, object]) -> None:
    outer = {"id": f"cmpl-{os.getpid()}", "object": "text_completion", "created": 1, "model": "m"}
    part(writer, b"data: " + json.dumps({**outer, **found}, separators=(",", ":")).encode() + b"\n\n")


def part(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def whole(writer: asyncio.StreamWriter, found: object, status: str = "200 OK") -> None:
    data = json.dumps(found, separators=(",", ":")).encode()
    writer.write(f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n".encode())
    writer.write(f"content-length: {len(data)}\r\n\r\n".encode() + data)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            raw = await reader.readexactly(int(headers.get("content-length", 0)))
            if head[0].startswith("GET /stats"):
                whole(writer, STATS)
            elif head[0].startswith("POST"):
                STATS["requests"] += 1
                STATS["headers"] = headers
                STATS["open"] += 1
                watch = asyncio.ensure_future(reader.read(1))
                work = asyncio.ensure_future(answer(json.loads(raw), writer))
                await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
                STATS["open"] -= 1
                if not work.done() or work.exception():
                    work.cancel()
                    return
                await writer.drain()
                data = await watch
                if not data:
                    return
                reader._buffer[:0] = data  # type: ignore[attr-defined]  # no public way to put a byte back
            else:
                whole(writer, {"ok": True})
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
