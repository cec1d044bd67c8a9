"""What a proxy believes of an engine's KV: what it has told last, whatever was missed; without that, what was seen."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.prefixes import feed as module
from pdctl.engine.front.prefixes.feed import Feed
from pdctl.net.prefixes.beginnings import PIECE_BYTES, Beginning, beginning_of
from pdctl.proxy.engines.prefixes.batches import Verdict
from pdctl.proxy.engines.prefixes.known import WAIT_S, KnownPrefixes
from pdctl.proxy.engines.prefixes.places import Places
from pdctl.wire import BlocksReply
from tests.fakes.kv_events import CLEARED, Cache, Json, removed, stored

PROMPT = bytes(range(256)) * 4


def told(*pieces: int, epoch: str = "e", sequence: int = 1) -> BlocksReply:
    return BlocksReply(epoch, sequence, True, list(pieces), [])


def test_prefixes_match_from_the_beginning_only() -> None:
    known, pieces = KnownPrefixes(), beginning_of(PROMPT).pieces
    known.add(pieces, 0.0)
    assert known.matched(beginning_of(PROMPT[:700] + b"x" * 300).pieces, 9e9) == 512
    assert known.matched(beginning_of(b"x" + PROMPT).pieces, 0.0) == 0
    assert known.matched((), 0.0) == 0
    known.clear()
    assert known.matched(pieces, 0.0) == 0


def test_an_engine_that_tells_is_believed_more_than_what_was_seen() -> None:
    known = KnownPrefixes()
    known.add([1, 2, 3, 4], 10.0)
    known.heard(told(1, 2), 10.1)
    assert known.matched([1, 2, 3, 4], 10.2) == 1024, "it may not have told of the newest yet"
    assert known.matched([1, 2, 3, 4], 12.0) == 512
    known.heard(BlocksReply("e", 2, False, [3], [1]), 12.0)
    assert known.matched([1, 2, 3], 12.0) == 0
    assert known.matched([2, 3], 12.0) == 512


def test_an_engine_that_is_silent_for_long_is_not_believed() -> None:
    known = KnownPrefixes()
    known.heard(told(1, 2), 0.0)
    assert known.matched([1, 2], 2 * WAIT_S) == 512
    assert known.matched([1, 2], 3 * WAIT_S) == 0
    known.add([1], 3 * WAIT_S)
    assert known.matched([1, 2], 9 * WAIT_S) == 256, "what was seen counts again"
    known.heard(told(2), 9 * WAIT_S)
    known.lost()
    assert (known.told, known.call().epoch) == (0, "")


@pytest.mark.parametrize("reply", [told(1, epoch="f"), told(1, sequence=0)])
def test_what_does_not_follow_makes_everything_unknown(reply: BlocksReply) -> None:
    known = KnownPrefixes()
    known.heard(told(1, 2, sequence=5), 0.0)
    assert not known.heard(BlocksReply(reply.epoch, reply.sequence, False, [3], []), 0.0)
    assert (known.matched([1], 0.0), known.matched([3], 0.0)) == (0, 0)
    assert known.call().epoch == "", "all is asked for"


STEPS = st.one_of(
    st.tuples(st.booleans(), st.lists(st.integers(1, 6), min_size=1, max_size=3)),
    st.sampled_from(["hear", "lost", "restart"]),
)


@given(st.lists(STEPS, max_size=40), st.integers(1, 6))
def test_who_has_heard_knows_what_is_there(steps: list[tuple[bool, list[int]] | str], kept: int) -> None:
    """Answers are lost, changes are missed, the engine is restarted: after an answer that came, it is all right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT", kept)
        feed, known, there, epoch = Feed("e0"), KnownPrefixes(), set[int](), 0
        for step in [*steps, "hear", "hear"]:
            if isinstance(step, tuple):
                is_stored, names = step
                feed.note(names, is_stored)
                there = there | set(names) if is_stored else there - set(names)
            elif step == "hear":
                known.heard(_answer(feed, known), 0.0)
            elif step == "lost":
                _answer(feed, known)
            else:
                epoch += 1
                feed, there = Feed(f"e{epoch}"), set()
            feed.audit()
        assert {piece for piece in range(1, 7) if known.matched([piece], 1.0)} == there


