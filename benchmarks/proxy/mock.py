"""A mock worker, as fast as this machine allows: prefill answers with kv_transfer_params, decode streams.

It supports vLLM's API, and as much of LMDeploy's DistServe as LMDeploy's proxy needs.

    python -m benchmarks.proxy.mock --port P [--chunks 64]

POST /mock/pace with {"ms": N} sets the pause between chunks; 0 writes them all at once. GET /mock/stats counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import cast

import httptools
import uvloop

KV = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1, 2, 3, 4]],
    "remote_engine_id": "mock", "remote_request_id": "r", "remote_host": "127.0.0.1", "remote_port": 5600, "tp_size": 1,
}  # fmt: skip

# DistServe: what LMDeploy's engines report about themselves and their connections.
ENGINE_INFO = {"tp_size": 1, "ep_size": 1, "dp_size": 1, "pp_size": None, "dp_rank": 0, "block_size": 64,
               "num_cpu_blocks": 0, "num_gpu_blocks": 1024}  # fmt: skip
LINK = {
    "status": 1,
    "engine_endpoint_info": {"zmq_address": "tcp://127.0.0.1:5601"},
    "kvtransfer_endpoint_info": [{"protocol": 2, "endpoint_info": "{}", "cache_pools": None}],
}


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class Answers:
    """All answers, created once."""

    def __init__(self, chunks: int) -> None:
        self.pace_s = 0.0
        self.stats = {"requests": 0, "streams": 0, "closed_early": 0}
        usage = {"prompt_tokens": 8, "completion_tokens": chunks, "total_tokens": chunks + 8}
        outer = {"id": "cmpl-m", "object": "text_completion", "created": 1, "model": "mock"}
        whole = {"index": 0, "text": " tok" * chunks, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        self.held = self._whole({**outer, "choices": [whole], "usage": usage, "kv_transfer_params": KV})
        cached = {"cache_block_ids": [0, 1], "remote_token_ids": [1000]}
        self._cached = self._whole({**outer, "id": "session0", "choices": [whole], "usage": usage, **cached})
        self._sessions = 0
        self.whole = self._whole({**outer, "choices": [whole], "usage": usage})
        self.head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.chunks = []
        for number in range(chunks):
            reason = "length" if number == chunks - 1 else None
            choice = {"index": 0, "text": f" tok{number}", "logprobs": None, "finish_reason": reason,
                      "stop_reason": None, "token_ids": [number]}  # fmt: skip
            self.chunks.append(self._chunk(b"data: " + compact({**outer, "choices": [choice]}) + b"\n\n"))
        counts = b"data: " + compact({**outer, "choices": [], "usage": usage}) + b"\n\n"
        self.tail = self._chunk(counts) + self._chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        self.burst = self.head + b"".join(self.chunks) + self.tail

    def cached(self) -> bytes:
        """LMDeploy's prefill answer; its proxy fails if two answers have the same id."""
        self._sessions += 1
        return self._cached.replace(b"session0", b"%08d" % self._sessions)

    @staticmethod
    def _whole(value: object) -> bytes:
        body = compact(value)
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    @staticmethod
    def _chunk(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data)


class Worker(asyncio.Protocol):
    """One connection."""

    def __init__(self, answers: Answers, tasks: asyncio.TaskGroup) -> None:
        self.answers = answers
        self.tasks = tasks
        self.streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.streaming is not None and not self.streaming.done():
            self.answers.stats["closed_early"] += 1
            self.streaming.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            # sglang-router first sends an HTTP/2 preface.
            self.transport.close()

    def on_message_begin(self) -> None:
        self.url, self.body = b"", b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if self.url.startswith(b"/v1/completions"):
            self.complete()
        elif self.url.startswith(b"/mock/pace"):
            self.answers.pace_s = json.loads(self.body)["ms"] / 1000
            self.transport.write(self.answers._whole({"ok": True}))
        elif self.url.startswith(b"/distserve/engine_info"):
            # A string that contains JSON, as in LMDeploy.
            self.transport.write(self.answers._whole(json.dumps(ENGINE_INFO)))
        elif self.url.startswith(b"/distserve/"):
            self.transport.write(self.answers._whole(LINK))
        else:
            stats = self.answers.stats if self.url.startswith(b"/mock/stats") else {"data": [{"id": "mock"}]}
            self.transport.write(self.answers._whole({**stats, "object": "list", "dp_size": 1, "model_path": "mock"}))

    def complete(self) -> None:
        answers = self.answers
        answers.stats["requests"] += 1
        if b'"do_remote_decode":true' in self.body:
            self.transport.write(answers.held)
        elif b'"with_cache":true' in self.body.replace(b" ", b""):
            self.transport.write(answers.cached())
        elif b'"stream":true' not in self.body and b'"stream": true' not in self.body:
            # sglang-router also asks prefill for a stream, and discards the answer.
            self.transport.write(answers.held if b'"max_tokens":1,' in self.body else answers.whole)
        else:
            answers.stats["streams"] += 1
            if answers.pace_s:
                self.streaming = self.tasks.create_task(self.stream())
            else:
                self.transport.write(answers.burst)

    async def stream(self) -> None:
        self.transport.write(self.answers.head)
        for chunk in self.answers.chunks:
            self.transport.write(chunk)
            await asyncio.sleep(self.answers.pace_s)
        self.transport.write(self.answers.tail)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=64)
    found = parser.parse_args()
    answers = Answers(found.chunks)
    async with asyncio.TaskGroup() as tasks:
        server = await asyncio.get_running_loop().create_server(
            lambda: Worker(answers, tasks), "127.0.0.1", found.port, backlog=4096
        )
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
