"""Models for trying pdctl out and for its tests, made on this machine. Never shipped."""
