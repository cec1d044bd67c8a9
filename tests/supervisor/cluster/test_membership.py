"""Beliefs about other nodes' engines: present, gone, unknown, and the registry's own failures."""

from __future__ import annotations

import itertools

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.registry import Change, Entry
from pdctl.supervisor.cluster.entries import DRAINING, GONE, READY, EngineEntry, Keys
from pdctl.supervisor.cluster.membership import Membership

KEYS = Keys("service")
REVISIONS = itertools.count(1)


def engine(node: str, name: str, epoch: str = "e1", state: str = READY) -> EngineEntry:
    return EngineEntry(node, name, "builtin", "decode", "10.0.0.1", 8000, epoch, state)


def put(entry: EngineEntry) -> Change:
    key, revision = KEYS.engine(entry.node, entry.name), next(REVISIONS)
    return Change(key, Entry(key, msgspec.json.encode(entry), revision, revision), revision)


def deleted(entry: EngineEntry) -> Change:
    return Change(KEYS.engine(entry.node, entry.name), None, next(REVISIONS))


def names(membership: Membership) -> list[str]:
    return [entry.name for entry in membership.used]


def test_an_engine_that_its_node_calls_gone_is_dropped_and_released_once() -> None:
    membership, decode = Membership("a", 60), engine("b", "decode-0")
    assert membership.take([put(decode)], 0) == []
    assert membership.take([put(msgspec.structs.replace(decode, state=GONE))], 1) == ["decode-0@e1"]
    assert membership.take([deleted(decode)], 1) == []
    assert names(membership) == []
    assert membership.unknown == ()


def test_an_engine_that_was_started_again_releases_what_its_earlier_start_held() -> None:
    membership = Membership("a", 60)
    membership.take([put(engine("b", "decode-0"))], 0)
    assert membership.take([put(engine("b", "decode-0", "e2"))], 1) == ["decode-0@e1"]
    assert [entry.epoch for entry in membership.used] == ["e2"]
    assert membership.take([put(engine("b", "decode-0", "e2", DRAINING))], 1) == []


def test_an_engine_whose_lease_ended_is_used_while_it_answers() -> None:
    membership, decode = Membership("a", 60), engine("b", "decode-0")
    membership.take([put(decode)], 0)
    assert membership.take([deleted(decode)], 10) == []
    assert names(membership) == ["decode-0"]
    assert membership.asked(decode, "e1") == []
    assert membership.asked(decode, None) == ["decode-0@e1"]
    assert membership.asked(decode, None) == []
    assert names(membership) == []
    assert membership.asked(decode, "e1") == []
    assert names(membership) == ["decode-0"]
    assert membership.forget(69) == []
    assert membership.forget(70) == ["decode-0@e1"]
    assert names(membership) == []


def test_an_unknown_engine_that_answers_as_another_start_is_gone() -> None:
    membership, decode = Membership("a", 60), engine("b", "decode-0")
    membership.take([put(decode)], 0)
    membership.take([deleted(decode)], 1)
    assert membership.asked(decode, "e2") == ["decode-0@e1"]
    assert membership.unknown == ()


def test_engines_of_several_nodes_that_vanish_at_once_stay() -> None:
    membership = Membership("a", 60)
    engines = [engine(node, f"{node}-{number}") for node in ("b", "c", "d") for number in range(2)]
    membership.take(map(put, engines), 0)
    assert membership.take(map(deleted, engines[:4]), 5.0) == []
    assert membership.registry_failed
    for entry in engines[:4]:
        assert membership.asked(entry, None) == []
    assert len(names(membership)) == 6
    membership.take(map(put, engines[:4]), 8.0)
    assert membership.unknown == ()
    assert len(names(membership)) == 6


def test_a_lost_node_is_not_the_registry_s_fault() -> None:
    membership = Membership("a", 60)
    engines = [engine("b", f"b-{number}") for number in range(4)]
    membership.take([put(engine("c", "c-0")), *map(put, engines)], 0)
    membership.take(map(deleted, engines), 5.0)
    assert not membership.registry_failed
    assert [membership.asked(entry, None) for entry in engines] == [[entry.holder] for entry in engines]
    assert names(membership) == ["c-0"]


def test_own_engines_and_entries_of_other_versions_are_ignored() -> None:
    membership = Membership("a", 60)
    key = KEYS.engine("b", "new-kind")
    assert membership.take([put(engine("a", "decode-0")), Change(key, Entry(key, b'{"x":1}', 1, 1), 1)], 0) == []
    assert membership.take([deleted(engine("a", "decode-0"))], 0) == []
    assert names(membership) == []


class Beliefs(RuleBasedStateMachine):
    """Whatever is told in whatever order: a holder that its node calls alive is not released, and an ended one is."""

    def __init__(self) -> None:
        super().__init__()
        self.membership, self.now = Membership("a", 20), 0.0
        self.told: dict[str, EngineEntry] = {}
        self.lost: dict[str, EngineEntry] = {}
        self.epochs = itertools.count()
        self.released: list[str] = []
        self.before: tuple[int, tuple[EngineEntry, ...]] = (0, ())

    def heard(self, holders: list[str]) -> None:
        for holder in holders:
            assert holder not in {entry.holder for entry in self.told.values()}, "the holder lives"
        self.released += holders

    @rule(node=st.sampled_from("abc"), number=st.integers(0, 2), anew=st.booleans())
    def tell(self, node: str, number: int, anew: bool) -> None:
        before = self.told.get(f"{node}{number}") or self.lost.pop(f"{node}{number}", None)
        epoch = before.epoch if before is not None and not anew else f"e{next(self.epochs)}"
        self.told[f"{node}{number}"] = entry = engine(node, f"{node}{number}", epoch)
        self.heard(self.membership.take([put(entry)], self.now))
        if before is not None and before.epoch != epoch and node != "a":
            assert before.holder in self.released

    @rule(node=st.sampled_from("abc"), number=st.integers(0, 2))
    def end(self, node: str, number: int) -> None:
        entry = self.told.pop(f"{node}{number}", None) or self.lost.pop(f"{node}{number}", None)
        if entry is None:
            return
        gone = msgspec.structs.replace(entry, state=GONE)
        self.heard(self.membership.take([put(gone), deleted(gone)], self.now))
        assert node == "a" or entry.holder in self.released

    @rule(nodes=st.sets(st.sampled_from("abc"), min_size=1), seconds=st.floats(0, 3))
    def vanish(self, nodes: set[str], seconds: float) -> None:
        self.now += seconds
        lost = {name: entry for name, entry in self.told.items() if entry.node in nodes}
        self.told = {name: entry for name, entry in self.told.items() if name not in lost}
        self.lost |= lost
        assert self.membership.take(map(deleted, lost.values()), self.now) == []

    @rule(number=st.integers(0, 8), answers=st.booleans())
    def ask(self, number: int, answers: bool) -> None:
        unknown = self.membership.unknown
        if number < len(unknown):
            entry = unknown[number]
            holders = self.membership.asked(entry, entry.epoch if answers else None)
            assert holders in ([], [entry.holder])
            assert not (answers and holders)
            self.heard(holders)
            assert not answers or entry in self.membership.used

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        lost = {entry.holder for entry in self.membership.unknown}
        forgotten = self.membership.forget(self.now)
        assert lost.issuperset(forgotten)
        self.heard(forgotten)

    @invariant()
    def books_are_right(self) -> None:
        self.membership.audit()
        now = (self.membership.version, self.membership.used)
        assert (now[0] != self.before[0]) == (now[1] != self.before[1]), "the version does not tell of a change"
        self.before = now


TestBeliefs = Beliefs.TestCase
