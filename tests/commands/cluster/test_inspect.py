"""What commands on one node show of a cluster, and what they do there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pdctl.control_api import RegistryStatus
from pdctl.supervisor.rundir.journal import EVENTS
from pdctl.supervisor.surface.cluster.merge import ClusterFacts
from tests.commands.cluster.served import SERVICE, Served, served
from tests.supervisor.surface.cluster.nodes import exit_of


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(tmp_path, monkeypatch) as found:
        yield found


def test_status_has_the_node_of_each_process(found: Served) -> None:
    lines = [line.split() for line in found.good("status").splitlines()]
    assert lines[0][:3] == ["service", "fleet:", "ready,"]
    assert ["a", f"127.0.0.20:{found.a.agent.port}", "ready", "9.9", "yes", "-"] in lines
    assert [line[:2] for line in lines if line[:1] in (["prefill-0"], ["a/proxy"], ["decode-0"], ["b/proxy"])] == [
        ["prefill-0", "a"], ["a/proxy", "a"], ["decode-0", "b"], ["b/proxy", "b"],
    ]  # fmt: skip
    told = json.loads(found.good("status", "--json"))
    assert [process["node"] for process in told["processes"]] == ["a", "a", "b", "b"]
    assert told["registry"] == {"ok": True, "since": "", "reason": ""}


def test_status_says_what_is_missing(found: Served) -> None:
    found.end("b")
    frozen = RegistryStatus(ok=False, since="2026-01-01T00:00:00+00:00", reason="nobody answers")
    found.know(ClusterFacts(frozen, "b", {"decode-0": "b", "decode-1": ""}, "no node has room"))
    text = found.good("status")
    assert "degraded" in text
    assert "etcd is not heard since" in text
    assert "nobody answers; what runs goes on, and the plan is frozen" in text
    assert "no node runs decode-1" in text
    assert "no node has room" in text
    assert "silent" in text
    assert "it ran decode-0" in text


def test_status_of_a_cluster_without_a_topology(found: Served) -> None:
    found.a.processes = found.b.processes = ()
    text = found.good("status")
    assert "service fleet: empty" in text
    assert "pdctl up -f FILE" in text
    assert "PROCESS" not in text


def test_why_of_a_process_of_another_node(found: Served) -> None:
    found.b.reports = (exit_of("decode-0", "2026-01-01T00:00:00+00:00"), exit_of("proxy", "2026-01-02T00:00:00+00:00"))
    found.a.reports = (exit_of("proxy", "2026-01-03T00:00:00+00:00"),)
    assert "2026-01-01T00:00:00+00:00  b/decode-0 (pid 7): exit code 1" in found.good("why", "decode-0")
    assert found.good("why", "b/decode-0") == found.good("why", "decode-0")
    told = json.loads(found.good("why", "proxy", "--json"))
    assert [one["node"] for one in told] == ["b", "a"], "the latest last"
    assert [one["node"] for one in json.loads(found.good("why", "a/proxy", "--json"))] == ["a"]
    assert "known: none" in found.run("why", "nobody").error
    found.end("b")
    assert "no answer from b" in found.run("why", "nobody").error


def test_events_of_all_nodes(found: Served) -> None:
    for part, number, name, event in ((found.b, 1, "decode-0", "ready"), (found.a, 2, "proxy", "note"),
                                      (found.b, 3, "proxy", "note")):  # fmt: skip
        entry = {"at": f"2026-01-01T00:00:0{number}+00:00", "process": name, "event": event, "message": str(number)}
        part.journal.folder.mkdir(parents=True, exist_ok=True)
        with (part.journal.folder / EVENTS).open("a") as file:
            file.write(json.dumps({**entry, "after_s": 1.5}) + "\n")
    lines = [json.loads(line) for line in found.good("events").splitlines()]
    assert [(line["node"], line["message"]) for line in lines] == [("b", "1"), ("a", "2"), ("b", "3")]
    assert lines[0] == {"at": "2026-01-01T00:00:01+00:00", "process": "decode-0", "event": "ready", "message": "1",
                        "after_s": 1.5, "node": "b"}  # fmt: skip
    for name, messages in {"proxy": ["2", "3"], "b/proxy": ["3"], "decode-0": ["1"]}.items():
        told = [json.loads(line)["message"] for line in found.good("events", "--process", name).splitlines()]
        assert told == messages
    assert found.good("events", "--since", "2026-01-01T00:00:02+00:00").count("\n") == 2


def test_logs_of_all_nodes(found: Served) -> None:
    for part, name, lines in (
        (found.a, "prefill-0", "2026-01-01 00:00:01,000 one\n2026-01-01 00:00:04,000 four\n"),
        (found.b, "decode-0", "2026-01-01 00:00:02,000 two\nlast words"),
        (found.a, "proxy", "2026-01-01 00:00:03,000 three\n"),
        (found.b, "proxy", "2026-01-01 00:00:05,000 five\n"),
    ):
        part.journal.folder.mkdir(parents=True, exist_ok=True)
        (part.journal.folder / f"{name}.log").write_text(lines)

    def told(*words: str) -> list[tuple[str, str]]:
        lines = [line.split("|") for line in found.good("logs", *words).splitlines()]
        return [(name.strip(), line.split()[-1]) for name, line in lines]

    everything = [("prefill-0", "one"), ("decode-0", "two"), ("a/proxy", "three"), ("prefill-0", "four"),
                  ("b/proxy", "five")]  # fmt: skip
    assert told() == everything, "the last line of decode-0 has no end yet"
    assert told("decode-0") == told("b/decode-0") == [("decode-0", "two")]
    assert told("proxy") == [("a/proxy", "three"), ("b/proxy", "five")]
    assert told("--since", "2026-01-01T00:00:03.5") == everything[3:]
    assert "known: prefill-0, a/proxy, decode-0, b/proxy" in found.run("logs", "decode-7").error
    found.end("b")
    said = found.run("logs")
    assert "node b does not answer" in said.told
    assert "decode-0" not in said.out


def test_processes_of_other_nodes_are_restarted(found: Served) -> None:
    assert "decode-0 is ready again" in found.good("restart", "decode-0", "--drain")
    assert found.b.asked == ["restart decode-0, drained"]
    assert "decode-0 is stopped" in found.good("stop", "b/decode-0")
    assert "decode-0 is ready" in found.good("start", "decode-0")
    out = found.good("restart", "proxy")
    assert [line.split()[0] for line in out.splitlines()] == ["a/proxy", "b/proxy"], "one after the other"
    assert found.a.asked == ["restart proxy"]
    assert "b/proxy is stopped" in found.good("stop", "b/proxy")
    found.end("b")
    assert "no answer from b" in found.run("restart", "decode-0").error


def test_a_node_that_falls_silent_meanwhile_is_waited_for(found: Served) -> None:
    found.b.put("decode-0", state="draining")
    found.b.ask = lambda name, verb, drain: ""  # type: ignore[method-assign]
    said = found.run("drain", "decode-0", "--wait", "0.2")
    assert "decode-0 is still draining after 0.2 s" in said.error


def test_roles_of_engines_of_other_nodes(found: Served) -> None:
    found.b.put("decode-0", role="prefill")
    assert found.good("role", "decode-0", "prefill") == "decode-0 is prefill already\n"
    found.b.put("decode-0", role="decode")
    assert "stays what it is" in found.run("role", "decode-0", "hybrid").error
    assert "without a restart" in found.good("role", "decode-0", "prefill", "--dry-run")


def test_leases_of_all_nodes(found: Served) -> None:
    found.b.lease_ids = ["2.b"]
    assert "2.b" in found.good("kv")
    assert "is revoked" in found.run("kv", "--revoke", "2.b").told
    assert found.b.lease_ids == []
    found.end("b")
    assert "node b did not answer" in found.run("kv").told


def test_nobody_is_asked_without_a_proxy(found: Served) -> None:
    for part in (found.a, found.b):
        part.processes = tuple(one for one in part.processes if one.role != "proxy")
    assert "no node of the cluster runs a proxy" in found.run("ask", "hello").error
    found.a.processes = (msgspec.structs.replace(found.a.processes[0], name="proxy", role="proxy"),)
    assert "http://127.0.0.20:8000 was cut off" in found.run("ask", "hello").error


def test_followed_events_go_on_after_the_agent_was_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, monkeypatch) as found:
        argv = [sys.executable, "-m", "pdctl", "events", "-f", "-s", SERVICE]
        followed = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert followed.stdout is not None
        assert followed.stderr is not None
        for number in range(3):
            found.b.journal.say("decode-0", str(number))
            assert json.loads(followed.stdout.readline())["message"] == str(number)
    assert "waiting for it" in followed.stderr.readline()
    found.b.journal.say("decode-0", "3")
    with served(tmp_path, monkeypatch) as found:
        found.b.journal.say("decode-0", "4")
        assert [json.loads(followed.stdout.readline())["message"] for _ in range(2)] == ["3", "4"]
        followed.send_signal(signal.SIGINT)
        assert followed.communicate(timeout=60)[0] == "", "nothing twice"
    assert followed.returncode == 0
