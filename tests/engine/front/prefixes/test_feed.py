"""What peers hear of each other's blocks: always what is there, whatever was missed, and nothing of another start."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.prefixes import feed as module
from pdctl.engine.front.prefixes.directory import Directory
from pdctl.engine.front.prefixes.feed import BlockFeed
from pdctl.engine.ipc.messages import KvChange, KvRemoved, KvStored
from pdctl.wire import BlocksCall, BlocksReply, PeerAddress

PEER = PeerAddress("p0", "127.0.0.1", 1, "e1")


def name(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(24)


def stored(*numbers: int) -> KvChange:
    return KvStored([name(number) for number in numbers], None, [])


def removed(*numbers: int) -> KvChange:
    return KvRemoved([name(number) for number in numbers])


def ask(feed: BlockFeed, epoch: str, after: int, wait_s: float = 0.0) -> BlocksReply:
    return asyncio.run(feed.after(BlocksCall(epoch, after, wait_s)))


def met() -> Directory:
    directory = Directory()
    directory.follow(PEER)
    return directory


def hear(directory: Directory, feed: BlockFeed) -> BlocksReply:
    call = directory.call("p0", 0.0)
    reply = ask(feed, call.epoch, call.after)
    directory.heard("p0", reply)
    return reply


CHANGES = st.one_of(
    st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda numbers: stored(*numbers)),
    st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda numbers: removed(*numbers)),
)


@given(st.lists(st.one_of(CHANGES, st.sampled_from(["hear", "lost", "restart"])), max_size=40), st.integers(1, 6))
def test_who_has_heard_knows_what_is_there(steps: list[KvChange | str], kept: int) -> None:
    feed, directory, epoch = BlockFeed("e1"), met(), 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT", kept)
        patch.setattr(module, "_TOGETHER_S", 0.0)
        feed = BlockFeed("e1")
        for step in [*steps, "hear"]:
            if step == "hear":
                hear(directory, feed)
                there = [number for number in range(1, 7) if feed.has(number)]
                known = [number for number in range(1, 7) if directory.best([number])]
                assert known == there
            elif step == "lost":
                directory.forget("p0")
            elif step == "restart":
                epoch += 1
                feed = BlockFeed(f"e{epoch}")
            else:
                assert not isinstance(step, str)
                feed.take([step])
            feed.audit()


def test_only_what_changed_is_told() -> None:
    feed, directory = BlockFeed("e1"), met()
    feed.take([stored(1, 2, 3)])
    assert hear(directory, feed).whole
    feed.take([stored(4), removed(1), stored(5), removed(5)])
    reply = hear(directory, feed)
    assert (reply.whole, reply.stored, reply.removed) == (False, [4], [1, 5])


def test_an_answer_comes_with_the_news_or_when_the_time_is_over() -> None:
    async def main() -> None:
        feed = BlockFeed("e1")
        feed.take([stored(1)])
        asked = asyncio.ensure_future(feed.after(BlocksCall("e1", 1, 60.0)))
        await asyncio.sleep(0)
        assert not asked.done()
        feed.take([stored(2)])
        assert (await asked).stored == [2]
        assert (await feed.after(BlocksCall("e1", 2, 0.01))).stored == []

    asyncio.run(main())


def test_an_engine_that_ends_answers_at_once() -> None:
    async def main() -> None:
        feed = BlockFeed("e1")
        asked = [asyncio.ensure_future(feed.after(BlocksCall("e1", 0, 60.0))) for _ in range(2)]
        await asyncio.sleep(0)
        feed.close()
        async with asyncio.timeout(60):
            assert [(await one).stored for one in asked] == [[], []]
            assert (await feed.after(BlocksCall("e1", 0, 60.0))).stored == []

    asyncio.run(main())


def test_an_answer_that_does_not_follow_what_is_known_is_not_believed() -> None:
    directory = met()
    assert directory.heard("p0", BlocksReply("e1", 5, True, [1, 2], []))
    assert directory.best([1, 2, 3]) == (PEER, 2)
    assert not directory.heard("p0", BlocksReply("e2", 6, False, [3], [])), "it is asked again after a pause"
    assert directory.best([1]) is None
    assert directory.call("p0", 1.0) == BlocksCall("", 0, 1.0), "all is asked for again"
    directory.heard("stranger", BlocksReply("e1", 5, True, [1], []))
    assert directory.best([1]) is None


def test_the_peer_with_the_longest_beginning_is_best() -> None:
    directory = Directory()
    others = [PeerAddress(f"p{number}", "h", 1, "e") for number in range(3)]
    for peer, names in zip(others, ([1, 2], [1, 2, 3], [2, 3, 4]), strict=True):
        directory.follow(peer)
        directory.heard(peer.name, BlocksReply("e", 1, True, names, []))
    assert directory.best([1, 2, 3, 4]) == (others[1], 3)
    assert directory.best([1, 2, 3, 4], frozenset({"p1"})) == (others[0], 2)
    assert directory.best([9]) is None
    assert directory.best([]) is None
    taken = []
    assert directory.best(name for name in (1, 2, 9, 3, 4) if not taken.append(name)) == (others[0], 2)  # type: ignore[func-returns-value]
    assert taken == [1, 2, 9]
    assert directory.size == 8
    directory.drop("p1")
    assert directory.best([1, 2, 3, 4]) == (others[0], 2)
