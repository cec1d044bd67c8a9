"""Engines with `open = true`, called as vllm-router and LMDeploy's proxy call them: without the run's secret.

tests/routers does the same with the real routers. Here are the cases that they do not produce.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.service import Run, Service, events, pid_of, running, topology

pytestmark = pytest.mark.e2e

PROMPT = "Once upon a time there was a prompt of more than one block. " * 2
END_OF_OUTPUT = 383  # of the tiny chat sample

# As vllm-router 0.1.17 and LMDeploy's proxy 0.18.0 send them.
VLLM_HOLD = {
    "max_tokens": 1, "min_tokens": 1, "stream": False,
    "kv_transfer_params": {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    },
}  # fmt: skip
VLLM_FIELDS = {
    "echo": False, "no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True,
    "return_hidden_states": False,
}  # fmt: skip
LMDEPLOY_FIELDS = {
    "suffix": None, "n": 1, "logprobs": None, "max_completion_tokens": None, "stop": None, "stream_options": None,
    "top_p": None, "echo": False, "presence_penalty": 0.0, "frequency_penalty": 0.0, "user": None,
    "repetition_penalty": None, "repetition_ngram_size": 0, "repetition_ngram_threshold": 0, "session_id": -1,
    "ignore_eos": False, "skip_special_tokens": True, "spaces_between_special_tokens": True, "top_k": None,
    "seed": None, "min_p": None,
}  # fmt: skip
LMDEPLOY_HOLD = {"max_tokens": 1, "stream": False, "with_cache": True, "preserve_cache": True}


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    # A lease that no call ends outlives the test.
    with running(module_run, topology("sample:tiny-chat", engine_extra="open = true", lease_s=600)) as found:
        yield found


class Stranger:
    """A client of one engine that does not know the run's secret."""

    def __init__(self, service: Service, name: str) -> None:
        self.url = f"http://127.0.0.1:{service.process(name).ports['http']}"
        self.http = httpx.Client(base_url=self.url, timeout=300, trust_env=False)

    def ask(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/completions", json={"model": "m", "prompt": PROMPT, "temperature": 0, **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def text(self, **fields: Any) -> str:
        return str(self.ask(**fields)["choices"][0]["text"])

    def refusal(self, **fields: Any) -> tuple[int, str]:
        answer = self.http.post("/v1/completions", json={"model": "m", "prompt": PROMPT, **fields})
        return answer.status_code, answer.json()["error"]["message"]

    def distserve(self, path: str, **fields: Any) -> Any:
        answer = self.http.post(f"/distserve/{path}", json=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def prefill(service: Service) -> Iterator[Stranger]:
    service.healthy()
    found = Stranger(service, "prefill-0")
    with found.http:
        yield found
    service.idle()


@pytest.fixture
def decode(service: Service) -> Iterator[Stranger]:
    found = Stranger(service, "decode-0")
    with found.http:
        yield found


def hand_overs(service: Service) -> int:
    return int(service.engine_state("decode-0")["transfers"]["hand_overs"])


def rounded(value: Any) -> Any:
    """Without the last digits of log probabilities, which depend on how a prompt was cut into steps."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def migration(prefill: Stranger, held: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """What LMDeploy's proxy makes of a prefill's answer."""
    return {
        "protocol": 2, "remote_engine_id": prefill.url, "remote_session_id": int(held["id"]),
        "remote_token_id": held["remote_token_ids"][-1], "remote_block_ids": held["cache_block_ids"],
        "is_dummy_prefill": False, **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 9},
        {"max_tokens": 9, "temperature": 0.8, "seed": 3, "min_tokens": 5},
        {"max_tokens": 9, "logit_bias": {str(END_OF_OUTPUT): 100}},
        {"max_tokens": 3, "logprobs": 2},
        {"max_tokens": 3, "logprobs": 2, "echo": True},
        {"max_tokens": 3, "prompt_logprobs": 1},
        {"max_tokens": 3, "truncate_prompt_tokens": 1},
        {"max_tokens": 9, "structured_outputs": {"regex": "[ab]{4}"}},
    ],
    ids=str,
)
def test_decode_answers_as_if_alone(
    service: Service, prefill: Stranger, decode: Stranger, fields: dict[str, Any]
) -> None:
    """Whatever vllm-router changed in the prefill's request: it forbids the end of the output, for one."""
    alone = decode.ask(**fields)
    held = prefill.ask(**{**VLLM_FIELDS, **fields, **VLLM_HOLD})
    given = decode.ask(**{**VLLM_FIELDS, **fields}, kv_transfer_params=held["kv_transfer_params"])
    assert given["usage"] == alone["usage"]
    assert rounded(given["choices"]) == rounded(alone["choices"])


def test_kv_is_handed_over(service: Service, prefill: Stranger, decode: Stranger) -> None:
    before = hand_overs(service)
    held = prefill.ask(**VLLM_FIELDS, **VLLM_HOLD)
    assert held["choices"][0]["finish_reason"] == "length"
    decode.text(max_tokens=4, kv_transfer_params=held["kv_transfer_params"])
    held = prefill.ask(**LMDEPLOY_FIELDS, **LMDEPLOY_HOLD)
    decode.text(**LMDEPLOY_FIELDS, max_tokens=4, migration_request=migration(prefill, held))
    assert hand_overs(service) - before == 2


def test_lost_kv_is_computed_again(service: Service, prefill: Stranger, decode: Stranger) -> None:
    """A router of another project would give up the request."""
    before, alone = hand_overs(service), decode.text(max_tokens=9)
    params = prefill.ask(**VLLM_HOLD)["kv_transfer_params"]
    service.run.cli("kv", "--revoke", params["lease_id"], check=True)
    assert decode.text(max_tokens=9, kv_transfer_params=params) == alone
    session = migration(prefill, prefill.ask(**LMDEPLOY_HOLD))
    lease = service.engine_state("prefill-0")["leases"][0]["id"]
    service.run.cli("kv", "--revoke", lease, check=True)
    assert decode.text(max_tokens=9, migration_request=session) == alone
    assert hand_overs(service) == before


def test_a_hand_over_serves_one_request(service: Service, prefill: Stranger, decode: Stranger) -> None:
    before, alone = hand_overs(service), decode.text(max_tokens=9)
    params = prefill.ask(**VLLM_HOLD)["kv_transfer_params"]
    session = migration(prefill, prefill.ask(**LMDEPLOY_HOLD))
    for _ in range(2):
        assert decode.text(max_tokens=9, kv_transfer_params=params) == alone
        assert decode.text(max_tokens=9, migration_request=session) == alone
    assert hand_overs(service) - before == 2


def test_kv_of_another_prompt_is_never_decoded(service: Service, prefill: Stranger, decode: Stranger) -> None:
    before = hand_overs(service)
    other = PROMPT.replace("Once", "Then")
    alone = decode.text(max_tokens=9, prompt=other)
    params = prefill.ask(**VLLM_HOLD)["kv_transfer_params"]
    assert decode.text(max_tokens=9, prompt=other, kv_transfer_params=params) == alone
    session = migration(prefill, prefill.ask(**LMDEPLOY_HOLD))
    assert decode.text(max_tokens=9, prompt=other, migration_request=session) == alone
    assert hand_overs(service) == before


def test_a_forged_hand_over_is_refused(service: Service, prefill: Stranger, decode: Stranger) -> None:
    """It would make the decode engine send the run's secret to any address."""
    params = prefill.ask(**VLLM_HOLD)["kv_transfer_params"]
    status, message = decode.refusal(kv_transfer_params={**params, "remote_port": 9})
    assert (status, "not made by an engine of this service" in message) == (403, True)
    decode.text(max_tokens=4, kv_transfer_params=params)


def test_only_linked_engines_are_asked_for_sessions(service: Service, prefill: Stranger, decode: Stranger) -> None:
    alone = decode.text(max_tokens=9)
    held = prefill.ask(**LMDEPLOY_HOLD)
    for url in (decode.url, "http://127.0.0.1:9", "http://192.0.2.1:80", "nowhere"):
        asked = migration(prefill, held, remote_engine_id=url)
        assert decode.text(max_tokens=9, migration_request=asked) == alone
    before = hand_overs(service)
    named = prefill.url.replace("127.0.0.1", "localhost")
    assert decode.text(max_tokens=9, migration_request=migration(prefill, held, remote_engine_id=named)) == alone
    assert hand_overs(service) - before == 1


@pytest.mark.parametrize("wrong", [{"max_tokens": 100_000}, {"min_tokens": 9}, {"stream_options": {"x": 1}}], ids=str)
def test_what_decode_refuses_is_released(prefill: Stranger, decode: Stranger, wrong: dict[str, Any]) -> None:
    """`prefill` waits for it."""
    fields = {"max_tokens": 4, **wrong}
    params = prefill.ask(**VLLM_HOLD)["kv_transfer_params"]
    assert decode.refusal(**fields, kv_transfer_params=params)[0] == 400
    session = migration(prefill, prefill.ask(**LMDEPLOY_HOLD))
    assert decode.refusal(**fields, migration_request=session)[0] == 400


def test_the_connection_of_a_pair(service: Service, prefill: Stranger, decode: Stranger) -> None:
    blocks = service.engine_state("prefill-0")["blocks_total"]
    infos = [json.loads(one.http.get("/distserve/engine_info").json()) for one in (prefill, decode)]
    assert {(info["tp_size"], info["pp_size"], info["num_gpu_blocks"]) for info in infos} == {(1, None, blocks)}
    for one, other in ((prefill, decode), (decode, prefill)):
        made = one.distserve("p2p_initialize", local_engine_id=one.url, remote_engine_id=other.url, protocol=2)
        assert (made["status"], made["kvtransfer_endpoint_info"][0]["protocol"]) == (1, 2)
        assert one.distserve("p2p_connect", protocol=2, remote_engine_id=other.url) == {"status": 1}
        assert one.distserve("p2p_drop_connect", engine_id=one.url, remote_engine_id=other.url) == {"success": True}
    assert decode.distserve("p2p_connect", protocol=2, remote_engine_id="http://192.0.2.1:1") == {"status": 2}


def test_a_freed_cache_is_free(service: Service, prefill: Stranger) -> None:
    """`prefill` waits until nothing is held."""
    held = prefill.ask(**LMDEPLOY_HOLD)
    assert service.engine_state("prefill-0")["leases"][0]["holder"] == "lmdeploy-proxy"
    for session in (5, held["cache_session_id"], held["cache_session_id"]):
        freed = prefill.distserve("free_cache", remote_engine_id=prefill.url, remote_session_id=session)
        assert freed == {"status": "SUCCESS"}


def test_a_stranger_cannot_use_leases_or_resume(prefill: Stranger, decode: Stranger) -> None:
    for path in ("leases/claim", "leases/release", "sessions/take", "holders/release", "role"):
        assert prefill.http.post(f"/pdctl/v1/{path}", json={}).status_code == 403
    assert decode.refusal(resume_token_ids=[1])[0] == 403


def test_prefill_dies_before_decode_begins(service: Service, prefill: Stranger, decode: Stranger) -> None:
    alone = decode.text(max_tokens=9)
    params = prefill.ask(**VLLM_HOLD)["kv_transfer_params"]
    session = migration(prefill, prefill.ask(**LMDEPLOY_HOLD))
    before = service.process("prefill-0")
    os.kill(pid_of(before), signal.SIGKILL)
    assert decode.text(max_tokens=9, kv_transfer_params=params) == alone
    assert decode.text(max_tokens=9, migration_request=session) == alone
    service.restarted(before)
    # The new process knows neither the lease nor the session.
    assert decode.text(max_tokens=9, kv_transfer_params=params) == alone
    assert decode.text(max_tokens=9, migration_request=session) == alone


def test_streams_begin_with_the_first_token(service: Service, prefill: Stranger, decode: Stranger) -> None:
    alone = decode.ask(max_tokens=5, return_token_ids=True)["choices"][0]
    params = prefill.ask(**VLLM_HOLD)["kv_transfer_params"]
    body = {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 5, "return_token_ids": True, "stream": True}
    with decode.http.stream("POST", "/v1/completions", json={**body, "kv_transfer_params": params}) as streamed:
        found = [token_id for event in events(streamed) if event for token_id in event["choices"][0]["token_ids"]]
    assert found == alone["token_ids"]


def test_closed_engines_serve_no_routers(run: Run) -> None:
    with running(run, topology("sample:tiny-chat")) as service:
        closed = Stranger(service, "prefill-0")
        with closed.http:
            assert closed.refusal(**VLLM_HOLD)[0] == 401
            assert closed.http.get("/distserve/engine_info").status_code == 401
            # LMDeploy's proxy with a key in front of it could add the secret.
            closed.http.headers.update(service.internal)
            held = closed.ask(**LMDEPLOY_HOLD)
            closed.distserve("free_cache", remote_engine_id=closed.url, remote_session_id=held["cache_session_id"])
        service.idle()
