"""A service over fake LMDeploy engines (tests/fakes/lmdeploy_engine.py): every way an answer's id can look, and every
fault that LMDeploy's own proxy answers wrongly, leaks at or hangs on. The answer shows which KV decode has read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.service import Run, Service, events, free_port, running, wait_until

pytestmark = pytest.mark.e2e

ENGINE = Path(__file__).parents[1] / "fakes" / "lmdeploy_engine.py"
EOS = "\x03"
PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}


class Fake:
    """One fake engine in its own process."""

    def __init__(self, role: str, number: int = 0, *options: str, key: str = "") -> None:
        self.role, self.name, self.port, self.key = role, f"{role}{number}", free_port(), key
        self.options = [*options, *(["--api-key", key] if key else [])]
        self.secret_file: Path | None = None
        self.start()

    def start(self) -> None:
        argv = [sys.executable, str(ENGINE), "--role", self.role.capitalize(), "--port", str(self.port), *self.options]
        self.process = subprocess.Popen(argv)
        wait_until(lambda: self.answers() or self.process.poll() is not None, what=f"{self.name} to answer")
        assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}"

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code in (200, 503)
        except httpx.TransportError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stats(self) -> dict[str, Any]:
        found = httpx.get(f"{self.url}/_stats", trust_env=False).json()
        return {name: found.get(name, 0) for name in (*found, *_COUNTS)}

    def fail(self, *faults: str) -> None:
        httpx.post(f"{self.url}/_fault", json={"fail": faults}, trust_env=False)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def toml(self) -> str:
        secret = f'secret_file = "{self.secret_file}"' if self.secret_file else ""
        return f"""
