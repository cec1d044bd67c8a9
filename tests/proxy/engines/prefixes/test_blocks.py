"""The index of an engine's blocks: whatever it stores, moves, drops and loses, the index has what can be found."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.proxy.engines.prefixes import blocks as module
from pdctl.proxy.engines.prefixes.batches import Batches, OtherForm, Verdict, parsed
from pdctl.proxy.engines.prefixes.blocks import BlockIndex, names, salt_of
from tests.fakes.kv_events import CLEARED, Cache, Json, removed, stored

SIZE = 2


def heard(*events: Json, ts: float = 1.0) -> bytes:
    return msgspec.msgpack.encode([ts, list(events)])


def told(index: BlockIndex, *events: Json) -> BlockIndex:
    for event in parsed(heard(*events)).events:
        index.take(event)
        index.audit()
    return index


def index_of(*events: Json) -> BlockIndex:
    index = BlockIndex()
    index.clear(is_complete=True)
    return told(index, *events)


def has(index: BlockIndex, token_ids: list[int], salt: str = "") -> int:
    """How many of the first blocks of a prompt are there."""
    chain = list(names(SIZE, token_ids, (salt_of(salt),)))
    return next((number for number, name in enumerate(chain) if not index.has(name)), len(chain))


def test_blocks_are_found_by_their_tokens_and_dropped_by_the_engines_hash() -> None:
    index = index_of(stored([b"a", b"b"], None, [1, 2, 3, 4], SIZE), stored([b"c"], b"b", [5, 6], SIZE))
    assert has(index, [1, 2, 3, 4, 5, 6]) == 3
    assert has(index, [1, 2, 9, 9]) == 1
    assert has(index, [5, 6]) == 0, "the same tokens after others are another block"
    told(index, removed([b"c"]), removed([b"unknown"]))
    assert has(index, [1, 2, 3, 4, 5, 6]) == 2
    told(index, CLEARED)
    assert (has(index, [1, 2]), len(index), index.is_complete) == (0, 0, True)


def test_hashes_may_be_numbers() -> None:
    index = index_of({**stored([], None, [1, 2], SIZE), "block_hashes": [-5]})
    told(index, {**stored([], None, [3, 4], SIZE), "block_hashes": [2**63], "parent_block_hash": -5})
    assert has(index, [1, 2, 3, 4]) == 2


def test_a_block_is_there_while_it_is_in_one_of_the_engines_own_memories() -> None:
    index = index_of(stored([b"a"], None, [1, 2], SIZE))
    told(index, stored([b"a"], None, [], 0, medium="CPU"), removed([b"a"]))
    assert has(index, [1, 2]) == 1, "vLLM names blocks in host memory without their tokens"
    told(index, removed([b"a"], medium="CPU_PINNED"))
    assert has(index, [1, 2]) == 0
    told(index, stored([b"a"], None, [1, 2], SIZE, medium="STORAGE"))
    assert has(index, [1, 2]) == 0, "what a store has is not in the engine"
    assert index.is_complete


def test_kv_of_an_adapter_or_of_a_second_cache_is_none_of_the_model() -> None:
    index = index_of(
        stored([b"a"], None, [1, 2], SIZE, lora_name="l", lora_id=1),
        stored([b"b"], b"a", [3, 4], SIZE, lora_name="l", lora_id=1),
        stored([b"d"], None, [7, 8], SIZE, group_idx=0),
        stored([b"c"], None, [5, 6], SIZE, group_idx=1),
        removed([b"d"], group_idx=1),
    )
    assert (len(index), index.is_complete, has(index, [7, 8])) == (1, True, 1)


def test_of_several_caches_the_one_that_keeps_whole_prompts_is_followed() -> None:
    window = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window"}
    index = index_of(stored([b"a"], None, [1, 2, 3, 4], SIZE, **window))
    assert (len(index), index.is_complete) == (0, False), "nothing is known of an engine that has only windows"
    told(index, stored([b"a", b"b"], None, [1, 2, 3, 4], SIZE, group_idx=1, kv_cache_spec_kind="full_attention"))
    assert (has(index, [1, 2, 3, 4]), index.is_complete) == (2, True)
    told(index, removed([b"a"], group_idx=0))
    assert has(index, [1, 2, 3, 4]) == 2
    told(index, removed([b"b"], group_idx=1))
    assert has(index, [1, 2, 3, 4]) == 1


@pytest.mark.parametrize(
    "more", [{"extra_keys": [["s"], None]}, {"cache_salt": "s"}], ids=["as vLLM tells it", "as SGLang tells it"]
)
def test_a_salt_makes_other_blocks(more: Json) -> None:
    index = index_of(stored([b"a", b"b"], None, [1, 2, 3, 4], SIZE, **more))
    later = {"extra_keys": [None]} if "extra_keys" in more else more
    told(index, stored([b"c"], b"b", [5, 6], SIZE, **later))
    prompt = [1, 2, 3, 4, 5, 6]
    assert (has(index, prompt, "s"), has(index, prompt), has(index, prompt, "t")) == (3, 0, 0)


@pytest.mark.parametrize(
    "event",
    [
        stored([b"c"], b"unknown", [5, 6], SIZE),
        stored([b"c"], None, [], SIZE),
        stored([b"c"], None, [1, 2, 3], SIZE),
        stored([b"c"], None, [], 0),
    ],
    ids=["no parent", "no tokens", "too many tokens", "no size"],
)
def test_without_a_name_of_ours_not_there_may_be_wrong(event: Json) -> None:
    index = index_of(event)
    assert (len(index), index.is_complete) == (0, False)
    told(index, CLEARED)
    assert index.is_complete, "now nothing can be there"


def test_what_is_beyond_the_bound_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BLOCKS", 2)
    index = index_of(stored([b"a", b"b", b"c"], None, [1, 2, 3, 4, 5, 6], SIZE), stored([b"d"], b"c", [7, 8], SIZE))
    assert (has(index, [1, 2, 3, 4, 5, 6]), index.is_complete) == (2, False)
    told(index, removed([b"b"]), stored([b"e"], b"a", [9, 9], SIZE))
    assert has(index, [1, 2, 9, 9]) == 2, "there is room again"


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", heard({"type": "Other"}), heard(stored([b"a"], None, [-1], SIZE)),
     heard(stored([b"a"], None, [2**32], SIZE)), heard({"type": "BlockRemoved"}), msgspec.msgpack.encode([1.0]),
     b"\x92\x00\x91\x81\xa4type\xa3\xffoh"],
)  # fmt: skip
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(OtherForm):
        parsed(payload)


def test_of_what_was_missed_for_good_nothing_is_believed() -> None:
    line = Line()
    line.publish(line.cache.compute([0] * 4))
    line.live(0)
    line.publish(line.cache.drop(list(line.cache.blocks)[-1]))
    line.publish(line.cache.compute([1] * 4))
    line.kept = 2
    line.catch_up()
    line.check()
    assert len(line.known.index) == 2
    assert not line.known.index.is_complete


class Line:
    """An engine, what it has published, and a follower behind a line that loses, repeats and forgets."""

    def __init__(self) -> None:
        self.known, self.clock = Batches(), 0.0
        self.restart()

    def restart(self) -> None:
        self.cache, self.published, self.kept, self.is_unheard = Cache(SIZE), list[bytes](), 0, True

    def lose(self) -> None:
        """A batch is lost. If nothing was heard of this start, numbers may go on as if there was none: then the lost
        connection tells (see sockets.py)."""
        if self.is_unheard:
            self.known.begin()

    def publish(self, events: list[Json]) -> bytes | None:
        if not events:
            return None
        self.clock += 1
        self.published.append(heard(*events, ts=self.clock))
        return self.published[-1]

    def live(self, number: int) -> None:
        self.is_unheard = False
        if self.known.take(number, parsed(self.published[number])) in {Verdict.MISSED, Verdict.RESTARTED}:
            self.catch_up()

    def catch_up(self, hole: int = -1) -> None:
        """What subscribing.py does, with a hole in the first answer."""
        self.is_unheard = False
        for _ in range(50):
            first, verdict = self.known.ask(), Verdict.FOLLOWS
            first = max(first, self.kept)
            for number in range(first, len(self.published)):
                # A full queue drops neither the first one nor, here, the last: that is found out by the next one.
                if number != hole or number in {first, len(self.published) - 1}:
                    verdict = self.known.replayed(number, parsed(self.published[number]))
                    if verdict in {Verdict.MISSED, Verdict.RESTARTED}:
                        break
            if verdict not in {Verdict.MISSED, Verdict.RESTARTED}:
                verdict = self.known.end()
            hole = -1
            if verdict is Verdict.FOLLOWS:
                return
            if verdict is Verdict.RESTARTED:
                self.known.begin()
        raise AssertionError("it does not end")

    def check(self) -> None:
        """Nothing is believed that is not there; all of it is known if the index says so."""
        self.known.audit()
        index, there = self.known.index, set(self.cache.blocks.values())
        have = {name for tokens in there for name in [list(names(SIZE, tokens))[-1]]}
        assert set(index._names) <= have
        assert not index.is_complete or set(index._names) == have


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=8)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["compute", "compute", "lose"]), PROMPTS),
        st.tuples(st.sampled_from(["drop", "repeat", "forget", "catch up", "hole"]), st.integers(0, 99)),
        st.tuples(st.sampled_from(["clear", "restart"]), st.none()),
    ),
    max_size=40,
)


def changed(line: Line, what: str, value: object) -> list[Json]:
    """What the engine does, and the events that tell of it."""
    match what, value:
        case "compute" | "lose", list() as prompt:
            return line.cache.compute(prompt)
        case "drop", int() as at if line.cache.blocks:
            # From an end: an engine finds no block without those before it, and drops the last ones first.
            return line.cache.drop(list(line.cache.blocks)[-1 - at % len(line.cache.blocks)])
        case "clear", _:
            return line.cache.clear()
        case "restart", _:
            line.restart()
    return []


def disturb(line: Line, what: str, at: int) -> None:
    """What happens to the line."""
    if what == "repeat" and line.published:
        line.live(at % len(line.published))
    elif what == "forget" and line.published:
        # The newest one is always kept.
        line.kept = min(len(line.published) - 1, line.kept + at % 3)
    elif what in {"catch up", "hole"}:
        line.catch_up(at % (len(line.published) + 1) if what == "hole" else -1)
        line.check()


@settings(max_examples=300)
@given(STEPS)
def test_whatever_is_lost_the_follower_has_what_the_engine_has(steps: list[tuple[str, object]]) -> None:
    line = Line()
    for what, value in steps:
        if isinstance(value, int):
            disturb(line, what, value)
        if not line.publish(changed(line, what, value)):
            continue
        if what == "lose":
            line.lose()
        else:
            line.live(len(line.published) - 1)
            line.check()
    line.catch_up()
    line.check()
