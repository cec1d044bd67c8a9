"""HTTP code shared by several processes: a client, ASGI helpers, listening sockets, OpenAI shapes."""

# Where the processes of one host reach each other.
LOOPBACK = "127.0.0.1"
