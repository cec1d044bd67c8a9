"""Time from SIGKILL of a decode engine until its leased blocks are free.

    python benchmarks/reclaim.py [--kills 50] [--leases 8]

Each round: `--leases` requests are prefilled and claimed in the decode engine's name, the engine is killed, and the
prefill engine is polled until its last block is free again. The clock starts before the kill.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.service import Engine, Run, Service, running, topology


def one(service: Service, leases: int, before: int) -> tuple[float, int]:
    """Seconds until every block is free, and the pid that was killed; `before` is the last round's."""

    def back() -> bool:
        now = service.process("decode-0")
        return bool(now.state == "ready" and now.pid != before)

    service.wait(back, 60, "decode to be back")
    prefill, decode = Engine(service, "prefill-0"), Engine(service, "decode-0")
    for number in range(leases):
        hand_over = prefill.hold(f"{number} " + "the quick brown fox jumps over the lazy dog " * 10, decode.holder)
        assert prefill.lease("claim", hand_over, decode.holder)["ok"]
    assert len(prefill.state()["leases"]) == leases
    started = time.perf_counter()
    os.kill(decode.pid, signal.SIGKILL)
    while (state := prefill.state())["leases"] or state["blocks_free"] < state["blocks_total"]:
        pass
    taken = time.perf_counter() - started
    prefill.http.close()
    decode.http.close()
    return taken, decode.pid


def main() -> None:
    """Print median, p99 and worst in milliseconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--leases", type=int, default=8)
    options = parser.parse_args()
    run = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
    run.poison = False
    text = topology(lease_s=60).replace("[supervisor]", "[supervisor]\nmax_restarts = 1000\nwithin_s = 10")
    with running(run, text) as service:
        found, pid = [], 0
        for _ in range(options.kills):
            seconds, pid = one(service, options.leases, pid)
            found.append(seconds * 1e3)
        taken = sorted(found)
    p99 = taken[min(len(taken) - 1, int(0.99 * len(taken)))]
    print(f"{options.kills} kills, {options.leases} leases each: median {statistics.median(taken):.1f} ms, "
          f"p99 {p99:.1f} ms, worst {taken[-1]:.1f} ms, best {taken[0]:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
