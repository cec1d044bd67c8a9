"""A fake vLLM engine that uses a real Mooncake store: the command line, the files and the HTTP API of vLLM, no model.

Its "KV" of a prompt is a number that decides the answer. Prefill computes it from the prompt and puts it into the
store; decode gets it from there, or computes it. So an answer made from another prompt's KV is a wrong answer. The test
makes this file the module `vllm.entrypoints.openai.api_server` of an environment of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mooncake.store import MooncakeDistributedStore

# A call to a store whose master is dead takes seconds: a miss is cheaper.
_PATIENCE_S = 0.5


def answer_of(prompt: object) -> int:
    """The number that decides the answer to a prompt."""
    return int.from_bytes(hashlib.sha256(json.dumps(prompt).encode()).digest()[:3], "big")


class Kv:
    """The engine's side of the store. Every call has a deadline; what fails is a miss."""

    def __init__(self, role: str, prefix: str) -> None:
        config = json.loads(Path(os.environ["MOONCAKE_CONFIG_PATH"]).read_text())
        self._store = MooncakeDistributedStore()
        found = self._store.setup(
            os.environ["MOONCAKE_REQUESTER_LOCAL_HOSTNAME"], config["metadata_server"], config["global_segment_size"],
            config["local_buffer_size"], config["protocol"], config["device_name"], config["master_server_address"],
        )  # fmt: skip
        if found != 0:
            raise SystemExit(f"the store refused this engine: {found}")
        self.role, self._prefix = role, prefix
        self.counts = {"puts": 0, "lost_puts": 0, "hits": 0, "misses": 0}
        self._threads = concurrent.futures.ThreadPoolExecutor(8)
        self._lock = threading.Lock()

    def of(self, prompt: object) -> int:
        key = f"{self._prefix}@{hashlib.sha256(json.dumps(prompt).encode()).hexdigest()}"
        if self.role != "kv_consumer":
            number = answer_of(prompt)
            done = self._within(lambda: self._store.put(key, number.to_bytes(8, "big")))
            self._count("puts" if done == 0 else "lost_puts")
            return number
        found = self._within(lambda: self._store.get(key))
        is_hit = isinstance(found, bytes) and len(found) == 8
        self._count("hits" if is_hit else "misses")
        return int.from_bytes(found, "big") if isinstance(found, bytes) and is_hit else answer_of(prompt)

    def _within(self, call: object) -> object:
        assert callable(call)
        try:
            return self._threads.submit(call).result(_PATIENCE_S)
        except concurrent.futures.TimeoutError:
            return None

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kv: Kv

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._whole({"role": self.kv.role, **self.kv.counts})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert not body.get("kv_transfer_params"), "a store needs no hand-over"
        count, number = int(body.get("max_tokens", 16)), self.kv.of(body["prompt"])
        tokens = [number % 1000 + n for n in range(count)]
        usage = {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
        if not body.get("stream"):
            text = "".join(f" {token}" for token in tokens)
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length", "token_ids": tokens}
            return self._whole({"id": "x", "choices": [choice], "usage": usage})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for n, token in enumerate(tokens):
            reason = "length" if n == count - 1 else None
            choice = {"index": 0, "text": f" {token}", "logprobs": None, "finish_reason": reason, "token_ids": [token]}
            self._event({"choices": [{**choice, **({"prompt_token_ids": [7, 7, 7]} if n == 0 else {})}]})
        self._event({"choices": [], "usage": usage})
        self._part(b"data: [DONE]\n\n")
        self._part(b"")
        return None

    def _whole(self, found: object) -> None:
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _event(self, found: dict[str, object]) -> None:
        outer = {"id": "cmpl-x", "object": "text_completion", "created": 1, "model": "m"}
        self._part(b"data: " + json.dumps({**outer, **found}).encode() + b"\n\n")

    def _part(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--kv-transfer-config", type=json.loads)
    known, _ = parser.parse_known_args()
    config = known.kv_transfer_config
    assert config["kv_connector"] == "MooncakeStoreConnector"
    Handler.kv = Kv(config["kv_role"], config["kv_connector_extra_config"]["cache_prefix"])
    ThreadingHTTPServer((known.host, known.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
