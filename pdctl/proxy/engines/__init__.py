"""The engines as the proxy sees them, and which one a request gets."""