[[engines]]
name = "{self.name}"
role = "{self.role}"
kind = "lmdeploy"
url = "{self.url}"
{secret}
"""


_COUNTS = (
    "initialized", "connected", "dropped", "leaked_links", "migrations", "stuck_migrations", "requests", "evicted",
    "closed_prefills", "unknown_frees", "freed_by_call", "freed_by_decode", "named_sessions", "hung", "left",
)  # fmt: skip


def text(fakes: Sequence[Fake], port: int, proxy: str = "") -> str:
    head = f'[service]\nname = "t"\nmodel = "m"\n[proxy]\nport = {port}\n{proxy}\n'
    return head + "".join(fake.toml() for fake in fakes)


@contextmanager
def over(run: Run, *fakes: Fake, proxy: str = "", linked: bool = True) -> Iterator[Service]:
    """A service over these engines, which are stopped afterwards."""
    with ExitStack() as stack:
        for fake in fakes:
            stack.callback(fake.stop)
        service = stack.enter_context(running(run, text(fakes, free_port(), proxy)))
        service.healthy()
        if linked:
            all_linked(service, fakes)
        yield service


def all_linked(service: Service, fakes: Sequence[Fake]) -> None:
    pairs = {(d.name, p.name) for d in fakes for p in fakes if (d.role, p.role) == ("decode", "prefill")}

    def done() -> bool:
        return {(link.reader, link.peer) for link in service.status().links if not link.error} == pairs

    service.wait(done, what="all pairs to be linked")
    # The sweep of what an unknown earlier proxy may have left keeps requests away for a moment.
    service.wait(lambda: all(room(service, fake) for fake in fakes if fake.role == "prefill"), what="room")


def room(service: Service, fake: Fake) -> bool:
    """Whether the proxy may use a prefill engine."""
    found = httpx.get(f"{service.url}/pdctl/v1/pool", headers=service.internal, trust_env=False).json()["engines"]
    return bool(found[fake.name]["usable"]) and not found[fake.name]["left"]


def body(prompt: str, chat: bool, stream: bool, **more: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    return {**asked, "max_tokens": 12, "stream": stream, **more}


def ask(service: Service, prompt: str, chat: bool = False, stream: bool = False, **more: Any) -> str:
    """The text of an answer, whole or gathered from a stream."""
    wanted = body(prompt, chat, stream, **more)
    if not stream:
        answer = service.client.post(PATHS[chat], json=wanted)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return str(choice["message"]["content"] if chat else choice["text"])
    shown = ""
    with service.client.stream("POST", PATHS[chat], json=wanted) as answer:
        assert answer.status_code == 200, answer.read()
        for event in events(answer):
            if event is None:
                return shown
            assert "error" not in event, event
            for choice in event["choices"]:
                shown += (choice["delta"].get("content") or "") if chat else choice["text"]
                assert "finish_reason" in choice
    raise AssertionError("no [DONE]")


def expected(prompt: str, count: int = 12) -> str:
    return "".join(prompt[at % len(prompt)] for at in range(count))


def by_a_pair(service: Service, decode: Fake, prompt: str) -> None:
    """The pair is used from the moment when the proxy knows of the link, which is after the status shows it."""
    before = decode.stats()["migrations"]

    def used() -> bool:
        assert ask(service, prompt) == expected(prompt)
        return bool(decode.stats()["migrations"] > before)

    service.wait(used, what="a request that moves KV")


def nothing_left(service: Service, *fakes: Fake) -> None:
    """No KV is held, no request runs, and no prefill was broken."""

    def clean() -> bool:
        found = [fake.stats() for fake in fakes]
        return not any(stats["held"] or stats["running"] for stats in found)

    service.wait(clean, what=f"no KV held: {[fake.stats() for fake in fakes]}")
    found = httpx.get(f"{service.url}/pdctl/v1/pool", headers=service.internal, trust_env=False).json()["engines"]
    assert all(load["calls"] == 0 for load in found.values()), found
    assert not any(fake.stats()["broken"] for fake in fakes)


# -- a good service, in every style of ids -----------------------------------------------------------------


@pytest.mark.parametrize("style", ["int", "neg1", "uuid", "real", "real --cache-session-id --needs-header"])
def test_answers_are_right_and_nothing_is_left_in_every_style_of_ids(run: Run, style: str) -> None:
    options = ("--id-style", *style.split())
    prefill, decode = Fake("prefill", 0, *options), Fake("decode", 0, *options)
    with over(run, prefill, decode) as service:
        for chat in (False, True):
            for stream in (False, True):
                prompt = f"a prompt {chat} {stream} of two blocks"
                assert ask(service, prompt, chat, stream) == expected(prompt)
                assert ask(service, prompt, chat, stream, max_tokens=200) == expected(prompt, 200)
        assert decode.stats()["migrations"] == 8
        nothing_left(service, prefill, decode)
        stats = prefill.stats()
        assert (stats["initialized"], stats["named_sessions"], stats["closed_prefills"]) == (1, 0, 0)


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[tuple[Service, Fake, Fake]]:
    prefill, decode = Fake("prefill"), Fake("decode", 0, "--token-s", "0.01")
    with over(module_run, prefill, decode) as found:
        yield found, prefill, decode


Quiet = tuple[Service, Fake, Fake]


def test_counts_are_lmdeploys(service: Quiet) -> None:
    served, prefill, decode = service
    for stream in (False, True):
        wanted = body("twelve bytes", False, stream, max_tokens=150, return_token_ids=True)
        if stream:
            wanted["stream_options"] = {"include_usage": True}
            with served.client.stream("POST", PATHS[False], json=wanted) as answer:
                found = [event for event in events(answer) if event]
            usage = found[-1]["usage"]
            assert not any(choice["token_ids"] for event in found for choice in event["choices"]), "it tells none"
        else:
            usage = served.client.post(PATHS[False], json=wanted).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (12, 150)
    chat = served.client.post(PATHS[True], json=body("abc", True, False, return_token_ids=True, max_tokens=4)).json()
    assert chat["choices"][0]["token_ids"] == [97, 98, 99, 97]
    nothing_left(served, prefill, decode)


def test_a_first_token_that_ends_the_answer_is_an_empty_answer(service: Quiet) -> None:
    served, prefill, decode = service
    for stream in (False, True):
        assert ask(served, EOS + "x", stream=stream) == ""
        assert ask(served, EOS + "x", chat=True, stream=stream) == ""
    nothing_left(served, prefill, decode)


def test_one_token_needs_no_hand_over(service: Quiet) -> None:
    served, prefill, decode = service
    before = decode.stats()["requests"]
    for stream in (False, True):
        assert ask(served, "hello", stream=stream, max_tokens=1) == "h"
    assert decode.stats()["requests"] == before
    nothing_left(served, prefill, decode)


def test_several_answers_and_prompts_are_legs(service: Quiet) -> None:
    served, prefill, decode = service
    answer = served.client.post(PATHS[False], json={"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 4}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["abca", "abca", "xyzx", "xyzx"]
    nothing_left(served, prefill, decode)


@pytest.mark.parametrize("field", ["migration_request", "with_cache", "preserve_cache", "kv_transfer_params"])
def test_clients_cannot_hand_over(service: Quiet, field: str) -> None:
    served, prefill, decode = service
    before = prefill.stats()["requests"], decode.stats()["requests"]
    answer = served.client.post(PATHS[False], json=body("x", False, False, **{field: {"remote_session_id": 1}}))
    assert answer.status_code == 400
    assert field in answer.text
    assert (prefill.stats()["requests"], decode.stats()["requests"]) == before


def test_a_session_that_a_client_names_does_not_reach_the_engines(service: Quiet) -> None:
    served, prefill, decode = service
    answer = served.client.post(PATHS[False], json=body("x", False, False, session_id=3, suffix="y"))
    assert answer.headers["x-pdctl-ignored-fields"] == "session_id, suffix"
    assert prefill.stats()["named_sessions"] == decode.stats()["named_sessions"] == 0


def test_an_engines_refusal_reaches_the_client_as_it_is(service: Quiet) -> None:
    served, prefill, decode = service
    for chat in (False, True):
        answer = served.client.post(PATHS[chat], json=body("too long", chat, False))
        assert answer.status_code == 400
        assert "context length" in answer.json()["error"]["message"]
    nothing_left(served, prefill, decode)


# -- LMDeploy's own faults (table 1.7 of its reference): a to m --------------------------------------------


@pytest.mark.parametrize("fault", ["p2p_initialize", "p2p_connect", "p2p_status"])
def test_b_a_pair_that_cannot_be_linked_is_not_used_until_it_can(run: Run, fault: str) -> None:
    prefill, decode = Fake("prefill"), Fake("decode")
    prefill.fail(fault)
    with over(run, prefill, decode, linked=False) as service:
        assert ask(service, "no pair") == expected("no pair"), "decode computes it alone"
        assert decode.stats()["migrations"] == prefill.stats()["held"] == 0
        assert any(link.error for link in service.status().links)
        assert prefill.stats()["initialized"] < 8
        prefill.fail()
        all_linked(service, (prefill, decode))
        by_a_pair(service, decode, "a pair")
        assert decode.stats()["leaked_links"] == prefill.stats()["leaked_links"] == 0
        nothing_left(service, prefill, decode)


def test_c_a_prefill_that_answers_500_does_not_fail_requests(run: Run) -> None:
    prefill, decode = Fake("prefill"), Fake("decode")
    with over(run, prefill, decode) as service:
        prefill.fail("prefill500")
        for stream in (False, True):
            assert ask(service, "broken", stream=stream) == expected("broken")
        prefill.fail()
        nothing_left(service, prefill, decode)


def test_d_a_dead_prefill_does_not_fail_requests(run: Run) -> None:
    prefill, decode = Fake("prefill"), Fake("decode")
    with over(run, prefill, decode) as service:
        prefill.stop()
        for chat in (False, True):
            assert ask(service, "gone", chat=chat) == expected("gone")
        nothing_left(service, decode)


def test_e_a_decode_engine_that_dies_before_its_first_token_leaves_no_kv(run: Run) -> None:
    prefill, *decodes = fakes = Fake("prefill"), Fake("decode"), Fake("decode", 1)
    with over(run, *fakes) as service, ThreadPoolExecutor(8) as pool:
        decodes[0].fail("no_migration")
        asked = [pool.submit(ask, service, f"prompt {n}", stream=n % 2 == 0) for n in range(8)]
        service.wait(lambda: decodes[0].stats()["stuck_migrations"], what="a request that waits for KV")
        decodes[0].stop()
        assert [one.result() for one in asked] == [expected(f"prompt {n}") for n in range(8)]
        nothing_left(service, prefill, decodes[1])


@pytest.mark.parametrize("fault", ["die_mid_stream", "abort_mid_stream", "error_mid_stream"])
def test_f_a_stream_that_cannot_continue_ends_with_an_error(run: Run, fault: str) -> None:
    prefill, *decodes = fakes = Fake("prefill"), Fake("decode"), Fake("decode", 1)
    with over(run, *fakes) as service:
        for decode in decodes:
            decode.fail(fault)
        with service.client.stream("POST", PATHS[False], json=body("abcdef", False, True)) as answer:
            assert answer.status_code == 200
            *parts, last = [event for event in events(answer) if event is not None]
        assert "".join(choice["text"] for part in parts for choice in part["choices"]).startswith("abcd")
        assert "error" in last
        nothing_left(service, prefill, *(decode for decode in decodes if decode.answers()))


def test_f_an_answer_of_which_the_client_has_nothing_starts_over(run: Run) -> None:
    prefill, *decodes = fakes = Fake("prefill"), Fake("decode"), Fake("decode", 1)
    with over(run, *fakes) as service:
        decodes[0].fail("die_mid_stream")
        found = [ask(service, "abcdef", max_tokens=200) for _ in range(4)]
        assert found == [expected("abcdef", 200)] * 4
        assert not decodes[0].answers()
        nothing_left(service, prefill, decodes[1])


@pytest.mark.parametrize("stream", [False, True])
def test_g_a_client_that_leaves_ends_decode_but_never_a_running_prefill(run: Run, stream: bool) -> None:
    prefill, decode = Fake("prefill"), Fake("decode", 0, "--token-s", "0.05")
    with over(run, prefill, decode) as service:
        for fake, faults, seen in ((prefill, ("slow_prefill",), "running"), (decode, (), "running")):
            fake.fail(*faults)
            with httpx.Client(base_url=service.url, trust_env=False, timeout=60) as leaving:
                asked = threading.Thread(
                    target=_left, args=(leaving, body("a client leaves", False, stream, max_tokens=500))
                )
                asked.start()
                service.wait(lambda fake=fake, seen=seen: fake.stats()[seen], what=f"a request at {fake.name}")
                # Closing the client closes its connection under the request.
                for connection in leaving._transport._pool.connections:  # type: ignore[attr-defined]
                    connection._connection._network_stream.get_extra_info("socket").shutdown(2)
                asked.join()
            if faults:
                service.wait(lambda: _left_behind(service), what="the proxy to notice")
                assert prefill.stats()["running"] == 1, "it goes on"
            fake.fail()
            nothing_left(service, prefill, decode)
        assert prefill.stats()["closed_prefills"] == 0


def _left(client: httpx.Client, wanted: dict[str, Any]) -> None:
    with pytest.raises(httpx.TransportError), client.stream("POST", PATHS[False], json=wanted) as answer:
        answer.read()


def _left_behind(service: Service) -> bool:
    return "pdctl_proxy_clients_left_total 1" in service.client.get("/metrics").text.replace(".0", "")


def test_h_a_prefill_that_was_restarted_on_its_address_is_linked_again(run: Run) -> None:
    prefill, decode = Fake("prefill"), Fake("decode")
    with over(run, prefill, decode) as service:
        assert ask(service, "before") == expected("before")
        prefill.stop()
        prefill.start()
        all_linked_again(service, prefill, decode)
        by_a_pair(service, decode, "after it")
        assert decode.stats()["leaked_links"] == 0
        nothing_left(service, prefill, decode)


def all_linked_again(service: Service, prefill: Fake, decode: Fake) -> None:
    service.wait(lambda: prefill.stats()["links"] == 1, what="a new link")
    all_linked(service, (prefill, decode))
    service.healthy()


def test_h_a_request_that_waits_for_kv_of_a_dead_prefill_does_not_hang(run: Run) -> None:
    prefill, decode = Fake("prefill"), Fake("decode")
    with over(run, prefill, decode) as service, ThreadPoolExecutor(1) as pool:
        decode.fail("no_migration")
        asked = pool.submit(ask, service, "who has it")
        service.wait(lambda: decode.stats()["stuck_migrations"], what="a request that waits for KV")
        decode.fail()
        decode.fail("no_migration")
        prefill.stop()
        assert asked.result(60) == expected("who has it")


def test_i_engines_with_their_own_keys(run: Run) -> None:
    prefill, decode = Fake("prefill", key="one"), Fake("decode", key="one")
    for fake in (prefill, decode):
        fake.secret_file = run.folder / f"{fake.name}.key"
        fake.secret_file.write_text("one\n")
    with over(run, prefill, decode) as service:
        assert ask(service, "keys") == expected("keys")
        assert decode.stats()["migrations"] == 1
        nothing_left(service, prefill, decode)


def test_i_a_wrong_key_is_an_error_that_says_so(run: Run) -> None:
    hybrid = Fake("hybrid", key="one")
    hybrid.secret_file = run.folder / "key"
    hybrid.secret_file.write_text("another")
    with over(run, hybrid) as service:
        answer = service.client.post(PATHS[False], json=body("x", False, False))
        assert answer.status_code == 502
        assert "key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("fault", ["error200", "busy"])
def test_an_error_is_an_error_whatever_its_status_was(run: Run, fault: str) -> None:
    hybrid = Fake("hybrid")
    with over(run, hybrid) as service:
        hybrid.fail(fault)
        for stream in (False, True):
            answer = service.client.post(PATHS[False], json=body("x", False, stream))
            assert answer.status_code in (502, 503)
        hybrid.fail()
        service.healthy()


def test_l_an_engine_that_is_removed_is_unlinked(run: Run) -> None:
    fakes = prefill, decode, other = Fake("prefill"), Fake("decode"), Fake("prefill", 1)
    with over(run, *fakes) as service:
        left = [fake for fake in fakes if fake is not other]
        run.write(text(left, int(service.url.rpartition(":")[2])))
        run.cli("apply", check=True)
        service.wait(lambda: other.stats()["links"] == 0, what="no link at the removed engine")
        service.wait(lambda: decode.stats()["links"] == 1, what="one link at the other")
        assert ask(service, "one less") == expected("one less")
        nothing_left(service, prefill, decode)


def test_m_many_pairs_are_linked_once_each(run: Run) -> None:
    prefills, decodes = [Fake("prefill", n) for n in range(3)], [Fake("decode", n) for n in range(3)]
    with over(run, *prefills, *decodes) as service, ThreadPoolExecutor(12) as pool:
        prompts = [f"request {n}" for n in range(24)]
        assert list(pool.map(lambda prompt: ask(service, prompt, stream=True), prompts)) == [
            expected(prompt) for prompt in prompts
        ]
        nothing_left(service, *prefills, *decodes)
        assert [fake.stats()["initialized"] for fake in (*prefills, *decodes)] == [3] * 6


def test_engines_whose_kv_does_not_fit_are_refused(run: Run) -> None:
    prefill, decode = Fake("prefill"), Fake("decode", 0, "--tp", "2")
    with ExitStack() as stack:
        stack.callback(prefill.stop)
        stack.callback(decode.stop)
        run.write(text((prefill, decode), free_port()))
        done = run.cli("up", "-d")
        assert done.returncode != 0
        assert "tp_size" in done.stderr
        assert prefill.stats()["initialized"] == 0


def test_hybrid_engines_answer_alone_and_are_never_paired(run: Run) -> None:
    fakes = Fake("hybrid"), Fake("hybrid", 1)
    with over(run, *fakes) as service:
        for chat in (False, True):
            assert ask(service, "alone", chat=chat, stream=chat) == expected("alone")
        assert not service.status().links
        assert all(fake.stats()["initialized"] == fake.stats()["migrations"] == 0 for fake in fakes)


def test_prefill_engines_alone_answer_no_one_with_one_token(run: Run) -> None:
    prefill, decode = Fake("prefill"), Fake("decode")
    with over(run, prefill, decode) as service:
        decode.stop()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, service, "patience")
            service.wait(lambda: service.client.get("/health").status_code == 503, what="the proxy to see it")
            decode.start()
            assert asked.result(120) == expected("patience")
        nothing_left(service, prefill, decode)


# -- KV that is not protected ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["int", "real"])
def test_prompts_never_need_more_kv_than_prefill_has(run: Run, style: str) -> None:
    # Room for about four of the prompts: LMDeploy would evict KV that decode has not read yet.
    options = ("--id-style", style, "--blocks", "64")
    prefill, decode = Fake("prefill", 0, *options), Fake("decode", 0, *options)
    prompts = [f"{n:02d} " * 40 for n in range(24)]
    with over(run, prefill, decode) as service, ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda prompt: ask(service, prompt), prompts))
        assert found == [expected(prompt) for prompt in prompts]
        nothing_left(service, prefill, decode)
        assert prefill.stats()["evicted"] == 0
        assert decode.stats()["migrations"] > 0


def test_kv_that_a_killed_proxy_has_left_is_freed(run: Run) -> None:
    prefill, decode = Fake("prefill"), Fake("decode")
    with over(run, prefill, decode) as service, ThreadPoolExecutor(4) as pool:
        decode.fail("no_migration")
        asked = [pool.submit(_lost, service, f"prompt {n}") for n in range(4)]
        service.wait(lambda: decode.stats()["stuck_migrations"] == 4, what="requests that wait for KV")
        before = service.process("proxy")
        subprocess.run(["kill", "-9", str(before.pid)], check=True)
        for one in asked:
            one.result()
        service.restarted(before)
        decode.fail()
        nothing_left(service, prefill, decode)
        all_linked(service, (prefill, decode))
        assert ask(service, "again") == expected("again")


def _lost(service: Service, prompt: str) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.post(service.url + PATHS[False], json=body(prompt, False, False), timeout=60, trust_env=False)


def test_the_plan_and_the_status_show_the_engines(service: Quiet) -> None:
    served, prefill, decode = service
    plan = json.loads(served.run.cli("plan", "--json", check=True).stdout)
    assert {(one["name"], one["kind"]) for one in plan["attached"]} == {
        (prefill.name, "lmdeploy"), (decode.name, "lmdeploy"),
    }  # fmt: skip
    [link] = served.status().links
    assert (link.reader, link.peer, link.transport, link.protocol) == (decode.name, prefill.name, "distserve", "rdma")


# -- engines that register themselves ----------------------------------------------------------------------

NODE_KEY = "node key/1"


@contextmanager
def accepting(run: Run, away_s: float = 90.0, more: str = "") -> Iterator[Service]:
    """A service without engines of its own."""
    (run.folder / "nodes.keys").write_text(f"box sha256:{hashlib.sha256(NODE_KEY.encode()).hexdigest()}\n")
    proxy = f'accept_nodes = true\nnode_keys = "nodes.keys"\nnode_away_s = {away_s}\n{more}'
    with running(run, text((), free_port(), proxy)) as service:
        yield service


def with_key(service: Service) -> str:
    """The proxy's URL as an engine gets it: the key is the password."""
    return service.url.replace("http://", f"http://box:{quote(NODE_KEY, safe='')}@")


