"""Verbs and helpers used before a start: topology, plan, keys, models, checks."""
