"""Beginnings of prompts that other engines have computed: what this one has is told to its peers and lent to them, and
what they have is fetched where that is faster than to compute it.

What an engine knows of others is advice: whether KV is there is decided by the engine that lends it, and whether what
was read may be used by the same lease and COMMIT as in a hand-over. Everything that goes wrong costs time only.
"""
