"""Counters, timing, logs and traces."""