def nodes(service: Service) -> dict[str, Any]:
    found = httpx.get(f"{with_key(service)}/nodes/status", trust_env=False)
    assert found.status_code == 200, found.text
    return dict(found.json())


def post(service: Service, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{with_key(service)}/nodes/{path}", json=body, trust_env=False)


def node_pair(service: Service, *options: str) -> tuple[Fake, Fake]:
    """A prefill and a decode engine that have registered themselves and are linked."""
    pair = [Fake(role, 0, "--proxy-url", with_key(service), *options) for role in ("prefill", "decode")]
    for fake in pair:
        fake.name = fake.url.removeprefix("http://")
    all_linked(service, pair)
    return pair[0], pair[1]


def told(run: Run, name: str) -> list[str]:
    """The events of an engine."""
    lines = run.cli("events", check=True).stdout.splitlines()
    return [entry["event"] for entry in map(json.loads, lines) if entry["process"] == name]


def test_engines_register_themselves_serve_leave_and_are_forgotten(run: Run) -> None:
    with accepting(run, away_s=2.0) as service, ExitStack() as stack:
        assert service.status().state == "ready", "it waits for no engine"
        prefill, decode = node_pair(service)
        stack.callback(prefill.stop)
        stack.callback(decode.stop)
        by_a_pair(service, decode, "over two blocks of KV")
        assert ask(service, "a stream over KV", stream=True) == expected("a stream over KV")
        found = nodes(service)
        assert {url: (node["role"], node["models"], node["unfinished"]) for url, node in found.items()} == {
            prefill.url: (2, ["m"], 0), decode.url: (3, ["m"], 0),
        }  # fmt: skip
        assert all(node["latency"] and node["speed"] is None for node in found.values())
        attached = {one.name: one for one in service.status().attached}
        assert attached.keys() == {prefill.name, decode.name}
        assert all(one.registered and one.answers for one in attached.values())

        # Their membership outlives the proxy.
        before = service.process("proxy")
        subprocess.run(["kill", "-9", str(before.pid)], check=True)
        service.restarted(before)
        assert nodes(service).keys() == {prefill.url, decode.url}
        all_linked(service, (prefill, decode))
        by_a_pair(service, decode, "after a restart")

        # A killed one is silent at first, then forgotten.
        prefill.stop()
        service.wait(lambda: nodes(service).keys() == {decode.url}, what="the killed engine to be forgotten")
        service.wait(lambda: decode.stats()["links"] == 0, what="no link to the killed engine")
        assert [one.name for one in service.status().attached] == [decode.name]
        assert told(run, prefill.name) == ["node_added", "node_answers", "node_silent", "node_lost"]
        assert "has not answered for 2 s" in run.cli("why", prefill.url, check=True).stdout
        assert ask(service, "alone") == expected("alone")

        # It comes back by registering itself again, and is removed.
        prefill.start()
        all_linked(service, (prefill, decode))
        by_a_pair(service, decode, "again a pair")
        assert post(service, "remove", url=prefill.url).json() == "Deleted successfully"
        service.wait(lambda: prefill.stats()["links"] == decode.stats()["links"] == 0, what="no link on both sides")
        assert prefill.answers()
        assert nodes(service).keys() == {decode.url}
        assert ask(service, "alone again") == expected("alone again")
        nothing_left(service, prefill, decode)


def test_nodes_outlive_the_supervisor_where_engines_do(run: Run) -> None:
    more = '\n[supervisor]\non_supervisor_death = "survive"'
    with accepting(run, more=more) as service, ExitStack() as stack:
        prefill, decode = node_pair(service)
        stack.callback(prefill.stop)
        stack.callback(decode.stop)
        by_a_pair(service, decode, "before")
        subprocess.run(["kill", "-9", str(service.status().supervisor_pid)], check=True)
        assert ask(service, "without a supervisor") == expected("without a supervisor")
        assert post(service, "add", url=decode.url).status_code == 503
        run.cli("up", "-d", check=True)
        assert nodes(service).keys() == {prefill.url, decode.url}
        by_a_pair(service, decode, "after")
        assert prefill.stats()["initialized"] == 1, "the link was taken over, too"


def test_nodes_need_a_key_of_their_own(run: Run) -> None:
    (run.folder / "keys.txt").write_text(f"alice sha256:{hashlib.sha256(b'client').hexdigest()}\n")
    with accepting(run, more='api_keys = "keys.txt"') as service:
        body = {"url": "http://127.0.0.1:1", "status": {"role": 1, "models": ["m"]}}
        ways: list[dict[str, Any]] = [
            {}, {"auth": ("box", "wrong")}, {"headers": {"authorization": "Bearer client"}}, {"auth": ("x", "client")},
            {"headers": {"authorization": "Basic !"}},
        ]  # fmt: skip
        for way in ways:
            refused = httpx.post(f"{service.url}/nodes/add", json=body, trust_env=False, **way)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
            assert httpx.get(f"{service.url}/nodes/status", trust_env=False, **way).status_code == 401
        assert nodes(service) == {}
        good = {"authorization": f"Bearer {NODE_KEY}"}
        assert httpx.get(f"{service.url}/nodes/status", headers=good, trust_env=False).json() == {}


def test_a_registration_that_cannot_be_served_is_refused_with_a_reason(run: Run) -> None:
    with accepting(run) as service, ExitStack() as stack:

        def refused(expected_status: int, **body: object) -> str:
            answer = post(service, "add", **body)
            assert answer.status_code == expected_status, answer.text
            return str(answer.json()["error"]["message"])

        assert "serves other" in refused(409, url="http://127.0.0.1:1", status={"role": 1, "models": ["other"]})
        assert "is not an address" in refused(400, url="ftp://127.0.0.1:1", status={"role": 1, "models": ["m"]})
        assert "role is 7" in refused(400, url="http://127.0.0.1:1", status={"role": 7, "models": ["m"]})
        assert "/v1/models" in refused(502, url="http://127.0.0.1:1")
        assert "'proxy'" in refused(409, url=service.url, status={"role": 1, "models": ["m"]})
        assert post(service, "remove", url="http://127.0.0.1:1").status_code == 404
        hybrid = Fake("hybrid")
        stack.callback(hybrid.stop)
        for _ in range(2):
            added = post(service, "add", url=hybrid.url)
            assert (added.status_code, added.json()) == (200, "Added successfully"), "it was asked for its models"
        assert nodes(service)[hybrid.url]["role"] == 1
        service.healthy()
        assert ask(service, "alone") == expected("alone")


def test_nodes_are_ended_by_the_proxy_if_they_allow_it(run: Run) -> None:
    with accepting(run) as service, ExitStack() as stack:
        prefill, decode = node_pair(service, "--allow-terminate-by-client")
        stubborn = Fake("hybrid", 0, "--proxy-url", with_key(service))
        for fake in (prefill, decode, stubborn):
            stack.callback(fake.stop)
        assert post(service, "terminate", url=decode.url).json() == "Terminated successfully"
        decode.process.wait(60)
        assert decode.url not in nodes(service)
        everyone = httpx.get(f"{with_key(service)}/nodes/terminate_all", trust_env=False)
        assert everyone.status_code == 502, "one of them did not"
        assert f"{stubborn.url.removeprefix('http://')} was removed, but did not end" in everyone.text
        prefill.process.wait(60)
        assert nodes(service) == {}
        assert stubborn.answers()


def test_without_accept_nodes_the_paths_are_like_any_other(service: Quiet) -> None:
    served, prefill, _ = service
    for path in ("/nodes/add", "/nodes/remove", "/nodes/terminate"):
        answer = served.client.post(path, json={"url": prefill.url})
        assert (answer.status_code, answer.json()) == (404, served.client.post("/other").json() | {
            "error": {**served.client.post("/other").json()["error"], "message": f"POST {path}: Not Found"},
        })  # fmt: skip
    assert served.client.get("/nodes/status").status_code == 404
