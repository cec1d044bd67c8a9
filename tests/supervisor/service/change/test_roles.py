"""Roles that change: what is remembered, what is refused, and what an apply keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.plan import Plan, ProcessSpec
from pdctl.plan.changes import diff, with_roles
from pdctl.supervisor.service.change.roles import lacking, left, with_role
from pdctl.wire import EngineState
from tests.supervisor.fleet import plan_of, shell

ROLES = st.sampled_from(["prefill", "decode", "hybrid"])


def engine(name: str, role: str, switches: bool = True) -> ProcessSpec:
    return replace(shell(name, "sleep 1", kind="builtin", role=role), switches=switches)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(tmp_path, engine("p", "prefill"), engine("d", "decode"), engine("e", "decode"))


def changed(plan: Plan, name: str, role: str) -> Plan:
    specs = [with_role(spec, role) if spec.name == name else spec for spec in plan.processes]
    return replace(plan, processes=tuple(specs))


@given(ROLES, st.lists(ROLES, max_size=8))
def test_the_topologys_role_is_remembered_until_it_is_back(first: str, others: list[str]) -> None:
    spec = planned = engine("d", first)
    for number, role in enumerate(others, 1):
        spec = with_role(spec, role)
        assert spec.role == role
        assert (spec.planned_role or spec.role) == first
        assert (spec.planned_role == "") == (role == first)
        assert spec.role_epoch == number
    assert spec.digest() == planned.digest(), "no change needs a restart"


def test_an_apply_of_the_same_file_keeps_the_role(plan: Plan) -> None:
    running = changed(plan, "d", "prefill")
    wanted = with_roles(running, plan)
    assert diff(running, wanted).is_empty
    assert wanted.processes[1].role_epoch == 1


def test_a_file_with_another_role_changes_it_without_a_restart(plan: Plan) -> None:
    running = changed(plan, "d", "prefill")
    edited = replace(plan, processes=(plan.processes[0], replace(plan.processes[1], role="hybrid"), plan.processes[2]))
    wanted = with_roles(running, edited)
    found = diff(running, wanted)
    assert found.live == {"d": "role: prefill to hybrid"}
    assert not found.restarted
    assert (wanted.processes[1].planned_role, wanted.processes[1].role_epoch) == ("", 2)


def test_the_epoch_never_goes_back(plan: Plan) -> None:
    running = changed(changed(plan, "d", "prefill"), "d", "decode")
    assert with_roles(running, plan).processes[1].role_epoch == 2


def test_an_engine_that_cannot_change_is_restarted(tmp_path: Path) -> None:
    before = plan_of(tmp_path, engine("v", "prefill", switches=False))
    after = replace(before, processes=(replace(before.processes[0], role="decode"),))
    assert diff(before, with_roles(before, after)).restarted == {"v": "role: prefill to decode"}


def test_a_service_keeps_one_engine_of_each(plan: Plan) -> None:
    assert lacking(plan, "d", "prefill") == ""
    assert "prefills" in lacking(plan, "p", "decode")
    assert lacking(plan, "p", "hybrid") == ""
    assert "decodes" in lacking(changed(plan, "e", "prefill"), "d", "prefill")
    assert lacking(changed(plan, "e", "hybrid"), "p", "decode") == ""


def test_engines_of_other_nodes_count(plan: Plan) -> None:
    """In a cluster, a node may have no other engine of a role: other nodes have."""
    assert lacking(plan, "p", "decode", ["decode", "prefill"]) == ""
    assert "prefills" in lacking(plan, "p", "decode", ["decode"])


def test_only_work_of_the_old_role_is_waited_for() -> None:
    state = EngineState(
        "e", "decode", "x", 9, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, leases=[], links=[], transfers={}, prefills=2, answers=3
    )
    assert [left(state, role) for role in ("prefill", "decode", "hybrid")] == [3, 2, 0]
