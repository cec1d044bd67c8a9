"""Verbs that start, stop and change a service."""
