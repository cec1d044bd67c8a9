"""The proxy: one address for clients, a prefill and a decode engine behind each request."""
