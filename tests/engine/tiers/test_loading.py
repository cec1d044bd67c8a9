"""Questions and loads: what is there is copied as far as it goes, and nothing is written for a request that is gone."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import numpy as np
import pytest

from pdctl.engine.ipc.messages import Load, Look, Pulled, Seen
from pdctl.engine.tiers import Rows, TierFailed, loading
from pdctl.engine.tiers.host import HostTier
from pdctl.engine.tiers.loading import Loader, Speed

SIZE = 4


class Pool:
    """Takes rows as a pool would."""

    block_bytes = SIZE

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}

    def read(self, block_ids: Sequence[int]) -> Rows:
        raise AssertionError

    def write(self, block_ids: Sequence[int], rows: Rows) -> None:
        self.rows |= {block: int(row[0]) for block, row in zip(block_ids, rows, strict=True)}


def name(number: int) -> bytes:
    return bytes([number])


def tier(*numbers: int) -> HostTier:
    made = HostTier(16, SIZE)
    rows = np.array([[number] * SIZE for number in numbers], np.uint8)
    made.put([name(number) for number in numbers], rows, [""] * len(numbers))
    return made


class Failing(HostTier):
    def __init__(self) -> None:
        super().__init__(1, SIZE)

    def leading(self, names: Sequence[bytes]) -> int:
        raise TierFailed("no")

    def get(self, names: Sequence[bytes]) -> Rows:
        raise TierFailed("it is broken")


class Rig:
    """A loader, and what it says. `gone`: requests that have ended."""

    def __init__(self, *tiers: HostTier) -> None:
        self.pool = Pool()
        self.gone: set[str] = set()
        self.loaded: queue.Queue[Pulled] = queue.Queue()
        self.said: queue.Queue[Seen | Pulled] = queue.Queue()
        self.loader = Loader(tiers, self.pool, self, self.loaded.put, self.said.put)  # type: ignore[arg-type]

    def pull_started(self, request_id: str) -> bool:
        return request_id not in self.gone

    def pull_wanted(self, request_id: str) -> bool:
        return request_id not in self.gone

    def look(self, *numbers: int) -> list[int]:
        self.loader.submit(Look("r", [name(number) for number in numbers]))
        seen = self.said.get(timeout=60)
        assert isinstance(seen, Seen)
        assert [seconds for _, seconds in seen.runs] == sorted(seconds for _, seconds in seen.runs)
        return [count for count, _ in seen.runs]

    def load(self, request: str, *numbers: int) -> None:
        self.loader.submit(Load(request, [name(number) for number in numbers], [10 + number for number in numbers]))


def test_each_tier_goes_on_where_the_one_before_ends() -> None:
    rig = Rig(tier(1, 2, 9), tier(1, 3, 4))
    assert rig.look(1, 2, 3, 4, 5) == [2, 4]
    assert rig.look(3, 4) == [2]
    assert rig.look(5, 1) == []
    assert rig.look(9, 1) == [2]
    rig.load("r", 1, 2, 3, 4, 5)
    done = rig.loaded.get(timeout=60)
    assert (done.error, done.blocks, done.bytes) == ("", 4, 4 * SIZE)
    assert rig.pool.rows == {11: 1, 12: 2, 13: 3, 14: 4}
    rig.loader.close()


def test_nothing_is_written_for_a_request_that_is_gone() -> None:
    rig = Rig(tier(1))
    rig.gone.add("left")
    rig.load("left", 1)
    said = rig.said.get(timeout=60)
    assert isinstance(said, Pulled)
    assert said.error == "the request is gone"
    assert not rig.pool.rows
    assert rig.loaded.empty(), "the core was not told that a write has ended: none had begun"
    rig.loader.close()


def test_many_blocks_come_in_pieces_until_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_AT_ONCE", 2)
    rig = Rig(tier(1, 2, 3, 4, 5))
    rig.load("r", 1, 2, 3, 4, 5, 6)
    assert rig.loaded.get(timeout=60).blocks == 5
    assert len(rig.pool.rows) == 5
    rig.pool.rows.clear()

    def write(block_ids: Sequence[int], rows: Rows) -> None:
        Pool.write(rig.pool, block_ids, rows)
        rig.gone.add("left")

    monkeypatch.setattr(rig.pool, "write", write)
    rig.load("left", 1, 2, 3, 4, 5)
    assert rig.loaded.get(timeout=60).blocks == 2, "it ends between two pieces"
    assert len(rig.pool.rows) == 2
    rig.loader.close()


def test_what_is_gone_meanwhile_is_said() -> None:
    rig = Rig(tier(1))
    rig.load("r", 2, 1)
    said = rig.said.get(timeout=60)
    assert isinstance(said, Pulled)
    assert said.error == "it is not there any more"
    rig.loader.close()


def test_a_tier_that_fails_does_not_hide_the_next() -> None:
    rig = Rig(Failing(), tier(1))
    assert rig.look(1) == [1]
    rig.load("r", 1)
    assert rig.loaded.get(timeout=60).blocks == 1
    rig.load("r", 2)
    said = rig.said.get(timeout=60)
    assert isinstance(said, Pulled)
    assert said.error == "it is broken"
    rig.loader.close()


def test_a_prediction_follows_what_reads_take() -> None:
    speed = Speed(1e-6)
    for _ in range(30):
        speed.note(10, 0.102)
    assert 0.09 < speed.predicted_s(10) < 0.11
    assert speed.predicted_s(20) > 1.8 * speed.predicted_s(10)
