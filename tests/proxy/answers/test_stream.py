"""Reading an engine's events: clients' data and the counts do not depend on how the network splits the stream."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.adapters import CannotResume, Choice, EngineError, RequestState, dialect
from pdctl.net import http_client
from pdctl.proxy.answers import sinks
from pdctl.proxy.answers.stream import EventReader
from pdctl.proxy.engines import engine as engines
from pdctl.proxy.telemetry.metrics import Metrics
from pdctl.proxy.telemetry.timing import Timing

HIDDEN = ("token_ids", "prompt_token_ids")


class Engine:
    """The part of an engine that the reader uses."""

    def __init__(self, kind: str) -> None:
        self.name = "decode-0"
        self.dialect = dialect(kind)
        self.heard_at = 0.0

    def paced(self, seconds: float) -> None:
        assert seconds >= 0


class Exchange:
    """Reads in order of arrival, offered to the tap first, like a connection."""

    def __init__(self, reads: list[bytes]) -> None:
        self._reads = reads
        self._tap: Callable[[bytes], float] | None = None

    def tap(self, take: Callable[[bytes], float]) -> None:
        self._tap = take

    async def read(self) -> bytes | None:
        while self._reads:
            data = self._reads.pop(0)
            if self._tap is None or not self._tap(data):
                return data
        return None


class Sink:
    """A streaming client. While `busy()` is true, it does not accept parts at once."""

    takes_whole = False
    event_head = b'data: {"id":"ours","choices":['

    def __init__(self, passes: bool, hides: bool, busy: Callable[[], bool]) -> None:
        self.passes, self.hides_token_ids, self.shows_token_ids = passes, hides, not hides
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.ids: set[str] = set()
        self.added: list[int] = []
        self.noted: list[int] = []
        self.observed: list[dict[str, object]] = []
        self._busy = busy

    def _saw(self, data: bytes) -> None:
        assert data.endswith(b"\n\n")
        for event in data[:-2].split(b"\n\n"):
            body = json.loads(event.removeprefix(b"data: "))
            [choice] = body["choices"]
            self.ids.add(body["id"])
            if self.hides_token_ids:
                assert not set(HIDDEN) & set(choice), choice
            self.observed.append({key: value for key, value in choice.items() if key not in HIDDEN})

    async def pass_on(self, data: bytes, ids: bytes = b"") -> None:
        self._saw(data)
        self._note(ids)

    def part_now(self, data: bytes, ids: bytes) -> bool:
        if self._busy():
            return False
        self._saw(data)
        self._note(ids)
        return True

    def _note(self, ids: bytes) -> None:
        self.noted += map(int, ids.split(b",")) if ids else ()

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        self.added += token_ids
        self.noted += token_ids
        self.observed.append({key: json.loads(bytes(value)) for key, value in choice.items() if key not in HIDDEN})


# Text that a hostile prompt could use to imitate protocol data.
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(['"token_ids":[7]', ',"token_ids":[', '"finish_reason":null', "\n\n", "data: [DONE]\n\n", "]", ""]),
)
IDS = st.lists(st.integers(0, 262_143), max_size=3)


@st.composite
def events(draw: st.DrawFn) -> list[dict[str, object]]:
    """The choices of a stream, the last one with its reason."""
    found: list[dict[str, object]] = []
    prompt_ids = draw(st.booleans())
    for number in range(draw(st.integers(1, 80))):
        choice: dict[str, object] = {"index": 0, "text": draw(TEXTS), "logprobs": None, "finish_reason": None}
        if prompt_ids:
            choice["prompt_token_ids"] = [1, 2, 3] if number == 0 else None
        choice["token_ids"] = draw(IDS)
        found.append(choice)
    found[-1]["finish_reason"] = "length"
    return found


def ids_of(choice: dict[str, object]) -> list[int]:
    found = choice["token_ids"]
    assert isinstance(found, list)
    return found


def written(choices: list[dict[str, object]], compact: bool) -> bytes:
    separators = (",", ":") if compact else (", ", ": ")
    parts = [json.dumps({"id": "x", "choices": [c]}, separators=separators, ensure_ascii=False) for c in choices]
    return "".join(f"data: {part}\n\n" for part in (*parts, "[DONE]")).encode("utf-8", "surrogatepass")


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place % len(data) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def at_events(data: bytes, sizes: list[int]) -> list[bytes]:
    """Split only between events, with some events merged, like an engine's writes."""
    pieces = [piece + b"\n\n" for piece in data.split(b"\n\n")[:-1]]
    reads = []
    while pieces:
        size = sizes.pop() if sizes else 1
        reads.append(b"".join(pieces[:size]))
        pieces = pieces[size:]
    return reads


