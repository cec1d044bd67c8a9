"""The client side: connections, keys, requests."""
