"""Routing by the KV events of engines of other kinds: a mock of SGLang that keeps a cache and publishes it.

What another client has sent to an engine is found there; what was dropped, or died with its engine, is not believed.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import msgspec
import psutil
import pytest

from pdctl.proxy_wire import PoolReply
from tests.e2e.test_sglang import environment, mock
from tests.fakes.sglang.state import PAGE, answer_of
from tests.service import Service, pid_of, running, temporary_run, topology, wait_until

pytestmark = pytest.mark.e2e

ENGINES = ("prefill-0", "prefill-1")
LENGTH = 64 * PAGE
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with temporary_run() as run:
        extra = f'kind = "sglang"\ndevice = "cpu"\npython = "{environment(run.folder)}"\n'
        text = topology(prefills=2, engine_extra=extra, extra='routing = "prefix_aware"')
        with running(run, text) as found:
            yield found


@pytest.fixture(autouse=True)
def empty(service: Service) -> None:
    """No engine has anything, and the proxy knows it."""
    for name in ENGINES:
        flush(service, name)
        knows(service, name, 0)


def url(service: Service, name: str) -> str:
    return f"http://127.0.0.1:{service.process(name).ports['http']}"


def flush(service: Service, name: str) -> None:
    assert httpx.post(f"{url(service, name)}/flush_cache", trust_env=False, timeout=60).status_code == 200


def known_blocks(service: Service, name: str) -> int:
    """What the proxy knows of an engine."""
    answer = httpx.get(f"{service.url}/pdctl/v1/pool", headers=service.internal, trust_env=False, timeout=60)
    return msgspec.json.decode(answer.content, type=PoolReply).engines[name].blocks


def knows(service: Service, name: str, blocks: int) -> None:
    wait_until(lambda: known_blocks(service, name) == blocks, 60, f"{blocks} blocks known of {name}")


def direct(service: Service, name: str, prompt: str) -> None:
    """Another client's prompt, which this proxy does not see."""
    body = {"prompt": prompt, "max_tokens": 1, "bootstrap_host": "2.2.2.2", "bootstrap_room": 1}
    answer = httpx.post(f"{url(service, name)}/v1/completions", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text


def tokenized(service: Service) -> int:
    return int(sum(mock(service, name).told()["tokenized"] for name in ENGINES))


def learned(service: Service, path: str, **prompt: object) -> None:
    """The proxy has sent this prompt once, and asked for its tokens; nobody has its KV any more."""
    before = tokenized(service)
    answer = service.client.post(path, json={**prompt, "temperature": 0, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    wait_until(lambda: tokenized(service) > before, 60, "a tokenized prompt")
    for name in ENGINES:
        flush(service, name)
        knows(service, name, 0)


def asked(service: Service, begin: str, count: int = 6) -> dict[str, int]:
    """How many prompts with this beginning each engine has found all of it for."""
    before = {name: mock(service, name).told()["cached"] for name in ENGINES}
    for number in range(count):
        prompt = f"{begin}question {number}"
        assert service.complete(prompt, max_tokens=3)["text"] == answer_of(prompt, 3)
    return {name: (mock(service, name).told()["cached"] - before[name]) // LENGTH for name in ENGINES}


def text(first: str) -> str:
    return (first + " " + "the same words for all of them, " * 99)[:LENGTH]


@pytest.mark.parametrize(("there", "other"), [ENGINES, ENGINES[::-1]])
def test_prompts_go_where_another_client_has_sent_the_same_beginning(service: Service, there: str, other: str) -> None:
    begin = text(f"a{there}")
    learned(service, COMPLETION, prompt=begin + "first")
    direct(service, there, begin)
    knows(service, there, LENGTH // PAGE)
    assert asked(service, begin) == {there: 6, other: 0}


def test_what_an_engine_has_dropped_is_not_believed(service: Service) -> None:
    begin = text("b")
    learned(service, COMPLETION, prompt=begin + "first")
    direct(service, "prefill-0", begin)
    knows(service, "prefill-0", LENGTH // PAGE)
    assert asked(service, begin) == {"prefill-0": 6, "prefill-1": 0}
    flush(service, "prefill-0")
    knows(service, "prefill-0", 0)
    direct(service, "prefill-1", begin)
    knows(service, "prefill-1", LENGTH // PAGE)
    assert asked(service, begin) == {"prefill-0": 0, "prefill-1": 6}


def test_a_new_proxy_knows_what_engines_have(service: Service) -> None:
    begin = text("c")
    direct(service, "prefill-1", begin)
    knows(service, "prefill-1", LENGTH // PAGE)
    proxy = service.process("proxy")
    psutil.Process(pid_of(proxy)).kill()
    service.restarted(proxy)
    service.healthy()
    knows(service, "prefill-1", LENGTH // PAGE)


def test_what_an_engine_had_dies_with_it(service: Service) -> None:
    begin = text("d")
    learned(service, COMPLETION, prompt=begin + "first")
    direct(service, "prefill-0", begin)
    knows(service, "prefill-0", LENGTH // PAGE)
    victim = service.process("prefill-0")
    psutil.Process(pid_of(victim)).kill()
    service.restarted(victim)
    service.healthy()
    knows(service, "prefill-0", 0)
    direct(service, "prefill-1", begin)
    knows(service, "prefill-1", LENGTH // PAGE)
    assert asked(service, begin) == {"prefill-0": 0, "prefill-1": 6}
    direct(service, "prefill-0", text("e"))
    knows(service, "prefill-0", LENGTH // PAGE)


def test_chats_are_tokenized_too(service: Service) -> None:
    begin, after = text("f"), "the end " * 20
    learned(service, CHAT, messages=[{"role": "user", "content": begin + after}])
    direct(service, "prefill-1", f"user:{begin}{after};")
    knows(service, "prefill-1", len(f"user:{begin}{after};") // PAGE)
    before = mock(service, "prefill-1").told()["cached"]
    for number in range(6):
        body = {"messages": [{"role": "user", "content": f"{begin}{number}{after}"}], "max_tokens": 2}
        assert service.client.post(CHAT, json=body).status_code == 200
    assert mock(service, "prefill-1").told()["cached"] - before >= 6 * LENGTH


def test_nobody_is_asked_for_tokens_that_are_known(service: Service) -> None:
    begin = text("g")
    before = tokenized(service)
    service.stream(begin + "first", max_tokens=5)
    service.complete(list(text("h").encode()), max_tokens=5)
    for name in ENGINES:
        flush(service, name)
        knows(service, name, 0)
    direct(service, "prefill-1", begin)
    knows(service, "prefill-1", LENGTH // PAGE)
    assert asked(service, begin) == {"prefill-0": 0, "prefill-1": 6}
    assert tokenized(service) == before


def test_engines_are_followed_when_the_routing_changes_and_not_before(service: Service) -> None:
    path = service.run.folder / "pdctl.toml"
    before = path.read_text()
    path.write_text(before.replace('routing = "prefix_aware"', 'routing = "round_robin"'))
    service.run.cli("apply", check=True)
    direct(service, "prefill-0", text("i"))
    assert not any("kv-events" in word for name in ENGINES for word in psutil.Process(pid(service, name)).cmdline())
    assert known_blocks(service, "prefill-0") == 0
    path.write_text(before)
    service.run.cli("apply", check=True)
    direct(service, "prefill-0", text("i"))
    knows(service, "prefill-0", LENGTH // PAGE)


def pid(service: Service, name: str) -> int:
    return pid_of(service.process(name))
