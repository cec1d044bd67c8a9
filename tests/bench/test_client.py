"""The client with a server of known delays: it measures the true values."""

from __future__ import annotations

import asyncio
import statistics

import pytest

from pdctl.bench import Asked, Record
from pdctl.bench.client import Endpoint, Run, _Reader, drive, models, timing_parts, tokenized
from pdctl.bench.measurements import Targets, bottleneck, measurements
from pdctl.bench.report.observations import on_engines, spans
from pdctl.errors import PdctlError
from tests.bench.fake import Fake, listening


def run(
    fake: Fake, asked: list[Asked], times: list[float] | None = None, most_at_once: int = 0, timeout_s: float = 600.0
) -> Run:
    async def main() -> Run:
        async with listening(fake) as url:
            endpoint = Endpoint(url, "fake", timeout_s=timeout_s)
            return await drive(endpoint, asked, times or [0.0] * len(asked), most_at_once, print)

    return asyncio.run(main())


def test_known_delays_give_the_known_answers() -> None:
    fake = Fake(first_s=0.1, gap_s=0.03)
    done = run(fake, [Asked([1] * 7, 11) for _ in range(5)], most_at_once=1)
    found = measurements(done, Targets(ttft=500, tpot=500))
    assert (found["completed"], found["failed"]) == (5, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (35, 55)
    # Sleeps are never shorter, but may be longer on a busy machine. The measurements must be consistent.
    for name, least in (("ttft", 100), ("tpot", 30), ("itl", 30), ("e2el", 400)):
        measured = found[f"p50_{name}_ms"]
        assert isinstance(measured, float)
        assert least <= measured, name
    ttfts, itls = found["ttfts"], found["itls"]
    assert isinstance(ttfts, list)
    assert isinstance(itls, list)
    assert [len(gaps) for gaps in itls] == [10] * 5
    ends = [first + sum(gaps) for first, gaps in zip(ttfts, itls, strict=True)]
    assert found["p50_e2el_ms"] == pytest.approx(1000 * statistics.median(ends), rel=1e-3)
    assert found["p50_tpot_ms"] == pytest.approx(1000 * statistics.median(sum(gaps) / 10 for gaps in itls), rel=1e-3)
    assert found["generated_texts"] == ["".join(f" t{n}" for n in range(11))] * 5
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    assert ours["parts_ms"]["prefill"]["p99"] == 20.0
    assert ours["attainment"] == 1.0
    assert found["request_goodput"] == found["request_throughput"]


def test_targets_that_are_missed() -> None:
    found = measurements(run(Fake(first_s=0.1), [Asked([1], 3)]), Targets(ttft=50))
    assert found["request_goodput"] == 0.0
    assert found["completed"] == 1


def test_no_more_at_once_than_allowed() -> None:
    fake = Fake(first_s=0.02, gap_s=0.0)
    done = run(fake, [Asked([1], 2) for _ in range(12)], most_at_once=3)
    assert fake.most_at_once == done.most_at_once == 3
    free = Fake(first_s=0.2, gap_s=0.0)
    run(free, [Asked([1], 2) for _ in range(12)])
    assert free.most_at_once == 12


def test_requests_leave_when_they_should() -> None:
    done = run(Fake(first_s=0.0), [Asked([1], 2) for _ in range(3)], [0.0, 0.15, 0.3])
    assert all(record.sent_at >= record.planned_at for record in done.records), "never before their time"
    assert [record.sent_at for record in done.records] == sorted(record.sent_at for record in done.records)
    assert [round(r.planned_at - done.started_at, 2) for r in done.records] == [0.0, 0.15, 0.3]


@pytest.mark.parametrize(
    ("fake", "error", "timeout_s"),
    [
        (Fake(status=503), "status 503", 60.0),
        (Fake(ends=2, first_s=0), "closed the connection", 60.0),
        (Fake(error_at=2, first_s=0), "error in the stream", 60.0),
        (Fake(first_s=60.0), "no complete answer within 0.3 s", 0.3),
    ],
)
def test_failures_are_counted_and_not_measured(fake: Fake, error: str, timeout_s: float) -> None:
    found = measurements(run(fake, [Asked([1], 5)], timeout_s=timeout_s), Targets())
    assert (found["completed"], found["failed"]) == (0, 1)
    assert error in found["errors"][0]  # type: ignore[index]
    assert found["mean_ttft_ms"] == 0.0


def test_a_stream_without_its_end_is_truncated() -> None:
    from pdctl.bench import Record
    from pdctl.bench.client import _Reader

    record = Record(0.0)
    reader = _Reader(record)
    reader.take(b'data: {"choices": [{"text": "a"}]}\n\ndata: {"cho', 1.0)
    reader.take(b'ices": [{"text": "b"}]}\n\n', 2.0)
    assert (reader.is_done, reader.texts, record.gaps) == (False, ["a", "b"], [1.0])
    reader.take(b"data: not json\n\n", 3.0)
    assert "malformed event" in record.error


class Stuck(Fake):
    """Answers one request, and nothing after that; `second`: set when the next one is there."""

    second: asyncio.Event

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, object]) -> bool:
        if len(self.asked) > 1:
            self.second.set()
            await asyncio.Event().wait()
        return await super()._stream(writer, body)


