"""The engine's HTTP surface: OpenAI endpoints, and those of its own service."""
