"""Clients' connections outlive their proxy: what a proxy writes down, and how the next one goes on with it."""
