"""Clients that compare every byte of their answers while the proxy dies again and again."""
