"""The page's server over HTTP: what it answers, to whom, and what it streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.supervisor.dashboard.served import Served, served


@pytest.fixture(scope="module")
def ours() -> Iterator[Served]:
    with served() as found:
        yield found


READ = (("GET", "/api/live"), ("GET", "/api/history"), ("GET", "/api/requests"), ("GET", "/api/exits"),
        ("GET", "/api/measured"), ("GET", "/api/doctor"))  # fmt: skip
OTHERS = ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"host": "evil.example"})
CHANGE = "/api/processes/decode-0/restart"


def frames(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, answer.iter_lines())


@pytest.mark.parametrize(("method", "path"), [*READ, ("POST", "/api/doctor"), ("POST", CHANGE)])
def test_nothing_without_the_token(ours: Served, method: str, path: str) -> None:
    with ours.client("") as client:
        answer = client.request(method, path)
    assert answer.status_code == 401
    assert "pdctl dash" in answer.json()["reason"]


@pytest.mark.parametrize("headers", OTHERS)
@pytest.mark.parametrize(("method", "path"), [*READ, ("POST", CHANGE)])
def test_nothing_for_another_origin(ours: Served, method: str, path: str, headers: dict[str, str]) -> None:
    with ours.client(ours.write, **headers) as client:
        assert client.request(method, path).status_code == 403
    assert ours.stage.asked == []


def test_no_change_with_a_link_that_only_shows(ours: Served) -> None:
    with ours.client(ours.read) as client:
        answer = client.post(CHANGE)
        assert client.get("/api/exits").status_code == 200
    assert answer.status_code == 403
    assert "pdctl dash --write" in answer.json()["reason"]
    assert ours.stage.asked == []


def test_changes(ours: Served) -> None:
    with ours.client(ours.write) as client:
        for path in (CHANGE, "/api/processes/decode-0/stop?drain=1", "/api/processes/prefill-1/role?to=decode"):
            assert client.post(path).json() == {"ok": True, "reason": ""}
        asked, ours.stage.asked[:] = list(ours.stage.asked), []
        assert asked == [("decode-0", "restart", ""), ("decode-0", "stop", "drain"), ("prefill-1", "role", "decode")]
        refused = client.post("/api/processes/nobody/restart")
        assert (refused.status_code, refused.json()["reason"]) == (409, "No process of that name.")
        ours.stage.asked.clear()
        assert client.get(CHANGE).status_code == 405
        assert client.post("/api/processes/decode-0/explode").status_code == 404
        assert client.post("/api/processes/decode-0/role?to=king").status_code == 400
        assert client.post("/api/exits").status_code == 404
    assert ours.stage.asked == []


def test_updates(ours: Served) -> None:
    with ours.client(ours.read) as client, client.stream("GET", "/api/live") as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        found = frames(answer)
        first = next(found)
        assert first["about"]["write"] is False
        assert [gpu["index"] for gpu in first["about"]["gpus"]] == [0, 1, 2, 3]
        # A sample a second, if the machine has the time.
        assert len(first["samples"]["at"]) in range(300, 902)
        assert first["service"]["links"][4]["fallback"] == "mlx5_0 port 1 is down"
        assert first["leases_total"] == 2
        assert first["leases"][0]["leak"]
        second = next(found)
        # An update has only what is new.
        assert "about" not in second
        assert len(second["samples"]["at"]) < 50
        assert second["events"] == []
        ours.stage.journal.say("decode-0", "a word", "note")
        told = next(frame for frame in found if frame["events"])
        assert [event["message"] for event in told["events"]] == ["a word"]


def test_each_sample_comes_once(ours: Served) -> None:
    with ours.client(ours.read) as client, client.stream("GET", "/api/live") as answer:
        found = frames(answer)
        times = [at for _ in range(4) for at in next(found)["samples"]["at"]]
    assert times == sorted(set(times))


def test_the_number_of_viewers_is_bounded(ours: Served) -> None:
    with ours.client(ours.read) as client, ExitStack() as stack:
        # A generator that nobody keeps would close its connection.
        kept = [frames(stack.enter_context(client.stream("GET", "/api/live"))) for _ in range(16)]
        assert all(next(one) for one in kept)
        assert client.get("/api/live").status_code == 503


def test_questions(ours: Served) -> None:
    with ours.client(ours.read) as client:
        minutes = client.get("/api/history?span_s=120").json()["samples"]["at"]
        quarter = client.get("/api/history?span_s=nonsense").json()["samples"]["at"]
        assert minutes[-1] - minutes[0] <= 120
        assert 120 < quarter[-1] - quarter[0] <= 900
        requests = client.get("/api/requests").json()["requests"]
        assert [one["status"] for one in requests] == [200] * 60
        assert [one["failed"][0]["reason"] for one in requests if one["failed"]] == ["connection lost"]
        assert client.get("/api/exits").json()["exits"][0]["reason"] == "killed by SIGKILL"
        assert client.get("/api/measured").json()["processes"][0]["running"] == 9


def test_updates_end_with_the_service() -> None:
    """An open page neither keeps the supervisor from ending, nor waits for ever."""
    with served() as ours:
        client = ours.client(ours.read)
        answer = client.send(client.build_request("GET", "/api/live"), stream=True)
        found = frames(answer)
        next(found)
    list(found)
    answer.close()
    client.close()
