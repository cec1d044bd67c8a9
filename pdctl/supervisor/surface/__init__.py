"""How the supervisor is asked, and what it tells systemd."""
