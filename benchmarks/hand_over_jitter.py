"""Inter-token latency of running requests with and without arriving hand-overs.

    python benchmarks/hand_over_jitter.py [--bursts 60] [--hand-overs 8] [--streams 2]

The hand-overs come from a mock prefill engine: a process that serves the memory of a pool and accepts every lease call,
so that only their effect on the decode engine is measured. They are offers, as in chunk-wise reading, and are withdrawn
once their bytes have moved: their requests never join the decode batch, which would make its steps longer. The
benchmark compares gaps between tokens that overlap a burst with gaps that do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import httpx

from pdctl.engine.cache.memory import Memory
from pdctl.engine.samples.prepare import prepare, show_progress
from pdctl.engine.transfer import Settings, transport_kind
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from tests.e2e.parity import prompts
from tests.service import Engine, Run, Service, events, running, topology, wait_until

_TOKENS = 1000
_PAUSE_S = 0.6


class Yes(BaseHTTPRequestHandler):
    """Grants every lease and every renewal."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"ok": true, "gone": []}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Source:
    """A mock prefill engine with all KV ready."""

    def __init__(self, like: dict[str, Any], backend: str) -> None:
        self._blocks = like["endpoint"]["shards"][0]["num_blocks"]
        size = self._blocks * _block_bytes(like["endpoint"]["shards"][0]["manifest"])
        self._memory = Memory(size, "source")
        self._transport = transport_kind(backend).open_transport(self._memory, Settings("source"))
        served = {"transport": backend, "address": self._transport.address, "protocol": self._transport.protocol}
        self._endpoint = {**like["endpoint"]["shards"][0], "served": [served]}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Yes)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._made = 0

    def offers(self, count: int) -> list[dict[str, Any]]:
        """`count` hand-overs, each with its own blocks."""
        size = self._endpoint["manifest"]["block_size"]
        each = -(-_TOKENS // size)
        found = []
        for index in range(count):
            self._made += 1
            first = index * each % (self._blocks - each)
            found.append({
                "engine": "source", "host": "127.0.0.1", "port": self._server.server_port,
                "lease_id": f"source.{self._made}", "epoch": "source", "lease_s": 30.0, "num_tokens": _TOKENS,
                "readable": _TOKENS, "block_ids": list(range(first, first + each)),
                "endpoint": {"shards": [self._endpoint]},
            })  # fmt: skip
        return found


def _block_bytes(manifest: dict[str, Any]) -> int:
    item = 4 if manifest["dtype"] == "float32" else 2
    rows = sum(heads * (key + value) for heads, key, value in manifest["layers"])
    return int(rows * manifest["block_size"] * item)


class Stream(threading.Thread):
    """One running request; the times of its tokens."""

    def __init__(self, service: Service, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self._service, self._prompt = service, prompt

    def run(self) -> None:
        body = {"prompt": self._prompt, "max_tokens": 1900, "temperature": 0, "ignore_eos": True, "stream": True}
        # The client is closed while it runs, at the end.
        with suppress(httpx.HTTPError), self._service.client.stream("POST", "/v1/completions", json=body) as answer:
            for event in events(answer):
                if event is not None and event["choices"]:
                    self.times.append(time.perf_counter())


def burst(decode: Engine, offers: list[dict[str, Any]]) -> tuple[float, float]:
    """Begin and end of one burst."""
    wanted = decode.state()["transfers"]["pulls"] + len(offers)
    begun = time.perf_counter()
    for offer in offers:
        assert decode.http.post("/pdctl/v1/offers", json=offer).json()["ok"]
    wait_until(lambda: decode.state()["transfers"]["pulls"] >= wanted, 30, "the hand-overs")
    ended = time.perf_counter()
    for offer in offers:
        decode.http.post("/pdctl/v1/offers", json={**offer, "withdrawn": True})
    return begun, ended


def main() -> None:
    """Print the gaps' p50 and p99 and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bursts", type=int, default=60)
    parser.add_argument("--hand-overs", type=int, default=8)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--backend", default="shm")
    options = parser.parse_args()
    located = locate_model("sample:gemma-3-270m", cache_root())
    path = Path(prepare(located.spec, located.path, show_progress))
    run = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
    run.poison = False
    text = topology(located.spec, kv_cache_gb=1.0).replace("[transfer]", f'[transfer]\nbackend = "{options.backend}"')
    bursts = []
    with running(run, text) as service:
        prefill, decode = Engine(service, "prefill-0"), Engine(service, "decode-0")
        source = Source(prefill.http.get("/pdctl/v1/endpoint").json(), options.backend)
        streams = [Stream(service, prompts(path, (32,))[0]) for _ in range(options.streams)]
        for stream in streams:
            stream.start()
        wait_until(lambda: all(len(stream.times) > 4 for stream in streams), 60, "tokens")
        start = time.perf_counter()
        for _ in range(options.bursts):
            bursts.append(burst(decode, source.offers(options.hand_overs)))
            time.sleep(_PAUSE_S)
        service.client.close()
        service.client = httpx.Client(base_url=service.url, timeout=120, trust_env=False)
        prefill.http.close()
        decode.http.close()
        service.idle()
    gaps = [gap for stream in streams for gap in pairwise(stream.times) if gap[0] > start]
    busy = [b - a for a, b in gaps if any(a < ended and begun < b for begun, ended in bursts)]
    quiet = [b - a for a, b in gaps if not any(a < ended + 0.05 and begun < b for begun, ended in bursts)]
    took = statistics.median(ended - begun for begun, ended in bursts)
    print(
        f"\n{options.streams} streams; {options.bursts} bursts of {options.hand_overs} hand-overs of {_TOKENS} tokens"
    )
    print(f"  by {options.backend}; a burst takes {took * 1e3:.0f} ms")
    worst = {}
    for name, found in (("quiet", quiet), ("receiving", busy)):
        ranked = [gap * 1e3 for gap in sorted(found)]
        worst[name] = ranked[int(0.99 * (len(ranked) - 1))]
        print(f"  {name:10} {len(found):4d} gaps  p50 {statistics.median(ranked):6.1f} ms  p99 {worst[name]:6.1f} ms")
    middle = statistics.median(busy) / statistics.median(quiet)
    print(f"  ratio: p50 {middle:.2f}, p99 {worst['receiving'] / worst['quiet']:.2f}")


if __name__ == "__main__":
    main()
