"""LMDeploy's /nodes messages: how its engines register themselves, and what its proxy says of them. As of 0.18.

An engine registers once, before it listens, with its role and its models, and sends no Authorization header: its key
is in the proxy's URL. Others, such as a script, may name the URL alone; then the engine is asked for its models.
"""

from __future__ import annotations

import ipaddress
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from pdctl.adapters.lmdeploy.messages import is_numeric

Role = Literal["prefill", "decode", "hybrid"]

ADDED = "Added successfully"
DELETED = "Deleted successfully"
TERMINATED = "Terminated successfully"
ALL_TERMINATED = "All nodes terminated successfully"
MODELS_PATH, TERMINATE_PATH = "/v1/models", "/terminate"

# LMDeploy's EngineRole.
_ROLES: dict[int, Role] = {1: "hybrid", 2: "prefill", 3: "decode"}
_NUMBERS = {role: number for number, role in _ROLES.items()}
_LONGEST_URL = 512


class Status(msgspec.Struct, frozen=True):
    """What is known of an engine. In an answer, `unfinished` are the calls that run, `latency` seconds of the last."""

    role: int = 1
    models: tuple[str, ...] = ()
    unfinished: int = 0
    latency: tuple[float, ...] = ()
    speed: int | None = None


class Registration(msgspec.Struct, frozen=True):
    """The body of /nodes/add, /nodes/remove and /nodes/terminate. Without `status`, its models are to be asked for."""

    url: str
    status: Status | None = None


class _Model(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: tuple[_Model, ...]


# Numbers may be strings, as for LMDeploy's own classes.
decode_registration = msgspec.json.Decoder(Registration, strict=False).decode
_decode_models = msgspec.json.Decoder(_Models).decode


def role_of(number: int) -> Role:
    """The role of LMDeploy's number. Raises ValueError."""
    if number not in _ROLES:
        raise ValueError(f"role is {number}: it must be 1 (hybrid), 2 (prefill) or 3 (decode)")
    return _ROLES[number]


def number_of(role: Role) -> int:
    """LMDeploy's number of a role."""
    return _NUMBERS[role]


def address_of(url: str, caller: str) -> tuple[str, int]:
    """Host and port of an engine's URL. Raises ValueError.

    An engine that listens on all addresses registers as 0.0.0.0: then its address is that of `caller`.
    """
    if len(url) > _LONGEST_URL:
        raise ValueError(f"url has more than {_LONGEST_URL} characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as failure:
        raise ValueError(f"url {url!r} is not valid: {failure}") from None
    if parts.scheme == "https":
        raise ValueError(f"url {url!r}: this service calls its engines by http; start the engine without --ssl")
    if parts.scheme != "http" or not host or port is None or not port:
        raise ValueError(f"url {url!r} is not an address such as http://10.0.0.7:23333")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"url {url!r} must have a host and a port, and nothing else")
    return _specific(host, caller), port


def check_host(host: str, role: Role) -> None:
    """Raises ValueError for an engine that cannot be linked to others."""
    if role != "hybrid" and not is_numeric(host):
        raise ValueError(f"url names the host {host}: a {role} engine needs an address, so start it with --server-name")


def models_of(body: bytes) -> tuple[str, ...]:
    """The models in an answer at MODELS_PATH. Raises ValueError."""
    try:
        return tuple(model.id for model in _decode_models(body).data)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise ValueError(f"the answer is not a list of models: {failure}") from None


def _specific(host: str, caller: str) -> str:
    try:
        address = ipaddress.ip_address(host)
        if not address.is_unspecified:
            return str(address)
        found = ipaddress.ip_address(caller)
    except ValueError:
        # A name, which no address of a caller replaces.
        return host
    return str((found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found)
