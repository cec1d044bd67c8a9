from __future__ import annotations

import itertools
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pdctl.commands.top.board import Shown, frame, shares, wrapped
from pdctl.commands.top.lines import Line, Span, width_of
from pdctl.commands.top.rates import Rates
from pdctl.commands.top.snapshot import Sample, Snapshot, merged, sample_of
from pdctl.commands.top.table import SORTS, in_order, rows_of
from pdctl.commands.top.view import Page, View
from pdctl.control_api import ApplyProgress, MeasuredProcess, MeasuredStatus, ProcessStatus, ServiceStatus
from tests.commands.top.made import EVENTS, NOW, STATUSES, event, process, service, status

RATES = Rates(4.2, 0.0, 0.0, 310.0, 2, 0.12, 0.31, 0.02, 0.044)


def texts(lines: list[Line]) -> list[str]:
    return ["".join(span.text for span in line) for line in lines]


def shown(found: MeasuredStatus, view: View | None = None, **changed: Any) -> Shown:
    view = view or View()
    fields: dict[str, Any] = {
        "events": (event("exited", "killed by SIGKILL"), event("ready", "ready")),
        "samples": (Sample(RATES, 3, 1, 0.45),) * 30,
    }  # fmt: skip
    own = {name: changed.pop(name) for name in ("message", "log") if name in changed}
    rows = in_order(rows_of(found, NOW), view.sort, view.is_reversed)
    return Shown(Snapshot(found, **(fields | changed)), view, rows, NOW, "box", **own)


def test_80_by_24() -> None:
    lines = texts(frame(shown(service(1, 1)), 80, 24))
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("t: ready  m at http://127.0.0.1:8000")
    assert lines[1] == "clients → proxy ● → prefill ● ─ shm → decode ●"
    assert lines[2].startswith("requests/s 4.2  failed/s 0  running 3  waiting 3  tokens/s 310  ")
    assert lines[3].split()[:5] == ["TTFT", "p50", "120ms", "p99", "310ms"]
    assert "ITL p50 20ms    p99 44ms  " in lines[3]
    assert lines[6].startswith("▶ prefill-0")
    assert any(line.startswith("  prefill-0  decode-0  shm") for line in lines)
    assert any("exited: killed by SIGKILL" in line for line in lines)
    assert lines[-1].startswith("q quit")


def test_200_by_50_has_the_tree_and_trends() -> None:
    lines = texts(frame(shown(service(1, 2)), 200, 50))
    assert max(map(len, lines)) <= 200
    whole = "\n".join(lines)
    for words in ("TOPOLOGY", "└─ shm 11.80 GB/s → ● decode-1", "TTFT P50", "KV, FULLEST ENGINE", "RUNNING"):
        assert words in whole
    assert len({line.index("│") for line in lines if " │ " in line and "─" not in line}) == 1


def test_a_supervisor_that_does_not_answer() -> None:
    for is_running, word in ((True, "not answering"), (False, "not running")):
        lines = frame(shown(service(), trouble="service 't' is not there; start it", is_running=is_running), 80, 24)
        assert Span(word, "bad") in lines[0]
        assert lines[1] == [Span("service 't' is not there; start it", "bad")]
        assert "decode-0" in "".join(texts(lines)), "what was known stays"


def test_a_proxy_that_does_not_answer() -> None:
    lines = texts(frame(shown(service(), samples=(Sample(None, 0, 0, None),)), 80, 24))
    assert lines[2].startswith("requests/s -  ")
    assert lines[3].startswith("TTFT p50 - ")
    lines = texts(frame(shown(service(), samples=()), 80, 24))
    assert lines[2].startswith("requests/s -  ")


def test_an_apply_is_shown() -> None:
    progress = ApplyProgress(state="running", step="restarting decode-0", error="")
    assert "applying: restarting decode-0" in texts(frame(shown(service(apply=progress)), 100, 24))[0]


def test_the_question_says_what_it_costs() -> None:
    assert texts(frame(shown(service(), View(asks="decode-0")), 80, 24))[-1] == (
        "Restart decode-0 (3 running)? y: at once, d: after its requests, other keys: no")  # fmt: skip
    assert "cutting its streams" in texts(frame(shown(service(), View(asks="proxy")), 90, 24))[-1]


def test_the_cursor_stays_on_a_small_screen() -> None:
    found = status(*(process(f"d-{n}") for n in range(40)))
    for name in ("d-0", "d-20", "d-39"):
        lines = texts(frame(shown(found, View(chosen=name)), 80, 24))
        assert sum(line.startswith(f"▶ {name} ") for line in lines) == 1
    assert any("more" in line for line in lines)


