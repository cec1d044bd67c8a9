"""What comes from clients: connections, keys, requests."""
