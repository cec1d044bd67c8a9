"""API keys with real engines: shares, limits and classes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from pdctl.control_api import KeyStatus
from tests.service import Run, Service, pid_of, running, topology

pytestmark = pytest.mark.e2e

NAMES = ("flood", "single", "heavy", "limited")
SETTINGS = """
[[keys]]
name = "heavy"
weight = 3
[[keys]]
name = "limited"
requests_per_minute = 4
tokens_per_minute = 5000
streams = 2
"""
# Seats of the decode engine: a fraction of what waits.
SEATS = 4


@dataclass
class Clients:
    """Clients with a key each. `ended`: keys of answers in the order in which they were complete."""

    service: Service
    pool: ThreadPoolExecutor
    ended: list[str] = field(default_factory=list)
    sent: int = 0

    def post(self, key: str, prompt: str = "a b c", **options: object) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, **options}
        headers = {"authorization": f"Bearer {secret(key)}"}
        answer = self.service.client.post("/v1/completions", json=body, headers=headers)
        self.ended.append(key)
        return answer

    def send(self, key: str, count: int, **options: object) -> list[Future[httpx.Response]]:
        """Send requests at once, each with a prompt that no engine has in its cache."""
        self.sent += count
        numbers = range(self.sent - count, self.sent)
        return [self.pool.submit(self.post, key, f"{number:3} {key} " * 20, **options) for number in numbers]

    def key(self, name: str) -> KeyStatus:
        return next(key for key in self.service.control.keys().keys if key.name == name)

    def waiting(self, **counts: int) -> None:
        """Wait until so many answers of each key wait at the proxy."""

        def is_so() -> bool:
            return all(self.key(name).waiting >= count for name, count in counts.items())

        self.service.wait(is_so, what="waiters")


def secret(key: str) -> str:
    return f"pdctl-{key}"


@contextmanager
def clients(run: Run, proxy: str = "") -> Iterator[Clients]:
    lines = [f"{name} sha256:{hashlib.sha256(secret(name).encode()).hexdigest()}\n" for name in NAMES]
    run.write("".join(lines), "keys.txt")
    text = topology(extra=f'api_keys = "keys.txt"\n{proxy}') + SETTINGS
    text = text.replace("max_num_seqs = 32", f"max_num_seqs = {SEATS}")
    with running(run, text) as service, ThreadPoolExecutor(160) as pool:
        service.client = httpx.Client(
            base_url=service.url, timeout=300, trust_env=False, limits=httpx.Limits(max_connections=None)
        )
        yield Clients(service, pool)
        service.idle()


def answered(futures: Sequence[Future[httpx.Response]]) -> None:
    for future in futures:
        assert future.result().status_code == 200, future.result().text


def test_shares_of_keys(run: Run) -> None:
    with clients(run) as found:
        # One key sends 50 times what the other does.
        flood = found.send("flood", 50, max_tokens=24)
        found.waiting(flood=35)
        before = len(found.ended)
        answered(found.send("single", 1, max_tokens=24))
        passed = len(found.ended) - before
        assert passed <= 3 * SEATS, f"{passed} answers of the flood came before the other key's only one"
        answered(flood)

        # Two keys that always want more, one with three times the weight of the other.
        found.ended.clear()
        sent = [*found.send("flood", 40, max_tokens=16), *found.send("heavy", 40, max_tokens=16)]
        found.waiting(flood=25, heavy=25)
        start = len(found.ended)
        answered(sent)
        shares = Counter(found.ended[start : start + 32])
        assert 19 <= shares["heavy"] <= 29, f"{shares}: it has three quarters of the work"

        # A request's own priority does not help it against other keys.
        flood = found.send("flood", 40, max_tokens=24, priority=-1000)
        found.waiting(flood=25)
        before = len(found.ended)
        answered(found.send("single", 1, max_tokens=24, priority=1000))
        assert len(found.ended) - before <= 3 * SEATS
        answered(flood)

        # Nothing of an answer is lost in the books.
        assert (found.key("flood").running, found.key("flood").waiting) == (0, 0)
        assert found.key("single").output_tokens == 48
        page = found.service.client.get("/metrics").text
        assert 'pdctl_proxy_key_requests_total{key="flood",status="200"} 130.0' in page
        assert 'pdctl_proxy_key_tokens_total{key="single"} 48.0' in page
        for text in (page, run.cli("status", "--keys", check=True).stdout):
            assert "pdctl-flood" not in text, "a key is only known by its name"


def test_a_full_queue_has_room_for_a_key_with_less(run: Run) -> None:
    with clients(run, "max_queue = 16") as found:
        flood = found.send("flood", 60, max_tokens=48)
        found.waiting(flood=16)
        single = found.send("single", 1)
        assert single[0].result().status_code == 200
        statuses = Counter(future.result().status_code for future in flood)
        assert set(statuses) == {200, 429}
        assert found.key("flood").refused == statuses[429]
        assert found.key("single").refused == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_limits_of_keys(run: Run, workers: int) -> None:
    with clients(run, f"workers = {workers}") as found:
        answers = [future.result() for future in found.send("limited", 1, max_tokens=8)]
        assert answers[0].status_code == 200, answers[0].text
        told = {name: value for name, value in answers[0].headers.items() if name.startswith("x-ratelimit")}
        assert told["x-ratelimit-limit-requests"] == "4"
        assert told["x-ratelimit-remaining-requests"] == "3"
        assert told["x-ratelimit-limit-tokens"] == "5000"
        assert told["x-ratelimit-reset-requests"] == "15s"

        # Three answers at once are one too many, in one request and in several.
        assert found.post("limited", n=3).status_code == 400
        statuses = [future.result().status_code for future in found.send("limited", 3, max_tokens=64, stream=True)]
        if workers == 1:
            assert sorted(statuses) == [200, 200, 429]

        # What a burst has left is refused until the bucket is refilled.
        refused = [answer for _ in range(6) if (answer := found.post("limited", max_tokens=1)).status_code == 429]
        assert len(refused) >= 4
        last = refused[-1]
        assert last.json()["error"]["message"].startswith("the API key 'limited' has sent its 4 requests per minute")
        assert 1 <= int(last.headers["retry-after"]) <= 15
        assert last.headers["x-ratelimit-remaining-requests"] == "0"
        assert found.key("limited").requests_left == 0
        chat = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
        answer = found.service.client.post("/v1/messages", json=chat, headers={"x-api-key": secret("limited")})
        assert (answer.status_code, answer.json()["type"]) == (429, "error")
        assert "retry-after" in answer.headers

        # Other keys have no limits, and strangers leave no trace.
        assert "x-ratelimit-limit-requests" not in found.post("single").headers
        assert found.post("nobody").status_code == 401
        assert {key.name for key in found.service.control.keys().keys} == set(NAMES)

        # Other limits apply without a restart.
        proxies = [pid_of(process) for process in found.service.status().processes if process.kind == "proxy"]
        path = run.folder / "pdctl.toml"
        path.write_text(path.read_text().replace("requests_per_minute = 4", "requests_per_minute = 4000"))
        run.cli("apply", "-f", str(path), check=True)
        assert found.post("limited", max_tokens=1).status_code == 200
        assert [pid_of(process) for process in found.service.status().processes if process.kind == "proxy"] == proxies
        shown = json.loads(run.cli("status", "--keys", "--json", check=True).stdout)
        limited = next(key for key in shown["keys"] if key["name"] == "limited")
        assert (limited["requests_per_minute"], limited["streams"]) == (4000, 2)
        table = run.cli("status", "--keys", check=True).stdout
        assert "of 4000" in table
