"""Verbs and helpers for what comes before a start: topology, plan, keys, models, checks."""
