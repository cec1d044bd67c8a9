"""HTTP code shared by several processes: a client, ASGI helpers, listening sockets, OpenAI shapes."""

# Where the processes of one host reach each other.
LOOPBACK = "127.0.0.1"


def reachable(host: str) -> str:
    """An address at which this host reaches a listener on `host`, which may be a wildcard."""
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
