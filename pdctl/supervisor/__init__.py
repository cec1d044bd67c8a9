"""The supervisor: starts, watches, restarts and stops what a plan names. Never imports torch."""
