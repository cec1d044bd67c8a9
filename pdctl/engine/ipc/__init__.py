"""Messages between front and core."""
