"""A node inspects itself and takes part in transfers, each in a real process."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from pdctl.control_api.examination_messages import ExamineOrder, ReadOrder, ServeOrder
from pdctl.errors import PdctlError
from pdctl.host import program
from pdctl.supervisor.agent import examiner
from pdctl.supervisor.agent.examiner import Examiner
from pdctl.topology.spec import Cluster
from tests.doctor.areas.test_cluster import TEXT
from tests.supervisor.fleet import plan_of

pytestmark = pytest.mark.anyio
CLUSTER = Cluster(("http://127.0.0.1:1",), "127.0.0.1", "none")


def node(folder: Path, allow_commands: bool = False) -> Examiner:
    plan = plan_of(folder)
    return Examiner("a", "127.0.0.1", CLUSTER, allow_commands, lambda: plan)


async def test_it_inspects_itself_for_its_own_cluster(tmp_path: Path) -> None:
    report = await node(tmp_path).report(ExamineOrder(text=TEXT, source="/elsewhere/pdctl.toml"))
    found = {finding.id: finding for finding in report.findings}
    assert found["cluster.etcd"].subject == "http://127.0.0.1:1", "its own file says where etcd is"
    assert report.traits.pdctl


async def test_a_topology_that_names_programs_is_refused_unless_it_may(tmp_path: Path) -> None:
    text = TEXT + 'python = "/tmp/evil"\n'
    with pytest.raises(PdctlError, match="sets python of group decode"):
        await node(tmp_path).report(ExamineOrder(text=text, source="/x"))
    assert (await node(tmp_path, True).report(ExamineOrder(text=text, source="/x"))).findings
    found = await node(tmp_path).report(ExamineOrder(text="no topology [", source="/x"))
    assert "topology.invalid" in {finding.id for finding in found.findings}


async def test_bytes_go_from_one_process_to_another(tmp_path: Path) -> None:
    transport: Literal["nixl", "mooncake"]
    if importlib.util.find_spec("nixl"):
        transport = "nixl"
    elif importlib.util.find_spec("mooncake"):
        transport = "mooncake"
    else:
        pytest.skip("no transport between hosts is installed")
    here = node(tmp_path)
    async with here.serving(ServeOrder(transport=transport, protocol="tcp", mib=2)) as address:
        assert address
        found = await here.read(ReadOrder(transport=transport, protocol="tcp", mib=2, address=address))
    assert (found.error, found.bytes_right, found.mib, found.transport) == ("", True, 2, transport)
    assert found.gbps > 0
    gone = await here.read(ReadOrder(transport=transport, protocol="tcp", mib=2, address=address))
    assert gone.error


@pytest.mark.parametrize("address", ["", "a b", "a\nb", "--serve\x00", "é"])
async def test_a_malformed_address_starts_nothing(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "engine", lambda *words: pytest.fail("started"))
    with pytest.raises(PdctlError, match="malformed"):
        await node(tmp_path).read(ReadOrder(transport="nixl", address=address))


async def test_a_process_that_fails_or_hangs_is_told_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "probe.py"

    def runs(text: str) -> None:
        script.write_text(f"import sys, time\n{text}\n")

    monkeypatch.setattr(program, "engine", lambda *words: [sys.executable, str(script), *words])
    here, order = node(tmp_path), ReadOrder(transport="nixl", address="x")
    runs("sys.stderr.write('first\\nno library'); sys.exit(3)")
    with pytest.raises(PdctlError, match="failed: no library"):
        await here.read(order)
    with pytest.raises(PdctlError, match="cannot serve here: no library"):
        async with here.serving(order):
            pytest.fail("it serves")
    runs("print('not json')")
    with pytest.raises(PdctlError, match="not understood"):
        await here.read(order)
    runs("sys.stdin.readline(); time.sleep(600)")
    monkeypatch.setattr(examiner, "_READ_S", 0.3)
    monkeypatch.setattr(examiner, "_ADDRESS_S", 0.3)
    with pytest.raises(PdctlError, match=r"more than 0\.3 s"):
        await here.read(order)
    with pytest.raises(PdctlError, match="did not open within"):
        async with here.serving(order):
            pytest.fail("it serves")


async def test_a_node_that_is_busy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examiner, "_TURN_S", 0.05)
    here = node(tmp_path)
    async with here._alone():
        with pytest.raises(PdctlError, match=r"busy with another examination for 0\.05 s"):
            await here.report(ExamineOrder(text="", source="/x"))
    async with here._alone():
        pass


async def test_the_command_line_is_made_of_known_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, seen = tmp_path / "probe.py", tmp_path / "seen.json"
    script.write_text(
        f"import json, sys\njson.dump([sys.argv[1:], sys.stdin.read()], open({str(seen)!r}, 'w'))\n"
        "print(json.dumps({'transport': 'nixl', 'error': 'none here'})); sys.exit(1)\n"
    )
    monkeypatch.setattr(program, "engine", lambda *words: [sys.executable, str(script), *words])
    plan = plan_of(tmp_path)
    engine = replace(plan.processes[0], role="prefill", rdma=("mlx5_0",)) if plan.processes else None
    plan = replace(plan, processes=(engine,)) if engine else plan
    here = Examiner("a", "127.0.0.1", CLUSTER, False, lambda: plan)
    found = await here.read(ReadOrder(transport="nixl", protocol="rdma", mib=3, address="10.0.0.1:7,--serve"))
    assert found.error == "none here"
    words, given = json.loads(seen.read_text())
    assert given == "10.0.0.1:7,--serve\n", "what another node says comes by stdin"
    assert words[2:] == [
        "--transport", "nixl", "--protocol", "rdma", "--mib", "3", "--host", "127.0.0.1",
        *(["--devices", "mlx5_0"] if engine else []), "--from-stdin",
    ]  # fmt: skip
