"""From an engine's event stream to the client: read, gathered, written."""
