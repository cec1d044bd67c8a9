from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.commands.top.lines import Line, width_of
from pdctl.commands.top.table import (
    SORTS,
    event_lines,
    in_order,
    link_level,
    link_table,
    process_table,
    rows_of,
)
from pdctl.control_api import Event, MeasuredStatus
from tests.commands.top.made import NOW, STATUSES, attached, event, exited, link, process, service, status


def text(line: Line) -> str:
    return "".join(span.text for span in line)


def levels(line: Line, word: str) -> set[str]:
    return {span.level for span in line if word in span.text}


def test_80_columns_have_what_counts() -> None:
    found = service(1, 1)
    header, lines = process_table(rows_of(found, NOW), 78, "", False)
    assert text(header).split() == ["PROCESS", "ROLE", "STATE", "RUN", "QUEUE", "KV", "TOK/S", "RESTARTS", "NOTE"]
    assert text(lines[1]).split() == ["decode-0", "decode", "ready", "3", "0", "█", "25%", "10", "0", "-"]
    assert width_of(header) == 78


def test_200_columns_have_all() -> None:
    header, lines = process_table(rows_of(service(1, 1), NOW), 200, "KV", False)
    assert {"PID", "DEVICE", "HITS", "LEASES", "INLINE", "CPU", "MEMORY", "KV▼"} <= set(text(header).split())
    assert "GPU MEM" not in text(header), "a column that says nothing takes no room"
    assert "cpu 0-2,7" in text(lines[0])


def test_a_crash_is_red() -> None:
    one = process("decode-0", state="backoff", reason="killed by SIGKILL", pid=None, last_exit=exited())
    _, lines = process_table(rows_of(status(one), NOW), 120, "", False)
    assert levels(lines[0], "killed by SIGKILL") == {"bad"}
    assert levels(lines[0], "backoff") == {"busy"}
    _, lines = process_table(rows_of(status(process("d-0", state="failed")), NOW), 120, "", False)
    assert levels(lines[0], "failed") == {"bad"}


def test_what_a_process_is_doing() -> None:
    for one, words in (
        (process("d-0", state="starting", phase="loading weights", phase_s=12.0), ("loading weights", "12s")),
        (process("d-0", leaving_role="decode", planned_role="decode", role="prefill", leaving_work=3),
         ("prefill*", "hybrid until 3 answers")),
        (process("d-0", ready_since="2027-01-15T07:55:00+00:00"), ("5m00s",)),
    ):  # fmt: skip
        _, lines = process_table(rows_of(status(one), NOW), 160, "", False)
        for word in words:
            assert word in text(lines[0])


def test_attached_engines_are_rows() -> None:
    rows = rows_of(status(attached=(attached("far"), attached("gone", answers=False))), NOW)
    _, lines = process_table(rows, 120, "", False)
    assert "answers" in text(lines[0])
    assert "vllm at 10.0.0.7:8100" in text(lines[0])
    assert levels(lines[1], "silent") == {"bad"}
    assert not rows[0].is_process


def names(found: MeasuredStatus, by: str, is_reversed: bool = False) -> list[str]:
    return [row.name for row in in_order(rows_of(found, NOW), by, is_reversed)]


def test_orders() -> None:
    found = status(
        process("b", kv_used=0.5, running=1), process("a", kv_used=None, running=2),
        process("c", kv_used=0.9, running=2, state="failed"),
    )  # fmt: skip
    assert names(found, "") == ["b", "a", "c"]
    assert names(found, "", True) == ["c", "a", "b"]
    assert names(found, "PROCESS") == ["a", "b", "c"]
    assert names(found, "PROCESS", True) == ["c", "b", "a"]
    assert names(found, "KV") == ["c", "b", "a"], "numbers from the highest; unknown last"
    assert names(found, "KV", True) == ["b", "c", "a"], "unknown last, either way"
    assert names(found, "RUN") == ["a", "c", "b"], "equal ones stay in the order of the plan"
    assert names(found, "STATE") == ["c", "b", "a"], "the worst first"


@given(STATUSES, st.sampled_from(SORTS), st.booleans())
def test_an_order_loses_nothing(found: MeasuredStatus, by: str, is_reversed: bool) -> None:
    rows = rows_of(found, NOW)
    ordered = in_order(rows, by, is_reversed)
    assert sorted(map(id, ordered)) == sorted(map(id, rows))
    unknown = [by and by not in row.values for row in ordered]
    assert unknown == sorted(unknown)


@given(STATUSES, st.integers(50, 250), st.sampled_from(SORTS))
def test_lines_are_as_wide_as_asked(found: MeasuredStatus, width: int, by: str) -> None:
    """All of the same width, so that columns stand below each other, unless names alone are wider."""
    for header, lines in (
        process_table(rows_of(found, NOW), width, by, False), link_table(found.links, width),
    ):  # fmt: skip
        wide = {width_of(line) for line in (header, *lines)}
        assert len(wide) == 1
        names_of = [*(p.name for p in found.processes), *(one.name for one in found.attached)]
        longest = max([0, *map(len, names_of), *(len(one.peer) + len(one.reader) for one in found.links)])
        assert wide == {width} or longest > 20


def test_links() -> None:
    back = "no RDMA device is active"
    links = [link("p", "d"), link("p", "e", transport="mooncake", protocol="tcp", fallback=back),
             link("p", "f", transport="", protocol="", error="another model", gbps=0.0)]  # fmt: skip
    header, lines = link_table(links, 120)
    assert text(header).split()[:4] == ["KV", "FROM", "TO", "TRANSPORT"]
    assert "11.80" in text(lines[0])
    assert levels(lines[1], f"FALLBACK: {back}") == {"bad"}
    assert levels(lines[2], "another model") == {"bad"}
    assert [link_level(one) for one in links] == ["good", "bad", "bad"]


@pytest.mark.parametrize(
    ("one", "words", "level"),
    [
        (event("exited", "killed by SIGKILL", expected=False), "exited: killed by SIGKILL", "bad"),
        (event("exited", "exit code 0", expected=True), "exited: exit code 0", "busy"),
        (event("ready", "ready"), "ready", "good"),
        (event("not_alive", "no token for 30 s"), "no token for 30 s", "bad"),
        (event("phase", "loading \x1b[31mweights"), "loading weights", "dim"),
    ],
)
def test_events(one: Event, words: str, level: str) -> None:
    line, below = event_lines([one, event("ready", "ready", "a-longer-name")])
    assert len(line[1].text) == len(below[1].text), "messages begin below each other"
    assert text(line).endswith(words)
    assert line[-1].level == level
    assert line[1].text.strip() == "decode-0"
