"""Inter-token latency of running requests while migrations arrive, against the same without.

    python benchmarks/migration_jitter.py [--rounds 10] [--migrations 8] [--streams 2]

The prompts are prefilled beforehand, so that prefill's core is free and only the transfers are new. Migrations are made
as chunk-wise reading makes them (offers), and withdrawn after their bytes have moved: the requests behind them never
join decode's batch, whose steps would rightly take longer. Windows with and without migrations alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import httpx

from pdctl.engine.samples.prepare import prepare, show_progress
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from tests.e2e.parity import prompts
from tests.service import Engine, Run, Service, events, running, topology, wait_until

_LENGTH = 1000
_WINDOW_S = 1.5


def offer(hand_over: dict[str, Any], withdrawn: bool = False) -> dict[str, Any]:
    """A hand-over as an offer."""
    return {
        "engine": hand_over["remote_engine_id"], "host": hand_over["remote_host"], "port": hand_over["remote_port"],
        "lease_id": hand_over["lease_id"], "epoch": hand_over["epoch"], "lease_s": hand_over["lease_s"],
        "num_tokens": hand_over["remote_num_tokens"], "readable": hand_over["remote_num_tokens"],
        "block_ids": hand_over["remote_block_ids"], "endpoint": hand_over["endpoint"], "withdrawn": withdrawn,
    }  # fmt: skip


class Stream(threading.Thread):
    """One running request; the times of its tokens."""

    def __init__(self, service: Service, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self._service, self._prompt = service, prompt

    def run(self) -> None:
        body = {"prompt": self._prompt, "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}
        # The client is closed under it at the end of a round.
        with suppress(httpx.HTTPError), self._service.client.stream("POST", "/v1/completions", json=body) as answer:
            for event in events(answer):
                if event is not None and event["choices"]:
                    self.times.append(time.perf_counter())

    def gaps(self, start: float, end: float) -> list[float]:
        """Between tokens that came within a window."""
        inside = [at for at in self.times if start <= at <= end]
        return [later - earlier for earlier, later in pairwise(inside)]


def migrate(prefill: Engine, decode: Engine, held: list[dict[str, Any]]) -> None:
    """All of them at once; return when their bytes have moved."""
    wanted = decode.state()["transfers"]["pulls"] + len(held)
    for hand_over in held:
        assert decode.http.post("/pdctl/v1/offers", json=offer(hand_over)).json()["ok"]
    wait_until(lambda: decode.state()["transfers"]["pulls"] >= wanted, 30, "the migrations")
    for hand_over in held:
        decode.http.post("/pdctl/v1/offers", json=offer(hand_over, withdrawn=True))
        prefill.lease("release", hand_over, "router")


def main() -> None:
    """Print the gaps' p50 and p99 and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--migrations", type=int, default=8)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    located = locate_model("sample:gemma-3-270m", cache_root())
    path = Path(prepare(located.spec, located.path, show_progress))
    run = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
    run.poison = False
    text = topology(located.spec, kv_cache_gb=1.0).replace("[transfer]", f'[transfer]\nbackend = "{options.backend}"')
    with running(run, text) as service:
        prefill, decode = Engine(service, "prefill-0"), Engine(service, "decode-0")
        prompt = prompts(path, (_LENGTH,))[0]
        quiet: list[float] = []
        busy: list[float] = []
        for _ in range(options.rounds):
            held = [prefill.hold(prompt) for _ in range(options.migrations)]
            streams = [Stream(service, prompts(path, (32,))[0]) for _ in range(options.streams)]
            for stream in streams:
                stream.start()
            wait_until(lambda streams=streams: all(len(stream.times) > 4 for stream in streams), 60, "tokens")
            middle = time.perf_counter() + _WINDOW_S
            time.sleep(_WINDOW_S)
            begun = time.perf_counter()
            migrate(prefill, decode, held)
            ended = time.perf_counter()
            for stream in streams:
                quiet += stream.gaps(middle - _WINDOW_S, middle)
                # From the token before the first migration to the one after the last.
                busy += stream.gaps(begun - 0.05, max(ended, begun + 0.2) + 0.05)
            service.client.close()
            service.client = type(service.client)(base_url=service.url, timeout=120, trust_env=False)
        prefill.http.close()
        decode.http.close()
        service.idle()
    print(
        f"\n{options.streams} streams, {options.migrations} migrations of {_LENGTH} tokens at once, {options.backend}"
    )
    worst = {}
    for name, gaps in (("quiet", quiet), ("migrating", busy)):
        ranked = [gap * 1e3 for gap in sorted(gaps)]
        worst[name] = ranked[int(0.99 * (len(ranked) - 1))]
        print(f"  {name:10} {len(gaps):4d} gaps  p50 {statistics.median(ranked):6.1f} ms  p99 {worst[name]:6.1f} ms")
    middle = statistics.median(busy) / statistics.median(quiet)
    print(f"  ratio: p50 {middle:.2f}, p99 {worst['migrating'] / worst['quiet']:.2f}")


if __name__ == "__main__":
    main()
