"""Calls of a pair of engines for one attempt: at once, or with a hand-over that the proxy releases.

The engines use the builtin dialect, except for the hand-shake.
"""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType

import msgspec
import pytest

from pdctl import adapters
from pdctl.adapters import Choice, HandShake
from pdctl.adapters.builtin.dialect import BuiltinDialect
from pdctl.proxy.engines.kv_room import KvRoom
from pdctl.proxy.engines.pool import EnginePool
from tests.proxy.request.scripted import (
    LEASE,
    Act,
    Gathering,
    Outcome,
    Scripted,
    after,
    answer,
    half,
    held,
    pair,
    relay,
    silence,
    stream,
)

RELEASE, GIVE_UP = "/pdctl/v1/leases/release", "/pdctl/v1/attempts/release"
LOST = answer(409, {"error": {"message": "no such lease", "type": "kv_lost"}})


class Concurrent(BuiltinDialect):
    hand_shake = HandShake.CONCURRENT


class Owned(BuiltinDialect):
    hand_shake = HandShake.OWNED


class Unfenced(BuiltinDialect):
    verifies_leases = False
    tells_pieces = False


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add three kinds of engines."""
    packages = {**adapters._REGISTRY}
    for name, dialect in (("concurrent", Concurrent()), ("owned", Owned()), ("unfenced", Unfenced())):
        packages[name] = f"_{name}_engines"
        module = ModuleType(f"{packages[name]}.dialect")
        monkeypatch.setattr(module, "DIALECT", dialect, raising=False)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(adapters, "_registry", lambda: packages)


def tokens(outcome: Outcome) -> str:
    assert outcome.error is None
    return outcome.sink.text


def in_steps(writes: list[tuple[asyncio.Event | None, list[int]]]) -> Act:
    """A stream that sends tokens when their events are set. The last one ends it."""

    async def act(writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number, (event, ids) in enumerate(writes):
            if event is not None:
                await event.wait()
            for at, token in enumerate(ids):
                reason = "length" if number == len(writes) - 1 and at == len(ids) - 1 else None
                choice = {"index": 0, "text": chr(token), "token_ids": [token], "finish_reason": reason}
                data = b"data: %b\n\n" % msgspec.json.encode({"choices": [choice]})
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    return act


class TestConcurrent:
    def test_both_are_called_at_once_and_only_decodes_answer_counts(self) -> None:
        async def main() -> tuple[Scripted, Scripted, Outcome]:
            prefill, decode = pair([], [])
            prefill.acts = [after(decode.observed["/v1/completions"], held(1))]
            decode.acts = [after(prefill.observed["/v1/completions"], stream(range(65, 73)))]
            return prefill, decode, await relay(prefill, decode, kind="concurrent")

        prefill, decode, outcome = asyncio.run(main())
        assert tokens(outcome) == "ABCDEFGH"
        assert outcome.leg.failures == 0
        assert outcome.leg.timing.engines == ("p0", "d0")
        assert prefill.generations[0]["kv_transfer_params"]["do_remote_decode"] is True
        assert "kv_transfer_params" not in decode.generations[0], "a concurrent hand-shake has no hand-over"
        assert not prefill.bodies_at(RELEASE)

    def test_the_prompts_tokens_are_counted_by_prefill_where_decode_does_not_say(self) -> None:
        async def main() -> Outcome:
            sink, answered = Gathering(), asyncio.Event()

            async def counted(writer: asyncio.StreamWriter) -> bool:
                await held(1)(writer)
                answered.set()
                return True

            # Prefill's answer is sent before the first token, so the proxy has read it when the second one arrives.
            steps: list[tuple[asyncio.Event | None, list[int]]] = [(answered, [65]), (sink.began, [66])]
            return await relay(*pair([counted], [in_steps(steps)]), kind="concurrent", sink=sink)

        assert asyncio.run(main()).leg.prompt_tokens == 5

    def test_a_prefill_that_fails_ends_the_decode_that_waits_for_its_kv(self) -> None:
        async def main() -> tuple[Scripted, Scripted, Outcome]:
            prefill, decode = pair([], [silence, stream(range(65, 73))])
            prefill.acts = [after(decode.observed["/v1/completions"], half)]
            return prefill, decode, await relay(prefill, decode, kind="concurrent", left=[decode])

        prefill, decode, outcome = asyncio.run(main())
        assert tokens(outcome) == "ABCDEFGH"
        assert outcome.leg.failures == 1
        assert len(prefill.bodies_at(GIVE_UP)) == 1
        assert (len(prefill.generations), len(decode.generations)) == (1, 2), "the remaining engine continues alone"
        assert outcome.shared.pool.by_name["d0"].breaker.failures == 0, "the decode engine did not fail"

    def test_a_decode_that_fails_gives_its_prefill_up(self) -> None:
        async def main() -> tuple[Scripted, Outcome]:
            prefill, decode = pair([silence, stream(range(65, 73))], [])
            decode.acts = [after(prefill.observed["/v1/completions"], half)]
            return prefill, await relay(prefill, decode, kind="concurrent", left=[prefill])

        prefill, outcome = asyncio.run(main())
        assert tokens(outcome) == "ABCDEFGH"
        assert outcome.leg.failures == 1
        assert len(prefill.bodies_at(GIVE_UP)) == 1, "its answer may be on its way, with a lease"
        assert outcome.shared.pool.by_name["p0"].breaker.failures == 0

    def test_what_prefill_refuses_is_the_clients_error_and_decode_is_ended(self) -> None:
        async def main() -> Outcome:
            prefill, decode = pair([], [silence])
            refused = answer(400, {"error": {"message": "too long", "type": "invalid_request_error"}})
            prefill.acts = [after(decode.observed["/v1/completions"], refused)]
            return await relay(prefill, decode, kind="concurrent", left=[decode])

        outcome = asyncio.run(main())
        assert outcome.error is not None
        assert (outcome.error.status, outcome.error.message) == (400, "too long")

    def test_a_prefill_that_fails_once_tokens_come_is_no_failure_of_the_request(self) -> None:
        async def main() -> tuple[Scripted, Outcome]:
            sink = Gathering()
            prefill, decode = pair([after(sink.began, half)], [])
            # The proxy gives up a prefill that broke off. When that call arrives, the proxy knows of the failure.
            decode.acts = [in_steps([(None, [65]), (prefill.observed[GIVE_UP], [66, 67])])]
            return prefill, await relay(prefill, decode, kind="concurrent", sink=sink)

        prefill, outcome = asyncio.run(main())
        assert tokens(outcome) == "ABC"
        assert outcome.leg.failures == 0
        assert len(prefill.generations) == 1
        assert outcome.shared.pool.by_name["p0"].breaker.failures == 1, "it still counts as the engine's failure"

    def test_a_prefill_that_has_not_answered_when_all_is_decoded_is_given_up(self) -> None:
        async def main() -> tuple[Scripted, Outcome]:
            prefill, decode = pair([silence], [])
            decode.acts = [after(prefill.observed["/v1/completions"], stream(range(65, 73)))]
            return prefill, await relay(prefill, decode, kind="concurrent", left=[prefill])

        prefill, outcome = asyncio.run(main())
        assert tokens(outcome) == "ABCDEFGH"
        assert outcome.leg.failures == 0
        assert len(prefill.bodies_at(GIVE_UP)) == 1

    def test_a_client_that_leaves_ends_both(self) -> None:
        async def main() -> Scripted:
            prefill, decode = pair([silence], [silence])

            async def both() -> None:
                for engine in (prefill, decode):
                    await engine.observed["/v1/completions"].wait()

            await relay(prefill, decode, kind="concurrent", leave_when=both(), left=[prefill, decode])
            return prefill

        assert len(asyncio.run(main()).bodies_at(GIVE_UP)) == 1


class TestOwned:
    def test_the_kv_is_released_at_the_first_token_and_once(self) -> None:
        async def main() -> tuple[Scripted, Scripted, Outcome]:
            prefill, decode = pair([held(65)], [])
            decode.acts = [in_steps([(None, [66]), (prefill.observed[RELEASE], [67, 68])])]
            return prefill, decode, await relay(prefill, decode, kind="owned")

        prefill, decode, outcome = asyncio.run(main())
        assert tokens(outcome) == "ABCD"
        assert decode.generations[0]["kv_transfer_params"] == LEASE
        assert prefill.bodies_at(RELEASE) == [{**LEASE, "holder": "proxy"}]

    def test_a_decode_that_fails_before_its_first_token_leaves_no_kv(self) -> None:
        prefill, decode = pair([held(65), stream(range(66, 73))], [half])
        outcome = asyncio.run(relay(prefill, decode, kind="owned"))
        assert tokens(outcome) == "ABCDEFGH"
        assert len(prefill.bodies_at(RELEASE)) == 1

    def test_a_decode_that_fails_after_its_first_token_has_released_it(self) -> None:
        prefill, decode = pair([held(65), stream(range(68, 73))], [stream([66, 67], ends=False)])
        outcome = asyncio.run(relay(prefill, decode, kind="owned"))
        assert tokens(outcome) == "ABCDEFGH"
        assert prefill.generations[1]["resume_token_ids"] == [65, 66, 67]
        assert len(prefill.bodies_at(RELEASE)) == 1

    def test_an_answer_in_one_piece_is_its_own_first_token(self) -> None:
        body = {"choices": [{"index": 0, "text": "AB"}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
        prefill, decode = pair([held(65)], [answer(200, body)])

        async def main() -> Outcome:
            return await relay(prefill, decode, kind="owned", sink=Gathering(takes_whole=True))

        outcome = asyncio.run(main())
        assert outcome.leg.whole == msgspec.json.encode(body)
        assert (outcome.leg.prompt_tokens, outcome.leg.completion_tokens) == (5, 2)
        assert not outcome.sink.tokens, "the body also contains the first token"
        assert decode.generations[0]["stream"] is False
        assert len(prefill.bodies_at(RELEASE)) == 1


@pytest.mark.parametrize("kind", ["builtin", "owned"])
def test_an_answer_that_ends_at_prefill_is_not_handed_over(kind: str) -> None:
    choice = {"index": 0, "text": "A", "token_ids": [65], "finish_reason": "stop"}
    prefill, decode = pair([answer(200, {"choices": [choice], "usage": {"prompt_tokens": 5}})], [])
    outcome = asyncio.run(relay(prefill, decode, kind=kind))
    assert tokens(outcome) == "A"
    assert outcome.leg.timing.engines == ("p0", "p0")
    assert outcome.leg.prompt_tokens == 5
    assert not prefill.bodies_at(RELEASE)


@pytest.mark.parametrize("kind", ["builtin", "owned"])
def test_lost_kv_is_held_against_the_pair_until_a_hand_over_arrives(kind: str) -> None:
    prefill, decode = pair([held(65), held(66)], [LOST, stream(range(67, 73))])
    outcome = asyncio.run(relay(prefill, decode, kind=kind))
    assert tokens(outcome) == "ABCDEFGH"
    assert len(prefill.bodies_at(RELEASE)) == (1 if kind == "builtin" else 2)
    assert outcome.shared.pool.by_name["d0"].pair_losses == {}
    lost = pair([held(65), held(66), stream(range(67, 73))], [LOST, LOST])
    losses = asyncio.run(relay(*lost, kind=kind)).shared.pool.by_name["d0"].pair_losses
    assert {name: count for name, (count, _) in losses.items()} == {"p0": 2}


@pytest.mark.parametrize("kind", ["builtin", "owned", "concurrent"])
def test_an_engine_that_breaks_says_nothing_about_the_pair(kind: str) -> None:
    first = half if kind != "concurrent" else answer(500, {"error": {"message": "out of luck"}})
    prefill, decode = pair([held(65), stream(range(66, 73))], [first])
    outcome = asyncio.run(relay(prefill, decode, kind=kind))
    assert outcome.error is None
    assert outcome.leg.failures == 1
    assert outcome.shared.pool.by_name["d0"].pair_losses == {}


class Slow(Gathering):
    """A client that never finishes reading its first token."""

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        await super().add(choice, token_ids)
        await asyncio.Event().wait()


@pytest.mark.parametrize("kind", ["builtin", "owned"])
def test_a_client_that_leaves_before_the_hand_over_leaves_no_kv(kind: str) -> None:
    async def main() -> tuple[Scripted, Scripted]:
        prefill, decode = pair([held(65)], [])
        sink = Slow()
        await relay(prefill, decode, kind=kind, sink=sink, leave_when=sink.began.wait())
        return prefill, decode

    prefill, decode = asyncio.run(main())
    assert prefill.bodies_at(RELEASE) == [{**LEASE, "holder": "proxy"}]
    assert not decode.generations


@pytest.mark.parametrize("gone", ["link", "prefill"])
def test_kv_that_decode_cannot_read_any_more_is_not_sent_there(gone: str) -> None:
    pools: list[EnginePool] = []

    async def lost_meanwhile(writer: asyncio.StreamWriter) -> bool:
        engines = pools[0].by_name
        if gone == "link":
            engines["d0"].unlinked = frozenset({"p0"})
        else:
            room = engines["p0"].room
            assert room is not None
            room.renewed(1 << 20)
            room.swept()
        return await held(65)(writer)

    def prepare(pool: EnginePool) -> None:
        pools.append(pool)
        room = pool.by_name["p0"].room = KvRoom()
        room.renewed(1 << 20)
        room.swept()

    rest = stream(range(66, 73))
    prefill, decode = pair([lost_meanwhile, held(66), rest], [rest])
    outcome = asyncio.run(relay(prefill, decode, kind="owned", prepare=prepare))
    assert tokens(outcome).startswith("AB")
    carried = [body["kv_transfer_params"] for body in decode.generations if "kv_transfer_params" in body]
    assert len(carried) == (0 if gone == "link" else 1), "the first hand-over is not used"
    room = pools[0].by_name["p0"].room
    assert room is not None
    room.audit()


class TestEnginesThatVerifyNoLeases:
    """They decode whatever is in the blocks when they read them: the proxy discards what begins too late."""

    def test_an_answer_that_begins_in_time_is_the_answer(self) -> None:
        prefill, decode = pair([held(65)], [stream([66, 67])])
        outcome = asyncio.run(relay(prefill, decode, max_tokens=3, kind="unfenced"))
        assert tokens(outcome) == "ABC"

    def test_an_answer_that_begins_late_is_computed_again(self) -> None:
        async def main() -> Outcome:
            late = asyncio.Event()
            # The engine reads the KV of a lease of 0.3 s after 0.6 s.
            asyncio.get_running_loop().call_later(0.6, late.set)
            prefill, decode = pair([held(65), held(66)], [after(late, stream([88, 88])), stream([67])])
            return await relay(prefill, decode, max_tokens=3, kind="unfenced", lease_s=0.3)

        outcome = asyncio.run(main())
        assert tokens(outcome) == "ABC", "nothing of the late answer reached the client"
        assert outcome.leg.failures == 1

    def test_a_prefill_longer_than_the_lease_is_computed_by_one_engine_alone(self) -> None:
        prefill, decode = pair([held(65), held(66), stream([67])], [])
        outcome = asyncio.run(relay(prefill, decode, max_tokens=3, kind="unfenced", lease_s=0.0))
        assert tokens(outcome) == "ABC"
        assert decode.generations == [], "it never got KV that may be gone"

    def test_a_short_answer_is_streamed_to_know_when_it_began(self) -> None:
        prefill, decode = pair([held(65)], [stream([66, 67])])
        sink = Gathering(takes_whole=True)
        outcome = asyncio.run(relay(prefill, decode, max_tokens=3, kind="unfenced", sink=sink))
        assert tokens(outcome) == "ABC"
        assert decode.generations[0]["stream"] is True