def reader_of(engine: Engine, state: RequestState, sink: Sink, metrics: Metrics) -> EventReader:
    # Stand-ins that only have what the reader uses.
    return EventReader(cast(engines.Engine, engine), state, cast(sinks.Sink, sink), Timing(), metrics)


def run(reader: EventReader, exchange: Exchange) -> None:
    asyncio.run(reader.run(cast(http_client.Exchange, exchange)))


def read(kind: str, reads: list[bytes], sink: Sink) -> tuple[EventReader, RequestState, Metrics]:
    state, metrics = RequestState("/v1/completions", False, {}), Metrics("m", 1.0, 1.0)
    reader = reader_of(Engine(kind), state, sink, metrics)
    run(reader, Exchange(reads))
    reader.settle()
    return reader, state, metrics


@pytest.mark.parametrize("kind", ["vllm", "builtin"])
@given(events(), st.data())
def test_cuts_change_nothing(kind: str, choices: list[dict[str, object]], data: st.DataObject) -> None:
    body = written(choices, data.draw(st.booleans(), "compact"))
    if data.draw(st.booleans(), "between events"):
        reads = at_events(body, data.draw(st.lists(st.integers(1, 5))))
    else:
        reads = cut(body, data.draw(st.lists(st.integers(1, 1 << 16), max_size=20)))
    busy = data.draw(st.lists(st.booleans(), max_size=30))
    sink = Sink(data.draw(st.booleans()), data.draw(st.booleans()), lambda: bool(busy and busy.pop()))
    reader, state, metrics = read(kind, reads, sink)
    assert [choice["text"] for choice in sink.observed] == [choice["text"] for choice in choices]
    assert [choice["finish_reason"] for choice in sink.observed] == [choice["finish_reason"] for choice in choices]
    assert state.emitted == [token for choice in choices for token in ids_of(choice)]
    assert sink.noted == state.emitted  # another proxy could go on
    assert reader.finished
    silent = list(itertools.takewhile(lambda choice: choice["text"] == "", reversed(choices)))
    assert state.held == sum(len(ids_of(choice)) for choice in silent)
    # The engine's answer ids differ from the client's.
    assert sink.ids <= ({"ours"} if kind == "vllm" else {"x"})
    if kind == "vllm" and "prompt_token_ids" in choices[0]:
        assert state.prompt_ids == [1, 2, 3]
    assert sum(metrics.gaps.counts) <= max(reader.tokens, len(choices))


