"""KV events of real engines, to a subscriber that decodes as vLLM does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import zmq.asyncio

from tests.e2e.test_prefix import tokens
from tests.engine.front.test_kv_events import Reader
from tests.service import Engine, Run, Service, running, topology

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    text = topology(engine_extra='kv_events = "tokens"', kv_cache_gb=0.01)
    with running(module_run, text.replace('"tokens"', '"hashes"', 1)) as found:
        yield found


def snapshot(service: Service, engine: str) -> dict[str, Any]:
    with Engine(service, engine).http as http:
        return dict(http.get("/kv/blocks").json())


def replayed(service: Service, engine: str) -> Reader:
    """What a router knows that reads everything from the start."""

    async def run() -> Reader:
        context, reader = zmq.asyncio.Context(), Reader()
        replay = context.socket(zmq.DEALER)
        replay.connect(f"tcp://127.0.0.1:{service.process(engine).ports['kv-replay']}")
        try:
            await reader.catch_up(replay)
        finally:
            replay.close(linger=0)
            context.term()
        return reader

    return asyncio.run(run())


def chains(found: dict[Any, tuple[Any, list[int]]]) -> list[list[int]]:
    """The tokens from the beginning to the end of each block."""

    def whole(block: Any) -> list[int]:
        parent, mine = found[block]
        return [*(whole(parent) if parent in found else []), *mine]

    return [whole(block) for block in found]


def test_events_and_snapshots_are_what_engines_have(service: Service) -> None:
    prompts = [tokens(number, 100 + 37 * number) for number in range(24)]
    answers = [service.complete(prompt, max_tokens=20, ignore_eos=True)["token_ids"] for prompt in prompts]
    service.idle()
    for engine in ("prefill-0", "decode-0"):
        reader, taken = replayed(service, engine), snapshot(service, engine)
        assert taken["sequence"] == reader.next - 1
        assert {hash: (event["parent_block_hash"], event["token_ids"]) for event in taken["events"]
                for hash in event["block_hashes"]} == reader.blocks  # fmt: skip
        # Nothing runs, so every block that can be found is a cached one.
        with Engine(service, engine).http as http:
            assert http.get("/pdctl/v1/state").json()["blocks_cached"] == len(reader.blocks)
    assert all(not event["token_ids"] for event in snapshot(service, "prefill-0")["events"])
    asked = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    known = chains(replayed(service, "decode-0").blocks)
    assert known
    assert all(any(one[: len(chain)] == chain for one in asked) for chain in known)
    # The pool holds less than was asked, so blocks were removed as well.
    assert sum(len(one) // 16 for one in asked) > len(known)


def test_no_hash_tells_what_another_key_has_asked(service: Service) -> None:
    prompt = tokens(90, 64)
    before = set(replayed(service, "prefill-0").blocks)
    service.complete(prompt, max_tokens=2, cache_salt="one")
    service.idle()
    first = set(replayed(service, "prefill-0").blocks) - before
    service.complete(prompt, max_tokens=2, cache_salt="two")
    service.idle()
    second = set(replayed(service, "prefill-0").blocks) - before - first
    assert len(first) == len(second) == 4


def test_the_ports_are_planned_and_the_snapshot_is_internal(service: Service) -> None:
    process = service.process("decode-0")
    assert {"kv-events", "kv-replay"} < set(process.ports)
    with Engine(service, "decode-0").http as http:
        http.headers.pop("authorization")
        assert http.get("/kv/blocks").status_code == 401
