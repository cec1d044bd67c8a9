"""Two prefill and two decode engines of vLLM, killed and frozen under load: no client may notice."""

from __future__ import annotations

import json
import os

import pytest

from tests.service import Run, running, temporary_run
from tests.vllm.conftest import LEASE_S, topology

KILLS = int(os.environ.get("PDCTL_VLLM_KILLS", "20"))
FREEZES = int(os.environ.get("PDCTL_VLLM_FREEZES", "5"))
# Seconds between two faults: a killed engine needs that long to be back on two cores.
EVERY_S = float(os.environ.get("PDCTL_VLLM_EVERY_S", "30"))


@pytest.mark.parametrize(("fault", "count"), [("kill", KILLS), ("freeze", FREEZES)])
def test_no_client_sees_it(fault: str, count: int) -> None:
    with temporary_run() as run, running(run, topology(2, 2)):
        print(json.dumps(faults(run, fault, count), indent=1))


def faults(run: Run, fault: str, count: int) -> dict[str, object]:
    """Have `pdctl bench chaos` inject them; its exit code is 1 if a promise was broken."""
    seconds = EVERY_S * 2 * count
    done = run.cli(
        "bench", "chaos", "-s", "t", "--json", "--fault", f"{fault}:prefill", "--fault", f"{fault}:decode",
        "--for", str(seconds), "--every", str(EVERY_S), "--frozen", str(LEASE_S + 3), "--streams", "3",
        "--prompts", "8", "--output", "48", "--back-within", "600", timeout=seconds + 1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))
