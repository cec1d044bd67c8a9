"""Changes of a running service: another plan, other roles."""
