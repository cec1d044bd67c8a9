"""Who may ask for KV transfer, in which words, and what counts as genuine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pdctl.engine.front.routers.seal import Seal
from pdctl.engine.front.routers.transfers import Router, Transfer, Transfers
from pdctl.net.openai.api import ApiError
from pdctl.net.openai.fields import CompletionBody, MigrationRequest
from pdctl.wire import HandOver
from tests.engine.front.routers.given import hand_over

SEAL = Seal("secret")
OPEN, CLOSED = Transfers(SEAL, is_open=True), Transfers(SEAL, is_open=False)

# What vllm-router 0.1.17 sends to a prefill engine.
VLLM_HOLD = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
MIGRATION = {
    "protocol": 2, "remote_engine_id": "http://127.0.0.1:1", "remote_session_id": 5, "remote_token_id": 1000,
    "remote_block_ids": [0, 1], "is_dummy_prefill": False,
}  # fmt: skip


def body(**fields: object) -> CompletionBody:
    return msgspec.json.decode(msgspec.json.encode({"prompt": "x", **fields}), type=CompletionBody)


def given(**changed: Any) -> HandOver:
    return msgspec.structs.replace(hand_over("e.1"), **changed)


def refused(transfers: Transfers, fields: CompletionBody) -> ApiError:
    with pytest.raises(ApiError) as caught:
        transfers.of(fields, is_internal=False)
    return caught.value


def test_an_ordinary_request_asks_for_nothing() -> None:
    assert OPEN.of(body(), is_internal=False) == Transfer()


def test_this_services_proxy_needs_no_seal() -> None:
    asked = CLOSED.of(body(kv_transfer_params=given()), is_internal=True)
    assert (asked.router, asked.hand_over) == (Router.OURS, given())


def test_vllm_router_holds_and_brings_back_a_sealed_hand_over() -> None:
    assert OPEN.of(body(kv_transfer_params=VLLM_HOLD), is_internal=False) == Transfer(Router.VLLM, hold=True)
    sealed = SEAL.sealed(given())
    # It parses the object, and writes its fields in another order.
    fields = dict(sorted(msgspec.json.decode(msgspec.json.encode(sealed)).items()))
    asked = OPEN.of(body(kv_transfer_params=fields), is_internal=False)
    assert (asked.router, asked.hand_over) == (Router.VLLM, sealed)


def test_a_decode_without_hand_over_is_an_ordinary_request() -> None:
    nothing = {"do_remote_decode": False, "do_remote_prefill": False}
    assert OPEN.of(body(kv_transfer_params=nothing), is_internal=False) == Transfer(Router.VLLM)


@pytest.mark.parametrize(
    "changed",
    [{"remote_host": "elsewhere"}, {"remote_port": 1}, {"lease_id": "e.2"}, {"remote_block_ids": [1]}, {"seal": ""}],
    ids=str,
)
def test_a_changed_hand_over_is_refused(changed: dict[str, Any]) -> None:
    """Its address would be called with the run's secret, its memory would be read."""
    forged = msgspec.structs.replace(SEAL.sealed(given()), **changed)
    assert refused(OPEN, body(kv_transfer_params=forged)).status == 403


def test_without_a_secret_nothing_is_genuine() -> None:
    none = Seal("")
    assert not none.is_genuine(none.sealed(given()))


def test_a_router_cannot_choose_whom_prefill_calls() -> None:
    asked = OPEN.of(body(kv_transfer_params={**VLLM_HOLD, "offer_to": {"host": "x", "port": 1}}), is_internal=False)
    assert (asked.hold, asked.offer_to) == (True, None)


def test_lmdeploys_proxy_holds_and_names_a_session() -> None:
    held = body(with_cache=True, preserve_cache=True, session_id=-1, repetition_ngram_size=0, suffix=None)
    assert OPEN.of(held, is_internal=False) == Transfer(Router.LMDEPLOY, hold=True)
    asked = OPEN.of(body(migration_request=MIGRATION), is_internal=False)
    assert asked.migration == MigrationRequest("http://127.0.0.1:1", 5, 1000, [0, 1], 2)


def test_a_dummy_prefill_is_refused() -> None:
    assert refused(OPEN, body(migration_request={**MIGRATION, "is_dummy_prefill": True})).status == 400


@pytest.mark.parametrize(
    "fields", [{"kv_transfer_params": VLLM_HOLD}, {"preserve_cache": True}, {"migration_request": MIGRATION}], ids=str
)
def test_a_closed_engine_serves_only_its_service(fields: dict[str, Any]) -> None:
    assert refused(CLOSED, body(**fields)).status == 403


def test_a_refused_request_still_tells_what_it_left_at_prefill() -> None:
    sealed = SEAL.sealed(given())
    said = msgspec.json.encode({"kv_transfer_params": sealed, "max_tokens": "many"})
    assert OPEN.carried(said).hand_over == sealed
    assert OPEN.carried(msgspec.json.encode({"migration_request": MIGRATION})).migration is not None
    for unreadable in (b"", b"[", b"{}", msgspec.json.encode({"kv_transfer_params": given()})):
        assert OPEN.carried(unreadable) == Transfer()
