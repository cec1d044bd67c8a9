"""One leg over scripted engines on real sockets: the calls to each engine, and the cleanup after a failure."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.proxy.request.scripted import FAST, LEASE, Outcome, Scripted, answer, cut, held, pair, relay, stream


def test_prefills_token_comes_first_and_decode_gets_the_hand_over() -> None:
    prefill, decode = pair([held(65)], [stream(range(66, 73))])
    outcome = asyncio.run(relay(prefill, decode))
    assert outcome.sink.tokens == list(range(65, 73))
    assert prefill.generations[0]["kv_transfer_params"]["offer_to"]["port"] > 0
    assert decode.generations[0]["kv_transfer_params"] == LEASE
    assert not prefill.bodies_at("/pdctl/v1/leases/release"), "the decode engine releases it"
    assert outcome.leg.failures == 0


def test_a_decode_that_is_cut_goes_on_at_the_next_token() -> None:
    prefill, decode = pair([held(65), stream(range(69, 73))], [stream([66, 67, 68], ends=False)])
    outcome = asyncio.run(relay(prefill, decode))
    assert outcome.sink.text == "ABCDEFGH"
    assert decode.generations[0]["resume_token_ids"] == [65]
    assert prefill.generations[1]["resume_token_ids"] == [65, 66, 67, 68], "the remaining engine continues alone"
    assert outcome.leg.failures == 1


def test_a_hand_over_that_nobody_read_is_released() -> None:
    prefill, decode = pair([held(65), stream(range(66, 73))], [cut])
    outcome = asyncio.run(relay(prefill, decode))
    assert outcome.sink.tokens == list(range(65, 73))
    assert prefill.bodies_at("/pdctl/v1/leases/release") == [{**LEASE, "holder": "proxy"}]


def test_a_prefill_that_is_cut_is_given_up_by_name() -> None:
    prefill, decode = pair([cut], [stream(range(65, 73))])
    outcome = asyncio.run(relay(prefill, decode))
    assert outcome.sink.tokens == list(range(65, 73))
    assert prefill.bodies_at("/pdctl/v1/attempts/release"), "everything that it may still hold is released"


def test_a_client_that_leaves_during_prefill_leaves_nothing() -> None:
    async def leave() -> tuple[Scripted, Outcome]:
        waits = asyncio.Event()

        async def never(_: asyncio.StreamWriter) -> bool:
            waits.set()
            return await asyncio.Event().wait()

        prefill, decode = pair([never], [])
        return prefill, await relay(prefill, decode, leave_when=waits.wait())

    prefill, outcome = asyncio.run(leave())
    assert outcome.sink.tokens == []
    assert prefill.bodies_at("/pdctl/v1/attempts/release")


def test_kv_that_is_lost_twice_is_computed_by_one_engine() -> None:
    lost = answer(409, {"error": {"message": "no such lease", "type": "kv_lost"}})
    prefill, decode = pair([held(65), held(66), stream(range(67, 73))], [lost, lost])
    outcome = asyncio.run(relay(prefill, decode))
    assert outcome.sink.tokens == list(range(65, 73))
    assert "kv_transfer_params" not in prefill.generations[2]
    assert outcome.leg.timing.engines == ("p0", "p0")
    assert all(engine.breaker.failures == 0 for engine in outcome.shared.pool.engines), "no engine broke"


def test_what_an_engine_refuses_is_the_clients_error() -> None:
    refused = answer(400, {"error": {"message": "too long", "type": "invalid_request_error", "param": "prompt"}})
    prefill, decode = pair([refused], [])
    outcome = asyncio.run(relay(prefill, decode))
    assert outcome.error is not None
    assert (outcome.error.status, outcome.error.message, outcome.error.param) == (400, "too long", "prompt")
    assert len(prefill.generations) == 1, "it is not tried again"


def test_failures_end_with_the_last_reason() -> None:
    broken = answer(500, {"error": {"message": "out of luck"}})
    prefill, decode = pair([broken] * 2, [broken])
    outcome = asyncio.run(relay(prefill, decode, policy=replace(FAST, max_failures=3)))
    assert outcome.error is not None
    assert outcome.error.status == 502
    assert "3 times, last on p0: out of luck" in outcome.error.message
    assert (len(prefill.generations), len(decode.generations)) == (2, 1), "each try avoids the engine that failed"


def test_one_token_needs_no_hand_over() -> None:
    prefill, decode = pair([stream([65])], [])
    outcome = asyncio.run(relay(prefill, decode, max_tokens=1))
    assert outcome.sink.tokens == [65]
    assert not decode.generations


@pytest.mark.parametrize("status", [202, 302])
def test_an_odd_status_is_an_engines_failure(status: int) -> None:
    prefill, decode = pair([answer(status, b"{}")], [stream(range(65, 73))])
    outcome = asyncio.run(relay(prefill, decode))
    assert outcome.sink.tokens == list(range(65, 73))
