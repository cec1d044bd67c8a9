"""vLLM's OpenAI server with a pull connector (NixlConnector), attached by its URL."""
