"""The delay of a hand-over for a client: from the end of prefill to the second token, minus one ordinary step.

    python benchmarks/exposed.py [--rounds 12] [--model gemma-3-270m] [--backend auto]

Two services run side by side, one with and one without chunk-wise pull. Requests alternate; the idle service uses no
CPU. A streaming client measures the time from the first token (from prefill) to the second, minus the median gap
between later tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from pdctl.engine.samples.prepare import prepare, show_progress
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from tests.e2e.parity import prompts
from tests.service import Run, Service, events, running, topology

LENGTHS = (256, 1024, 1900)
_TOKENS = 12


def exposed(service: Service, prompt: list[int]) -> float:
    """Seconds of one request."""
    body = {"prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    times = []
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        times = [time.perf_counter() for event in events(answer) if event is not None and event["choices"]]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return gaps[0] - statistics.median(gaps[1:])


def main() -> None:
    """Print milliseconds and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    located = locate_model(f"sample:{options.model}", cache_root())
    path = Path(prepare(located.spec, located.path, show_progress))
    with ExitStack() as stack:
        services = {}
        for chunked in ("true", "false"):
            run = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
            run.poison = False
            text = topology(located.spec, kv_cache_gb=0.5, engine_extra="cpus = [0]\nmax_num_batched_tokens = 256")
            first, second = text.split('name = "decode"')
            text = first + 'name = "decode"' + second.replace("cpus = [0]", "cpus = [1]")
            text = text.replace("[transfer]", f'[transfer]\nbackend = "{options.backend}"\nchunked = {chunked}')
            services[chunked] = stack.enter_context(running(run, text))
        print(f"\n{options.model}, {options.backend}, chunks of 256 tokens, median of {options.rounds}, milliseconds")
        print("  tokens  whole  chunk-wise  chunk-wise / whole")
        for length in LENGTHS:
            found: dict[str, list[float]] = {"true": [], "false": []}
            for index in range(options.rounds + 1):
                prompt = prompts(path, (length,))[0]
                for chunked, service in services.items():
                    taken = exposed(service, prompt)
                    if index:
                        found[chunked].append(taken)
            whole, chunks = (statistics.median(found[key]) * 1e3 for key in ("false", "true"))
            print(f"  {length:6d}  {whole:5.1f}  {chunks:10.1f}  {chunks / whole:18.2f}")


if __name__ == "__main__":
    main()
