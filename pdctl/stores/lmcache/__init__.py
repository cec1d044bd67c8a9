"""LMCache: a server that keeps blocks in its memory."""