def test_an_interruption_keeps_what_there_is() -> None:
    async def main() -> Run:
        fake = Stuck(first_s=0.0, gap_s=0.0)
        fake.second = asyncio.Event()
        async with listening(fake) as url:
            asked = [Asked([1], 2) for _ in range(50)]
            task = asyncio.ensure_future(drive(Endpoint(url, "m"), asked, [0.0] * 50, 1, print))
            await fake.second.wait()
            task.cancel()
            return await task

    done = asyncio.run(main())
    assert done.was_interrupted
    assert len(done.records) in (2, 3), "one that was answered, one that was not, and perhaps one that waits"
    assert len(done.records[0].gaps) == 1
    found = measurements(done, Targets())
    assert found["completed"] == 1
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    assert ours["interrupted"] is True


def test_where_each_request_was() -> None:
    done = run(Fake(first_s=0.05), [Asked([1], 4) for _ in range(3)])
    found = measurements(done, Targets())
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    assert ours["placed"] == [["p0", "d1", 0.0015]] * 3
    there = on_engines(found)
    assert list(there) == ["p0", "d1"]
    for (sent, first, end), at_prefill, at_decode in zip(spans(found), *there.values(), strict=True):
        assert at_prefill == (sent + 0.0015, first)
        assert at_decode == (first, end)


def test_a_client_that_cannot_keep_up_says_so() -> None:
    done = run(Fake(gap_s=0.05), [Asked([1], 4)])
    done.headroom.cpu, done.headroom.delays = 0.1, [0.001] * 100
    assert bottleneck(done) == ""
    done.headroom.cpu = 0.97
    assert "97% of a core" in bottleneck(done)
    done.headroom.cpu = 0.1
    done.headroom.delays = [0.2] * 100
    assert "200.0 ms late" in bottleneck(done)


def test_what_is_asked_first() -> None:
    async def ask(fake: Fake) -> tuple[list[str], list[int]]:
        async with listening(fake) as url:
            return await models(Endpoint(url)), await tokenized(Endpoint(url, "fake"), "a bb ccc")

    assert asyncio.run(ask(Fake())) == (["fake"], [11, 12, 13])
    assert asyncio.run(ask(Fake(tokenizes=False)))[1] == []


def test_nobody_there() -> None:
    for ask in (models(Endpoint("http://127.0.0.1:9")), tokenized(Endpoint("127.0.0.1:9"), "x")):
        with pytest.raises(PdctlError, match="cannot reach"):
            asyncio.run(ask)
    with pytest.raises(PdctlError, match="is not the URL"):
        Endpoint("ftp://x").pool()


def test_timing_headers() -> None:
    assert timing_parts("queue;dur=1.5, ttft;dur=20, odd, x;dur=y") == ({"queue": 0.0015, "ttft": 0.02}, {})
    said = 'prefill;dur=2;desc=prefill-0, decode;desc="decode-1", z;desc'
    assert timing_parts(said) == ({"prefill": 0.002}, {"prefill": "prefill-0", "decode": "decode-1", "z": ""})


def read(*parts: bytes) -> Record:
    """The record of a stream that arrives in these pieces."""
    record = Record(0.0, sent_at=1.0)
    reader = _Reader(record)
    for number, part in enumerate(parts):
        reader.take(part, 2.0 + number)
    record.is_truncated = not reader.is_done
    return record


EVENT = b'data: {"choices": [{"text": "a"}]}'


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("done", [b"data: [DONE]", b"data:[DONE]"])
def test_line_ends_of_other_servers(end: bytes, done: bytes) -> None:
    whole = EVENT + end + EVENT + end + done + end
    for cut in range(1, len(whole)):
        record = read(whole[:cut], whole[cut:])
        assert (record.error, record.is_truncated, len(record.gaps)) == ("", False, 1), cut


def test_without_usage_events_are_counted() -> None:
    done = run(Fake(usage=False), [Asked([1, 2], 5)])
    assert not done.records[0].has_usage
    found = measurements(done, Targets())
    assert (found["completed"], found["total_output_tokens"]) == (1, 5)
    tpot = found["p50_tpot_ms"]
    assert isinstance(tpot, float)
    assert tpot > 0


def test_an_answer_without_a_token_is_none() -> None:
    done = run(Fake(), [Asked([1], 0)])
    found = measurements(done, Targets(ttft=1000))
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 1, 0.0)
    assert done.records[0].error == "the answer had no token"


@pytest.mark.parametrize("url", ["http://h:99999", "http://[::1", "http://h:80/prefix", "ftp://h", "http://"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(PdctlError, match="not the URL of a service"):
        Endpoint(url).pool()


def test_waiting_for_a_seat_is_not_being_late() -> None:
    done = run(Fake(first_s=0.1), [Asked([1], 2) for _ in range(4)], most_at_once=1)
    for before, after in zip(done.records, done.records[1:], strict=False):
        assert after.planned_at >= before.ended_at, "its time is that of its seat"
