from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdctl.plan import Plan
from pdctl.plan.changes import diff
from tests.supervisor.fleet import plan_of, shell


def plan(tmp_path: Path) -> Plan:
    proxy = shell("proxy", "x", kind="proxy", role="proxy")
    return plan_of(tmp_path, shell("a", "sleep 1"), shell("b", "sleep 2"), proxy)


def test_nothing_changed(tmp_path: Path) -> None:
    before = plan(tmp_path)
    found = diff(before, before)
    assert found.is_empty
    assert found.unchanged == ("a", "b", "proxy")


def test_added_removed_restarted(tmp_path: Path) -> None:
    before = plan(tmp_path)
    a, b, proxy = before.processes
    after = replace(before, processes=(replace(a, argv=("/bin/sh", "-c", "sleep 9")), shell("c", "x"), proxy))
    found = diff(before, after)
    assert (found.added, found.removed, found.unchanged) == (("c",), ("b",), ("proxy",))
    assert found.restarted == {"a": "command: sleep 1 to sleep 9"}
    assert b.digest() != a.digest()


def test_what_a_running_proxy_takes_on_and_what_it_does_not(tmp_path: Path) -> None:
    before = plan(tmp_path)
    live = diff(before, replace(before, proxy=replace(before.proxy, routing="random"), ttft_ms=5.0))
    assert live.live == {"proxy": "routing, ttft_ms changed"}
    assert not live.restarted
    fixed = diff(before, replace(before, proxy=replace(before.proxy, cors_origins=("*",))))
    assert fixed.restarted == {"proxy": "cors_origins changed"}


def test_the_supervisors_own_settings_touch_nobody(tmp_path: Path) -> None:
    before = plan(tmp_path)
    found = diff(before, replace(before, supervision=replace(before.supervision, grace_s=9.0)))
    assert found.live == {"pdctl": "grace_s changed"}
    assert found.unchanged == ("a", "b", "proxy")


def test_another_role_restarts_an_engine(tmp_path: Path) -> None:
    before = plan(tmp_path)
    a, b, proxy = before.processes
    found = diff(before, replace(before, processes=(replace(a, role="decode"), b, proxy)))
    assert found.restarted == {"a": "role: other to decode"}
    assert a.digest() != replace(a, role="decode").digest()
