"""LMDeploy's registration messages: what pdctl takes for a URL, a role and a list of models."""

from __future__ import annotations

import msgspec
import pytest

from pdctl.adapters.lmdeploy import nodes


@pytest.mark.parametrize(
    ("url", "caller", "found"),
    [
        ("http://10.0.0.7:23333", "10.0.0.8", ("10.0.0.7", 23333)),
        ("http://10.0.0.7:23333/", "", ("10.0.0.7", 23333)),
        ("http://[fd00::7]:1", "", ("fd00::7", 1)),
        ("http://box:80", "10.0.0.8", ("box", 80)),
        # It listens on all addresses: the one that it calls from is one of them.
        ("http://0.0.0.0:23333", "10.0.0.8", ("10.0.0.8", 23333)),
        ("http://[::]:23333", "::ffff:10.0.0.8", ("10.0.0.8", 23333)),
        ("http://[::]:23333", "fd00::8", ("fd00::8", 23333)),
    ],
)
def test_an_address_is_that_of_the_url(url: str, caller: str, found: tuple[str, int]) -> None:
    assert nodes.address_of(url, caller) == found


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://10.0.0.7:1", "by http"),
        ("ftp://10.0.0.7:1", "is not an address"),
        ("10.0.0.7:23333", "is not an address"),
        ("http://10.0.0.7", "is not an address"),
        ("http://10.0.0.7:0", "is not an address"),
        ("http://10.0.0.7:70000", "is not valid"),
        ("http://[10.0.0.7:1", "is not valid"),
        ("http://10.0.0.7:1/v1", "nothing else"),
        ("http://10.0.0.7:1?a=b", "nothing else"),
        ("http://u:p@10.0.0.7:1", "nothing else"),
        ("http://" + "a" * 600 + ":1", "512 characters"),
    ],
)
def test_other_urls_are_refused_with_a_reason(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nodes.address_of(url, "10.0.0.8")


def test_roles_are_lmdeploys_numbers() -> None:
    assert [nodes.role_of(number) for number in (1, 2, 3)] == ["hybrid", "prefill", "decode"]
    assert [nodes.number_of(nodes.role_of(number)) for number in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="role is 4"):
        nodes.role_of(4)


def test_an_engine_that_is_linked_needs_an_address() -> None:
    nodes.check_host("box", "hybrid")
    nodes.check_host("10.0.0.7", "decode")
    with pytest.raises(ValueError, match="--server-name"):
        nodes.check_host("box", "decode")


def test_a_registration_is_read_as_lmdeploy_reads_it() -> None:
    found = nodes.decode_registration(b'{"url": "u", "status": {"role": 2, "models": ["m"], "speed": "5"}, "x": 2}')
    assert found == nodes.Registration("u", nodes.Status(2, ("m",), speed=5))
    assert nodes.decode_registration(b'{"url": "u"}') == nodes.Registration("u")
    assert nodes.decode_registration(b'{"url": "u", "status": {}}').status == nodes.Status()
    for wrong in (b"{}", b'{"url": 1.5}', b'{"url": "u", "status": {"role": "Decode"}}', b"[]"):
        with pytest.raises(msgspec.DecodeError):
            nodes.decode_registration(wrong)


def test_models_are_those_of_an_openai_list() -> None:
    assert nodes.models_of(b'{"object": "list", "data": [{"id": "m", "root": "m"}, {"id": "lora"}]}') == ("m", "lora")
    for wrong in (b"{}", b"no", b"\xff", b'{"data": [1]}'):
        with pytest.raises(ValueError, match="not a list of models"):
            nodes.models_of(wrong)
