"""Every engine kind fulfils the contracts of launcher, dialect and control; `echo` is an external kind."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdctl import adapters
from pdctl.adapters import (
    KINDS_ENV,
    Ability,
    Assignment,
    Attempt,
    EngineError,
    HandShake,
    RequestState,
    Target,
    can_launch,
    control,
    dialect,
    kinds,
    launcher,
)
from pdctl.host import Host
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.internal_calls import Caller
from pdctl.net.openai.api import Counts
from pdctl.proxy_wire import EngineAddress
from pdctl.topology.loader import load_text
from pdctl.topology.schema import ENGINE, EVERY_KIND
from pdctl.wire import RoleCall
from tests.service import free_port

KINDS = ("builtin", "lmdeploy", "sglang", "vllm", "echo")
# By kind: a hand-over, and where decode gets it with what in it; others get it as it is in `kv_transfer_params`.
HAND_OVERS = {"lmdeploy": (b'{"session":7,"token":5,"blocks":[1,2]}', "migration_request")}
# By kind: the field of a choice that has its token ids.
TOKEN_FIELDS = {"lmdeploy": "output_ids"}
LEASE = b'{"lease_id":"l1","epoch":"e1"}'
PROGRESS = {
    "builtin": b'{"running":2,"tokens_total":5}',
    "echo": b'{"running":2,"tokens_total":5}',
    "lmdeploy": b'# HELP\nlmdeploy:num_requests_running{engine="0"} 2.0\n',
    "sglang": b'{"loads":[{"num_running_reqs":2,"timestamp":1.5}]}',
    "vllm": b'vllm:num_requests_running{engine="0"} 2.0\nvllm:generation_tokens_total{engine="0"} 5.0\n',
}
# Kinds with streams that have no token ids, only counts: (kind, chat).
WITHOUT_IDS = {("sglang", True)}
PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}


@pytest.fixture(autouse=True, scope="module")
def with_echo() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KINDS_ENV, "echo=tests.adapters.echo")
        adapters._registry.cache_clear()
        yield
    adapters._registry.cache_clear()


def state(chat: bool = False, emitted: list[int] | None = None) -> RequestState:
    prompt = {"messages": [{"role": "user", "content": "hello"}]} if chat else {"prompt": "hello"}
    fields = {"model": "m", "max_tokens": 20, **prompt}
    raw: dict[str, object] = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return RequestState(PATHS[chat], chat, raw, emitted or [], [7, 8])


def attempt(kind: str, name: str = "a1", alone: bool = False) -> Attempt:
    ports = {"bootstrap": 3}
    prefill = EngineAddress("p0", "prefill", kind, "10.0.0.1", 1, ports=ports)
    decode = EngineAddress("d0", "decode", kind, "10.0.0.2", 2, ports=ports)
    return Attempt(name, prefill, prefill if alone else decode)


def body_of(call: adapters.Call) -> dict[str, object]:
    assert call.path.startswith("/")
    return msgspec.json.decode(call.body, type=dict[str, object])


def test_the_registry_has_these_kinds() -> None:
    assert kinds() == tuple(sorted(KINDS))
    assert [kind for kind in KINDS if can_launch(kind)] == list(KINDS)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
class TestDialect:
    def test_calls_keep_the_request_and_do_not_change_it(self, kind: str, chat: bool) -> None:
        speaks, asked = dialect(kind), state(chat)
        before = dict(asked.fields)
        for call in (
            speaks.prefill_call(asked, attempt(kind)),
            speaks.decode_call(asked, attempt(kind), HAND_OVERS.get(kind, (b'{"x":1}',))[0], stream=True),
            speaks.decode_call(asked, attempt(kind, alone=True), None, stream=False),
        ):
            body = body_of(call)
            assert call.path == PATHS[chat]
            assert body["model"] == "m"
            assert ("messages" if chat else "prompt") in body
        assert asked.fields == before

    def test_tokens_are_asked_for_by_what_decides_about_the_prompt(self, kind: str, chat: bool) -> None:
        tokenizer, asked = dialect(kind).tokenizer, state(chat)
        assert (tokenizer is None) is (kind not in {"sglang", "vllm"})
        if tokenizer is None:
            return
        said = "messages" if chat else "prompt"
        everything = msgspec.json.decode(msgspec.json.encode(asked.fields), type=dict[str, object])
        assert body_of(tokenizer.call(asked)) == {name: everything[name] for name in ("model", said)}
        assert tokenizer.tokens(b'{"tokens":[1,2],"count":2}') == [1, 2]
        with pytest.raises(EngineError):
            tokenizer.tokens(b'{"error":"x"}')

    def test_streams_tell_token_ids_and_counts(self, kind: str, chat: bool) -> None:
        body = body_of(dialect(kind).decode_call(state(chat), attempt(kind), None, stream=True))
        assert body["stream"] is True
        counts = {"continuous_usage_stats": True} if (kind, chat) in WITHOUT_IDS else {}
        assert body.get("return_token_ids") is (None if counts else True)
        assert body["stream_options"] == {"include_usage": True, **counts}
        assert body_of(dialect(kind).prefill_call(state(chat), attempt(kind)))["stream"] is False

    def test_the_hand_shake_joins_the_two_calls(self, kind: str, chat: bool) -> None:
        speaks = dialect(kind)
        if speaks.hand_shake is HandShake.CONCURRENT:
            first, other = (body_of(speaks.decode_call(state(chat), attempt(kind, n), None, False)) for n in "ab")
            assert first != other, "two attempts use different rooms"
            alone = body_of(speaks.decode_call(state(chat), attempt(kind, alone=True), None, stream=False))
            assert set(alone) < set(first), "one engine alone waits for no other engine"
        else:
            held, field = HAND_OVERS.get(kind, (LEASE, "kv_transfer_params"))
            given_on = msgspec.json.encode(
                body_of(speaks.decode_call(state(chat), attempt(kind), held, stream=False))[field]
            )
            values = re.findall(rb'"\w+":("\w+"|\[[^]]*\]|\d+)', held)
            assert len(values) > 1
            assert all(value in given_on for value in values)

    def test_what_can_resume_goes_on_after_its_tokens(self, kind: str, chat: bool) -> None:
        speaks, asked = dialect(kind), state(chat, emitted=[65, 66, 67])
        if speaks.cannot_resume(asked):
            return
        fresh = body_of(speaks.decode_call(state(chat), attempt(kind), None, stream=True))
        resumed = body_of(speaks.decode_call(asked, attempt(kind), None, stream=True))
        assert resumed != fresh
        assert asked.emitted == [65, 66, 67]

    def test_garbage_is_an_engine_error_and_nothing_else(self, kind: str, chat: bool) -> None:
        speaks = dialect(kind)

        @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(st.binary(max_size=80) | st.sampled_from([b"{}", b"[]", b"null", b'{"choices":[]}', b'{"error":{}}']))
        def check(data: bytes) -> None:
            for parse in (
                lambda: speaks.parse_prefill(data, state(chat)),
                lambda: speaks.parse_event(data, state(chat)),
                lambda: speaks.parse_whole(data),
            ):
                found: EngineError | None = None
                try:
                    parse()
                except EngineError as failure:
                    found = failure
                assert found is None or (found.status >= 400 and found.message)
            for status in (204, 400, 503):
                assert speaks.parse_error(status, data).status >= 400
            speaks.parse_condition(200, data)
            assert not speaks.parse_condition(503, data).usable

        check()

    def test_an_engines_own_error_reaches_the_client(self, kind: str, chat: bool) -> None:
        error = {"error": {"message": "too long", "type": "invalid_request_error", "param": "prompt"}}
        found = dialect(kind).parse_error(400, msgspec.json.encode(error))
        assert (found.status, found.message, found.kind, found.param) == (
            400, "too long", "invalid_request_error", "prompt",
        )  # fmt: skip

    def test_events_bring_tokens_an_end_and_counts(self, kind: str, chat: bool) -> None:
        part = {"delta": {"content": "hi"}} if chat else {"text": "hi"}
        choice = {"index": 0, **part, TOKEN_FIELDS.get(kind, "token_ids"): [5, 6], "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        found = dialect(kind).parse_event(msgspec.json.encode({"choices": [choice], "usage": usage}), state(chat))
        ids = [] if (kind, chat) in WITHOUT_IDS else [5, 6]
        assert (found.token_ids, found.finish_reason, found.usage) == (ids, "stop", Counts(3, 2))
        assert found.choice is not None
        hidden = {"index", "token_ids", "output_ids"}
        assert hidden.isdisjoint(found.choice), "the proxy adds these for clients that get them"

    def test_clean_up_calls_are_calls_or_nothing(self, kind: str, chat: bool) -> None:
        speaks = dialect(kind)
        for give_up in (speaks.give_up_call("a1"), speaks.give_up_decode_call("a1")):
            assert give_up is None or "a1" in body_of(give_up).values(), "it names the attempt"
        held = HAND_OVERS.get(kind, (LEASE,))[0]
        release = speaks.release_call(held)
        assert release is None or {"l1", 7} & set(body_of(release).values()), "it names what it releases"
        assert speaks.release_call(b"?") is None
        if speaks.hand_shake is HandShake.OWNED:
            assert release is not None, "the proxy frees the KV"


@pytest.mark.parametrize("kind", KINDS)
def test_launchers_are_pure_and_use_what_the_plan_decided(kind: str, tmp_path: Path) -> None:
    text = '[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\n'
    host = Host((0,), (), 2**34, {}, "/usr/bin/python3", tmp_path, tmp_path, tmp_path)
    topology = load_text(text, "pdctl.toml", host)
    starts = launcher(kind)
    group = replace(topology.engines[0], kind=kind)
    ports = {purpose: 4000 + n for n, purpose in enumerate(("http", *starts.ports(group)))}
    given = Assignment("e-0", group, "10.0.0.9", ports, (), (), "/m", tmp_path, "/usr/bin/python3")
    found = starts.launch(topology, given)
    assert found == starts.launch(topology, given)
    assert found.argv[0] == "/usr/bin/python3"
    assert "10.0.0.9" in found.argv
    assert {str(port) for port in ports.values()} <= {*found.argv, *found.env.values()}
    assert starts.settings.isdisjoint(EVERY_KIND)
    assert starts.settings <= set(ENGINE)
    for pattern, phase in starts.phases:
        assert re.compile(pattern)
        assert phase
    for failure in starts.failures:
        groups = [""] * re.compile(failure.pattern).groups
        assert failure.message.format(*groups) or failure.message == "{0}"
        failure.hint.format(*groups)
    assert found.ready_path.startswith("/")


@pytest.mark.parametrize("kind", KINDS)
class TestControl:
    def test_progress_is_read_or_refused(self, kind: str) -> None:
        asks = control(kind)
        if not asks.progress_path:
            return
        assert asks.progress(PROGRESS[kind]).running == 2
        for bad in (b"", b"[1]", b'{"running":"x","loads":"x"}', b"\xff"):
            with pytest.raises(ValueError):
                asks.progress(bad)

    def test_an_engine_that_is_gone_is_unreachable_by_every_ability(self, kind: str) -> None:
        asks = control(kind)
        calls: dict[Ability, Callable[[Target], Awaitable[object]]] = {
            Ability.STATE: lambda target: asks.state(target, 1.0),
            Ability.LINK: lambda target: asks.link(target, [], 1.0),
            Ability.SWEEP: lambda target: asks.sweep(target, 0, 0, 1.0),
            Ability.RELEASE_BY_HOLDER: lambda target: asks.release_holder(target, "d0@e", 1.0),
            Ability.REVOKE: lambda target: asks.revoke(target, "l1", 1.0),
            Ability.NEIGHBOURS: lambda target: asks.meet(target, [], 1.0),
            Ability.ROLE: lambda target: asks.set_role(target, RoleCall("decode"), 1.0),
        }
        assert set(calls) == set(Ability)

        async def check() -> None:
            pool = ConnectionPool("127.0.0.1", free_port())
            for ability in asks.abilities:
                with pytest.raises(Unreachable):
                    await calls[ability](Target(pool, Caller("s")))
            pool.close()

        asyncio.run(check())
