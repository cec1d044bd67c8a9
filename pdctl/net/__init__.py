"""HTTP code shared by several processes: a client, ASGI helpers, listening sockets, OpenAI shapes."""

# Where the processes of one host reach each other.
LOOPBACK = "127.0.0.1"
_PORT = r"[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
# A pattern for such an address with a port.
LOOPBACK_PORT = rf"(127(\.[0-9]{{1,3}}){{3}}|localhost|\[::1\]):({_PORT})"


def is_loopback(host: str) -> bool:
    """Whether only this host reaches a listener on `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


def reachable(host: str) -> str:
    """An address at which this host reaches a listener on `host`, which may be a wildcard."""
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
