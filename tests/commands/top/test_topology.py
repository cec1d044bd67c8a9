from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.commands.top.lines import Line
from pdctl.commands.top.topology import mark, overview, tree
from pdctl.control_api import MeasuredStatus
from tests.commands.top.made import STATUSES, attached, link, process, service, status


def text(line: Line) -> str:
    return "".join(span.text for span in line)


def test_one_line() -> None:
    assert text(overview(service(1, 2), 80)) == "clients → proxy ● → prefill ● ─ shm → decode ●●"
    hybrids = status(process("hybrid-0"), process("proxy", kind="proxy"), process("store", role="store"))
    assert text(overview(hybrids, 80)) == "clients → proxy ● → hybrid ●   store ●"
    crowd = service(20, 20)
    assert text(overview(crowd, 60)) == "clients → proxy ● → prefill ●20 ─ shm → decode ●20"


def test_a_link_in_trouble_is_red() -> None:
    pair = process("prefill-0"), process("decode-0")
    found = status(*pair, links=(link("prefill-0", "decode-0", fallback="no RDMA"),))
    assert {span.level for span in overview(found, 80) if "shm" in span.text} == {"bad"}
    assert "shm 11.80 GB/s FALLBACK → ● decode-0" in text(tree(found, "h")[2])
    lost = status(*pair, links=(link("prefill-0", "decode-0", transport=""),))
    assert "no link" in text(overview(lost, 80))


def test_marks() -> None:
    states = ("ready", "starting", "draining", "backoff", "failed")
    assert [mark(process("d", state=state)).text for state in states] == ["●", "○", "○", "✗", "✗"]
    assert mark(attached("far", answers=False)) == ("✗", "bad")
    assert mark(attached("far", leaving=True)).text == "○"


def test_a_tree() -> None:
    found = service(2, 1, attached=(attached("far"),))
    assert list(map(text, tree(found, "box"))) == [
        "box",
        "├─ ● proxy proxy, CPU 0-2,7",
        "├─ ● prefill-0 prefill, CPU 0-2,7, 3 running",
        "│  └─ shm 11.80 GB/s → ● decode-0",
        "├─ ● prefill-1 prefill, CPU 0-2,7, 3 running",
        "│  └─ shm 11.80 GB/s → ● decode-0",
        "├─ ● decode-0 decode, CPU 0-2,7, 3 running",
        "└─ ● far decode, vllm at 10.0.0.7:8100",
    ]


@given(STATUSES, st.integers(20, 200))
def test_every_member_is_there(found: MeasuredStatus, width: int) -> None:
    assert overview(found, width)[0].text == "clients → "
    lines = tree(found, "h")
    assert len(lines) >= 1 + len(found.processes) + len(found.attached)
