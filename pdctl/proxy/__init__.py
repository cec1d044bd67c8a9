"""The proxy: one address for clients; it sends each request to a prefill and a decode engine."""
