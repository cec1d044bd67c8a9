"""What becomes of a connection whose proxy has died, by what its slot and the kernel say."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import pytest

from pdctl.proxy.takeover.adoption import Adoptable, CannotGoOn, adoptable
from pdctl.proxy.takeover.journal import CLOSES, IN_BYTES, OUT_BYTES, PAGE, Found, Frame, Slot
from pdctl.proxy.takeover.kernel import Counts
from pdctl.proxy.takeover.notes import Facts, encode_facts
from pdctl.proxy_wire import SLOT_BYTES

REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
FACTS = encode_facts(Facts("id", 1, 2))


def slot_with(received: bytes = REQUEST) -> Slot:
    slot = Slot(memoryview(mmap.mmap(-1, PAGE + SLOT_BYTES)), 0)
    slot.take(1, 0, int)
    slot.room_in(0)[: len(received)] = received
    return slot


def adopted(slot: Slot, taken: int = 0, read: int = len(REQUEST), is_open: bool = True, **changed: Any) -> Adoptable:
    found = slot.load()
    assert found is not None
    return adoptable(slot, replace(found, **changed), Counts(taken, read, is_open))


def begun(slot: Slot, head: bytes = b"head") -> None:
    assert slot.change(Frame(facts=len(FACTS)), head, b"P3:0,7,", FACTS)


def test_an_idle_connection_goes_on() -> None:
    slot = slot_with()
    assert slot.change(Frame(read_before=len(REQUEST), answer_at=6), b"answer", b"")
    found = adopted(slot, taken=4)
    assert (found.unsent, found.input, found.resumed, found.closes) == (b"er", b"", None, False)


def test_a_half_read_request_is_read_again_as_far_as_the_kernel_says() -> None:
    found = adopted(slot_with(), read=20)
    assert (found.input, found.unsent, found.forgets) == (REQUEST[:20], b"", False)


def test_an_answer_that_nobody_has_begins_again() -> None:
    slot = slot_with()
    begun(slot)
    found = adopted(slot, taken=0)
    assert (found.input, found.unsent, found.forgets, found.resumed) == (REQUEST, b"", True, None)


def test_a_stream_goes_on_after_what_was_taken() -> None:
    slot = slot_with()
    begun(slot)
    assert slot.put(b"what", b"8,")
    found = adopted(slot, taken=5)
    assert found.unsent == b"hat"
    assert found.resumed is not None
    assert (found.resumed.facts.request_id, found.resumed.legs[0].token_ids) == ("id", [7, 8])


def test_answered_requests_of_a_pipeline_are_not_answered_again() -> None:
    slot = slot_with(REQUEST + REQUEST + b"GET")
    assert slot.change(Frame(answer_at=2, answered=1), b"ok", b"")
    assert adopted(slot, taken=2, read=2 * len(REQUEST) + 3).input == REQUEST + b"GET"


def test_a_connection_that_was_to_be_closed_is_closed() -> None:
    slot = slot_with()
    assert slot.change(Frame(read_before=len(REQUEST), answer_at=2, flags=CLOSES), b"ok", b"")
    assert adopted(slot).closes


def lost(slot: Slot) -> None:
    slot.lose()


def in_the_middle(slot: Slot) -> None:
    assert slot.put(b"half of a body")


def early(slot: Slot) -> None:
    assert slot.change(Frame(answer_at=2, answered=1), b"no", b"")


def torn_facts(slot: Slot) -> None:
    assert slot.change(Frame(facts=3), b"head", b"", b"{}}")


def other_notes(slot: Slot) -> None:
    assert slot.change(Frame(facts=len(FACTS)), b"head", b"Q,", FACTS)


@pytest.mark.parametrize(
    ("prepare", "more", "reason"),
    [
        (begun, {"is_open": False}, "had left"),
        (lost, {}, "did not fit"),
        (begun, {"taken": 5}, "the kernel has taken 5"),
        (begun, {"taken": -1}, "the kernel has taken -1"),
        (begun, {"end": OUT_BYTES + 10, "taken": 5}, "the kernel has taken 5"),
        (begun, {"frame": Frame(answer_at=99)}, "the kernel has taken 0"),
        (begun, {"read": -1}, "-1 bytes of requests"),
        (begun, {"read": IN_BYTES + 1}, "bytes of requests"),
        (in_the_middle, {"taken": 4}, "cannot be continued"),
        (early, {"taken": 2, "read": 30}, "before it was complete"),
        (torn_facts, {"taken": 2}, "cannot be read"),
        (other_notes, {"taken": 2}, "invalid literal"),
    ],
)
def test_what_cannot_go_on_exactly_is_refused(prepare: Any, more: dict[str, Any], reason: str) -> None:
    slot = slot_with()
    prepare(slot)
    with pytest.raises(CannotGoOn, match=reason):
        adopted(slot, **more)


def test_garbage_in_a_slot_is_refused_or_is_an_idle_connection() -> None:
    """Whatever the memory says: no exception but one, and never output that the slot does not have."""
    area = mmap.mmap(-1, PAGE + SLOT_BYTES)
    for seed in range(200):
        area[PAGE : PAGE + 512] = bytes((seed * 37 + at * (seed + 11)) % 256 for at in range(512))
        slot = Slot(memoryview(area), 0)
        found = slot.load()
        assert isinstance(found, Found)
        try:
            plan = adoptable(slot, found, Counts(found.origin, found.frame.read_before, open=True))
        except CannotGoOn:
            continue
        assert len(plan.unsent) <= found.end
