"""The supervisor's control API, and its notifications to systemd."""
