"""The engine's HTTP API: OpenAI endpoints, and internal endpoints for its own service."""
