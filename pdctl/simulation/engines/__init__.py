"""Imagined engines: what they are made of, how fast they are, and where they come from."""
