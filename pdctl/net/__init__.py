"""What several processes share about HTTP: a client, ASGI helpers, listening sockets, OpenAI shapes."""
