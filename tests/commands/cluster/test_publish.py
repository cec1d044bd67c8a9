"""`pdctl up`, `apply`, `scale` and `down` on one node of a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.commands.cluster.scale import with_replicas
from pdctl.errors import AlreadyRunning, ConfigError, PdctlError, ServiceFailed
from tests.commands.cluster.served import TEXT, Served, served


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "pdctl.toml").write_text(TEXT)
    with served(tmp_path, monkeypatch) as found:
        found.a.processes = found.b.processes = ()
        yield found


def names(found: Served) -> list[str]:
    return [f"{part.node}/{one.name}" for part in (found.a, found.b) for one in part.processes]


def test_up_publishes_and_waits(found: Served) -> None:
    said = found.run("up")
    assert said.failure is None
    assert said.out.splitlines() == [
        "+ a/decode-0: added", "+ a/prefill-0: added", "+ a/proxy: added", "+ b/prefill-1: added", "+ b/proxy: added",
        "fleet is ready at http://127.0.0.20:8000, http://127.0.0.21:8000",
    ]  # fmt: skip
    assert "starting" in said.told
    assert found.places.now.text == TEXT
    assert found.places.now.source == str(found.folder / "pdctl.toml")
    assert found.good("up").startswith("fleet is ready"), "it is up already"
    (found.folder / "pdctl.toml").write_text(TEXT + "replicas = 2\n")
    said = found.run("up")
    assert isinstance(said.failure, AlreadyRunning)
    assert "pdctl apply" in said.error


def test_etcd_may_be_away_while_a_command_waits(found: Served) -> None:
    found.places.silent = 2
    said = found.run("up")
    assert said.failure is None
    assert said.told.count("waiting: etcd does not answer: 10.0.0.1:2379") == 1
    assert found.places.silent == 0


def test_up_without_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCTL_RUN", str(tmp_path / "run"))
    (tmp_path / "pdctl.toml").write_text(TEXT)
    failure = CliRunner().invoke(app, ["up", "-f", str(tmp_path / "pdctl.toml")]).exception
    assert isinstance(failure, PdctlError)
    assert failure.message == "no agent of service 'fleet' runs on this machine"
    assert failure.hint == f"start one with: pdctl agent -f {tmp_path / 'pdctl.toml'}"


def test_a_file_that_is_wrong_is_not_published(found: Served) -> None:
    (found.folder / "pdctl.toml").write_text(TEXT.replace('role = "decode"', 'role = "both"'))
    failure = found.run("up").failure
    assert isinstance(failure, ConfigError)
    assert failure.problems[0].line == 17
    assert found.places.now.revision == 0


def test_what_has_no_room_is_not_published(found: Served) -> None:
    (found.folder / "pdctl.toml").write_text(TEXT + "replicas = 5\n")
    assert found.run("up").error == "no node has room for decode-4 | add a node"
    assert found.places.now.revision == 0


def test_what_a_node_refuses_is_not_published(found: Served) -> None:
    found.places.refusing = {"b": "the topology sets python"}
    assert found.run("up").error == "node b: the topology sets python | nothing was published"
    assert found.places.now.revision == 0


def test_apply_shows_and_makes_the_changes(found: Served) -> None:
    found.good("up")
    before = found.places.now.revision
    (found.folder / "pdctl.toml").write_text(TEXT + "replicas = 2\n")
    out = found.good("apply", "--dry-run")
    assert "+ b/decode-1: added" in out.splitlines()
    told = json.loads(found.good("apply", "--dry-run", "--json"))
    assert told["nodes"][1]["added"] == ["decode-1"]
    assert found.places.now.revision == before
    said = found.run("apply")
    assert said.failure is None
    assert said.told.splitlines()[-1] == "applied"
    assert "b/decode-1" in names(found)
    assert found.places.now.revision == before + 1
    found.good("apply")
    assert found.places.now.revision == before + 1, "nothing changes"
    (found.folder / "pdctl.toml").write_text(TEXT + "replicas = 2  # a remark\n")
    found.good("apply")
    assert found.places.now.revision == before + 2, "the text is kept as it is written"


def test_apply_takes_the_published_file(found: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found.good("up")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (found.folder / "pdctl.toml").write_text(TEXT + "replicas = 2\n")
    assert "+ b/decode-1: added" in found.good("apply", "--dry-run")
    (found.folder / "pdctl.toml").unlink()
    assert "name it with -f" in found.run("apply").error


def test_a_failure_that_nobody_mends_ends_the_wait(found: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    found.good("up")
    (found.folder / "pdctl.toml").write_text(TEXT + "replicas = 2\n")
    publish = found.places.publish

    async def failing(text: str, source: str, revision: int | None) -> int:
        number = await publish(text, source, revision)
        found.b.put("decode-1", state="failed", reason="exited 5 times")
        return number

    monkeypatch.setattr(found.places, "publish", failing)
    said = found.run("apply")
    assert isinstance(said.failure, ServiceFailed)
    assert said.error == "decode-1 failed | see the cause with: pdctl why decode-1"


def test_scale_changes_the_published_text(found: Served) -> None:
    found.good("up")
    found.good("scale", "prefill=3", "decode=2")
    assert found.places.now.text == TEXT.replace("replicas = 2   # both", "replicas = 3   # both").replace(
        'name = "decode"\n', 'replicas = 2\nname = "decode"\n'
    )
    assert "prefill-2" in " ".join(names(found))
    assert "known: prefill, decode" in found.run("scale", "store=2").error
    found.good("down")
    assert "pdctl up -f FILE" in found.run("scale", "decode=2").error


@pytest.mark.parametrize(
    ("text", "group", "count"),
    [
        (TEXT, "decode", 7),
        (TEXT, "prefill", 1),
        (TEXT.replace("[[engines]]", "[[ engines ]]   # one"), "decode", 2),
        (TEXT.replace("\n", "\r\n"), "decode", 2),
        (TEXT.replace("replicas = 2   # both", "replicas=1_0"), "prefill", 3),
    ],
)
def test_only_the_number_changes(text: str, group: str, count: int) -> None:
    changed = with_replicas(text, "pdctl.toml", {group: count})
    before, after = text.splitlines(), changed.splitlines()
    assert len([line for line in after if line not in before]) <= 1
    assert [line for line in before if line not in after and "replicas" not in line] == []


def test_engines_are_counted_whatever_a_replica_is() -> None:
    text = TEXT.replace("replicas = 2   # both", "data_parallel = 2\nreplicas = 2   # both")
    assert with_replicas(text, "f", {"prefill": 6}) == text.replace("replicas = 2   # both", "replicas = 3   # both")
    with pytest.raises(PdctlError, match="each replica of prefill is 2 engines"):
        with_replicas(text, "f", {"prefill": 3})


def test_a_text_that_cannot_be_edited_is_left(found: Served) -> None:
    inline = TEXT.partition("[[engines]]")[0]
    inline = 'engines = [{name = "prefill", role = "prefill"}, {name = "decode", role = "decode"}]\n' + inline
    with pytest.raises(PdctlError, match="cannot be changed in the text of f"):
        with_replicas(inline, "f", {"decode": 2})


def test_down_stops_everything_and_leaves_the_agents(found: Served) -> None:
    found.good("up")
    assert "--now is for a service on one machine" in found.run("down", "--now").error
    assert found.good("down") == "fleet is down; its agents run on\n"
    assert names(found) == []
    assert found.places.now.text == ""
    assert "stop" not in found.a.asked
    found.end("b")
    assert "node b does not answer: it stops what it runs when it hears etcd again" in found.run("down").told
