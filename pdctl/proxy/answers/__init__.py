"""From an engine's event stream to the client: reading, gathering, writing."""
