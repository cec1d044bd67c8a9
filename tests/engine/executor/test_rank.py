"""What a rank does with the messages of the first rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from pdctl.engine.executor import rank
from pdctl.engine.executor.pipe import Failed, Join, Pools, Refused
from pdctl.wire import EXIT_CONFIG, Part


class Sent:
    """A pipe whose messages come without descriptors, as when the process has too many open files."""

    def __init__(self, *messages: msgspec.Struct) -> None:
        self._messages = [msgspec.msgpack.encode(message) for message in messages]
        self.sent: list[msgspec.Struct] = []

    def receive(self) -> tuple[bytes, None]:
        return self._messages.pop(0), None

    def send(self, word: msgspec.Struct) -> None:
        self.sent.append(word)


def test_a_pool_without_its_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In memory of its own a rank would write KV that nobody reads: wrong tokens elsewhere."""
    loaded = SimpleNamespace(dtype="float32", part=Part(), shapes=[], max_positions=1, fingerprint="m")
    monkeypatch.setattr(rank, "Ranks", lambda *_: None)
    monkeypatch.setattr(rank, "load_part", lambda *_: (loaded, SimpleNamespace(backend=SimpleNamespace(name="x"))))
    monkeypatch.setattr(rank, "how_loaded", lambda *_: ())
    monkeypatch.setattr(rank, "own_device", lambda *_: torch.device("cpu"))
    options = SimpleNamespace(
        device="cpu", rank=1, tensor_parallel=2, pipeline_parallel=1, sequence_parallel=1, block_size=16, epoch="e"
    )
    pipe = Sent(Join(str(tmp_path)), Pools(4, is_apart=False))
    assert rank._run(options, pipe) == 1  # type: ignore[arg-type]
    (said,) = (word for word in pipe.sent if isinstance(word, Failed))
    assert "no descriptor was free" in said.reason, "the first rank hears why"


@pytest.mark.parametrize(
    ("when", "said", "code"),
    [("_loaded", Refused("CUDA out of memory"), EXIT_CONFIG), ("_follow", Failed, 1)],
    ids=["at the start", "in a step"],
)
def test_a_gpu_that_is_full_is_final_only_at_the_start(
    when: str, said: object, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that found no room may find it after a restart."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rank, "_loaded", lambda *_: "a runner")
    monkeypatch.setattr(rank, when, full)
    pipe = Sent()
    assert rank._run(SimpleNamespace(), pipe) == code  # type: ignore[arg-type]
    word = pipe.sent[-1]
    if isinstance(said, Refused):
        assert word == said
    else:
        assert isinstance(word, Failed)
        assert "ran out in a step: CUDA out of memory" in word.reason


def test_what_fails_at_the_start_is_not_called_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("no such layer")

    monkeypatch.setattr(rank, "_loaded", broken)
    pipe = Sent()
    assert rank._run(SimpleNamespace(), pipe) == 1  # type: ignore[arg-type]
    assert pipe.sent[-1] == Failed("TypeError: no such layer")
