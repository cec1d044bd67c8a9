"""An engine whose workers are processes of their own, as with several GPUs: kill -9 leaves nothing of it."""

from __future__ import annotations

import os
import signal

from pdctl.supervisor.process.shared_memory import mapped
from tests.service import pid_of, running, temporary_run
from tests.vllm.conftest import alone, group, left_of, tree_of


def test_workers_and_their_shared_memory_go_with_a_killed_engine() -> None:
    # On one CPU rank, pdctl puts core and worker into one process; the topology can decide otherwise.
    text = alone(group("hybrid", extra='env = { VLLM_ENABLE_V1_MULTIPROCESSING = "1" }'))
    with temporary_run() as run:
        with running(run, text) as service:
            expected = service.complete("Once upon a time", max_tokens=8)["token_ids"]
            before, tree = service.process("hybrid-0"), tree_of(service, "hybrid-0")
            used = mapped(tree)
            assert used, "vLLM's core and workers exchange messages in shared memory"
            assert len(tree) > 2, "vLLM's engine core and workers are processes of their own"
            os.kill(pid_of(before), signal.SIGKILL)
            service.restarted(before)
            assert not set(tree) & {process.pid for process in run.processes()}, "the whole tree is gone"
            assert not left_of(used), "what the killed engine left was removed"
            assert service.complete("Once upon a time", max_tokens=8)["token_ids"] == expected
            used = mapped(process.pid for process in run.processes())
            assert used
        assert not left_of(used)
