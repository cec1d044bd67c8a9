"""Verbs that predict instead of measuring: imagined services in virtual time."""
