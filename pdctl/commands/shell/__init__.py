"""Verbs for shells and readers: completion scripts and the man page."""
