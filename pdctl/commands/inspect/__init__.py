"""Verbs that show the state and the history of a service."""
