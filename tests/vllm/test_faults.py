"""Two prefill and two decode engines of vLLM, killed and frozen under load: no client may notice."""

from __future__ import annotations

import json
import os

import pytest

from tests.service import running, temporary_run
from tests.vllm.conftest import LEASE_S, shared_memory, topology

KILLS = int(os.environ.get("PDCTL_VLLM_KILLS", "20"))
FREEZES = int(os.environ.get("PDCTL_VLLM_FREEZES", "5"))
# Seconds between two faults: a killed engine needs that long to be back on two cores.
EVERY_S = float(os.environ.get("PDCTL_VLLM_EVERY_S", "45"))


@pytest.mark.parametrize(("fault", "count"), [("kill", KILLS), ("freeze", FREEZES)])
def test_no_client_sees_it(fault: str, count: int) -> None:
    before = shared_memory()
    with temporary_run() as run, running(run, topology(2, 2)):
        done = run.cli(
            "bench", "chaos", "-s", "t", "--json",
            "--fault", f"{fault}:prefill", "--fault", f"{fault}:decode",
            "--for", str(EVERY_S * 2 * count), "--every", str(EVERY_S), "--frozen", str(LEASE_S + 3),
            "--streams", "3", "--prompts", "8", "--output", "48", "--back-within", "600",
            timeout=EVERY_S * 2 * count + 1800,
        )  # fmt: skip
        found = json.loads(done.stdout)
        print(json.dumps(found, indent=1))
        assert done.returncode == 0, done.stdout + done.stderr
    assert shared_memory() <= before