def _answer(feed: Feed, known: KnownPrefixes) -> BlocksReply:
    call = known.call()
    return asyncio.run(feed.after(type(call)(call.epoch, call.after, 0.0)))


SIZE, TOKENS = 4, list(range(20, 36))


class Followed:
    """What is known of an engine that publishes events; two pieces of one prompt have been tokenized."""

    def __init__(self, tokens: list[int] = TOKENS, pieces: tuple[int, ...] = (1, 2)) -> None:
        self.places, self.cache, self.number = Places(), Cache(SIZE), 0
        self.known = KnownPrefixes(self.places)
        self.places.note(Beginning(PIECE_BYTES * len(pieces), pieces), tokens, "", SIZE, lambda _: True)

    def hear(self, events: list[Json], now: float = 0.0) -> Verdict:
        payload = msgspec.msgpack.encode([1.0 + self.number, events])
        self.number += 1
        return self.known.heard_batch(self.number - 1, payload, now)


def test_an_engine_that_publishes_its_blocks_is_believed_more_than_what_was_seen() -> None:
    followed = Followed()
    known, cache = followed.known, followed.cache
    assert followed.hear(cache.compute(TOKENS)) is Verdict.FOLLOWS
    assert known.matched((1, 2, 3), 0.0) == 512, "nobody has sent it here"
    known.add((1, 2), 1.0)
    followed.hear(cache.drop(cache.chain(TOKENS)[-1]), 1.0)
    assert known.matched((1, 2), 1.5) == 512, "it may not have published the newest yet"
    assert known.matched((1, 2), 3.0) == 256
    assert (known.blocks, known.told) == (3, 0)


def test_of_a_piece_that_nobody_has_tokenized_what_was_seen_counts_until_all_is_cleared() -> None:
    followed = Followed()
    followed.hear(followed.cache.compute(TOKENS))
    followed.known.add((1, 2, 3), 0.0)
    assert followed.known.matched((1, 2, 3, 4), 9.0) == 768
    followed.hear([CLEARED], 9.0)
    assert followed.known.matched((1, 2, 3), 9.0) == 0.0
    assert followed.known.matched((3,), 9.0) == 0.0


def test_an_engine_with_unknown_blocks_may_have_what_was_seen() -> None:
    followed = Followed()
    followed.hear([stored([b"a"], b"unknown", TOKENS[:SIZE], SIZE)])
    followed.known.add((1,), 0.0)
    assert followed.known.matched((1, 2), 9.0) == 256
    followed.hear([CLEARED, *followed.cache.compute(TOKENS[:SIZE])], 9.0)
    assert followed.known.matched((1, 2), 9.0) == 0.0, "now all of its blocks are known"


def test_a_piece_that_is_shorter_than_a_block_says_nothing() -> None:
    followed = Followed(TOKENS[:9], (1, 2, 3, 4, 5))  # they end after 1.8, 3.6, 5.4, 7.2 and 9 tokens
    assert followed.known.matched((1, 2), 9.0) == 0
    followed.hear(followed.cache.compute(TOKENS[:9]))
    assert followed.known.matched((1, 2, 3, 4, 5), 9.0) == 1280
    assert followed.known.matched((1, 2), 9.0) == 0, "no block, nothing to find"


def test_events_that_are_missed_or_old_are_not_believed_for_long() -> None:
    followed = Followed()
    followed.hear(followed.cache.compute(TOKENS), 0.0)
    assert followed.known.matched((1, 2), 2 * WAIT_S) == 512
    assert followed.known.matched((1, 2), 3 * WAIT_S) == 0
    followed.number += 1
    assert followed.hear([removed([b"x"])], 3 * WAIT_S) is Verdict.MISSED
    assert followed.known.matched((1, 2), 3 * WAIT_S) == 0, "it has answered, but not with what was asked for"
    followed.known.clear()
    assert followed.known.blocks == 0