def test_a_log() -> None:
    log = [f"line {n}" for n in range(100)]
    view = View(page=Page.LOGS, chosen="decode-0")
    lines = texts(frame(shown(service(), view, log=log), 80, 24))
    assert lines[0].startswith("log of decode-0  ready, /decode-0.log")
    assert lines[1:23] == log[-22:]
    back = View(page=Page.LOGS, chosen="decode-0", back=10)
    assert texts(frame(shown(service(), back, log=log), 80, 24))[1:23] == log[-32:-10]
    gone = View(page=Page.LOGS, chosen="decode-9")
    lines = texts(frame(shown(service(), gone), 80, 24))
    assert "no longer part of the service" in lines[0]
    assert lines[1] == "(empty)"


def test_help_fits() -> None:
    lines = texts(frame(shown(service(), View(page=Page.HELP)), 80, 24))
    assert len(lines) == 24
    assert any(line.startswith("  q, ctrl-c") for line in lines)
    assert any("down" in line for line in lines[-8:])
    assert max(map(len, lines)) <= 80


@given(st.lists(st.text(max_size=30), max_size=10), st.integers(0, 12))
def test_wrapped_lines_lose_nothing(lines: list[str], width: int) -> None:
    found = wrapped(lines, width)
    assert "".join(found) == "".join(lines)
    assert all(len(line) <= max(1, width) for line in found)
    assert len(found) >= len(lines)


@given(st.integers(-5, 80), st.integers(0, 60), st.integers(0, 60))
def test_shares_fit(room: int, processes: int, links: int) -> None:
    found = shares(room, processes, links)
    blanks = sum(lines > 0 for lines in found[1:])
    assert all(lines >= 0 for lines in found)
    assert sum(found) + blanks <= max(0, room)
    table, for_links, for_events = found
    assert table <= 1 + processes
    assert for_links <= (1 + links if links else 0)
    if room > 0:
        assert table > 0, "processes come first"
    if for_events:
        assert sum(found) + blanks == room, "events take what is left over"
        assert table >= 1 + min(5, processes)


@given(
    STATUSES, st.lists(EVENTS, max_size=30), st.integers(1, 250), st.integers(0, 70), st.sampled_from(list(Page)),
    st.sampled_from(SORTS), st.text(max_size=5), st.lists(st.text(max_size=200), max_size=5),
)  # fmt: skip
def test_any_service_on_any_screen(
    found: MeasuredStatus, events: list[Any], width: int, height: int, page: Page, sort: str, asks: str, log: list[str]
) -> None:
    view = View(page=page, sort=sort, asks=asks, chosen=found.processes[0].name if found.processes else "")
    lines = frame(shown(found, view, events=tuple(events), log=log), width, height)
    assert len(lines) == height
    for line in lines:
        if page is not Page.LOGS:
            assert not any(ord(c) < 32 for span in line for c in span.text)
        assert width_of(line) < 4000


def unmeasured(one: MeasuredProcess) -> ProcessStatus:
    return ProcessStatus(**{name: getattr(one, name) for name in ProcessStatus.__struct_fields__})


def test_merged_keeps_measurements_of_the_same_start_only() -> None:
    measured = service(1, 1)
    fields = msgspec.structs.asdict(measured)
    fields["processes"] = tuple(unmeasured(one) for one in measured.processes)
    bare = ServiceStatus(**fields)
    assert merged(bare, measured) == measured
    changed = {"state": "backoff", "pid": None}
    dead = msgspec.structs.replace(bare.processes[1], **changed)
    again = msgspec.structs.replace(bare.processes[0], epoch="0-2")
    now = msgspec.structs.replace(bare, processes=(again, dead, bare.processes[2]))
    found = merged(now, measured)
    assert [p.running for p in found.processes] == [None, None, None]
    assert [p.kv_used for p in found.processes] == [None, None, None]
    assert found.processes[1].state == "backoff"
    assert merged(bare, None).processes[0].running is None


def test_merged_lists_what_is_now() -> None:
    measured = service(2, 1)
    for kept in itertools.combinations(measured.processes, 2):
        now = status(*kept)
        assert [p.name for p in merged(now, measured).processes] == [p.name for p in kept]


def test_a_sample() -> None:
    found = sample_of(status(process("a", kv_used=0.2), process("b", kv_used=0.7), process("c", kv_used=None)), RATES)
    assert (found.running, found.waiting, found.kv_used) == (9, 0, 0.7)
    assert sample_of(status(), None) == Sample(None, 0, 0, None)
