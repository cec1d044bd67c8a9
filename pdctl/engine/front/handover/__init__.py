"""Leases, offers and migrations at work."""