@pytest.mark.parametrize("kind", ["vllm", "builtin"])
def test_an_event_cut_at_any_byte(kind: str) -> None:
    one = {"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "token_ids": [6]}
    body = written([one, one, one, {**one, "finish_reason": "length"}], True)
    whole = body.index(b"\n\n") + 2
    for place in range(whole, 3 * whole):
        sink = Sink(passes=True, hides=True, busy=lambda: False)
        _, state, _ = read(kind, [body[:whole], body[whole:place], body[place:]], sink)
        assert [choice["text"] for choice in sink.observed] == ["a"] * 4, place
        assert state.emitted == [6] * 4


def test_the_prompts_ids_stay_those_of_the_first_engine() -> None:
    """A later one gets the prompt and the tokens so far as its prompt, and reports all of these."""
    state, sink = RequestState("/v1/completions", False, {}), Sink(passes=True, hides=True, busy=lambda: False)
    for prompt_ids, token in (([1, 2], 6), ([1, 2, 6], 7)):
        one = {"index": 0, "text": "a", "finish_reason": "length", "token_ids": [token], "prompt_token_ids": prompt_ids}
        run(reader_of(Engine("vllm"), state, sink, Metrics("m", 1.0, 1.0)), Exchange([written([one], True)]))
    assert (state.prompt_ids, state.emitted) == ([1, 2], [6, 7])


def test_an_engine_that_never_ends_its_event_is_given_up() -> None:
    sink = Sink(passes=True, hides=True, busy=lambda: False)
    with pytest.raises(EngineError, match="without the end of an event"):
        read("vllm", [b"data: " + b"x" * 2**20] * 17, sink)


def test_an_error_event_ends_the_stream_as_the_engines_failure() -> None:
    error = msgspec.json.encode({"error": {"message": "out of memory", "type": "server_error", "code": 500}})
    first = written([{"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "token_ids": [5]}] * 2, True)
    reads = [*at_events(first, [])[:2], b"data: " + error + b"\n\n"]
    sink = Sink(passes=True, hides=True, busy=lambda: False)
    with pytest.raises(EngineError, match="out of memory"):
        read("vllm", reads, sink)
    assert [choice["text"] for choice in sink.observed] == ["a", "a"]


def step(text: str, *token_ids: int, reason: str | None = None) -> dict[str, object]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "token_ids": token_ids}


def went_on(state: RequestState, sink: Sink, choices: list[dict[str, object]]) -> None:
    state.take_back()
    reader = reader_of(Engine("vllm"), state, sink, Metrics("m", 1.0, 1.0))
    run(reader, Exchange(at_events(written(choices, True), [])))
    reader.settle()


@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize("first", [[], [step("a", 1)]], ids=["at once", "after a text"])
def test_a_character_that_was_cut_is_computed_again(first: list[dict[str, object]], hides: bool) -> None:
    sink = Sink(passes=True, hides=hides, busy=lambda: False)
    _, state, _ = read("vllm", at_events(written([*first, step("", 2), step("", 3)], True), []), sink)
    assert state.held == 2
    # Fail once more within the character, then run to the end.
    went_on(state, sink, [step("", 2)])
    assert (state.held, state.again) == (1, [3])
    sink.added.clear()
    went_on(state, sink, [step("", 2), step("", 3), step("\u20ac", 4), step("!", 5, reason="length")])
    assert "".join(str(choice["text"]) for choice in sink.observed) == "a" * len(first) + "\u20ac!"
    assert state.emitted == [1] * len(first) + [2, 3, 4, 5]
    assert sink.added == [4, 5], "the client already has the others"


def test_other_tokens_than_the_client_has_are_an_error_only_where_it_sees_them() -> None:
    for hides in (True, False):
        sink = Sink(passes=True, hides=hides, busy=lambda: False)
        _, state, _ = read("vllm", at_events(written([step("a", 1), step("", 2)], True), []), sink)
        if hides:
            went_on(state, sink, [step("b", 9, reason="length")])
            assert state.emitted == [1, 9]
        else:
            with pytest.raises(CannotResume, match="other tokens"):
                went_on(state, sink, [step("b", 9, reason="length")])


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("delta", "reasoned"), [
    ({"reasoning": "hm"}, True), ({"reasoning_content": "hm"}, True), ({"content": 'he said: "reasoning":"x"'}, False),
])  # fmt: skip
def test_reasoning_is_noted_wherever_it_comes(delta: dict[str, str], reasoned: bool, one_by_one: bool) -> None:
    choices: list[dict[str, object]] = [
        {"index": 0, "delta": part, "finish_reason": "stop" if last else None, "token_ids": [7]}
        for part, last in (({"content": "a"}, False), (delta, False), ({"content": "b"}, True))
    ]
    data = written(choices, compact=True)
    reads = at_events(data, [1] * 4) if one_by_one else [data]
    sink = Sink(passes=True, hides=True, busy=lambda: False)
    _, state, _ = read("vllm", reads, sink)
    assert state.reasoned is reasoned
