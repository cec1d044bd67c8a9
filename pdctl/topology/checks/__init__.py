"""Checks of a topology: its keys, what they say of each other and of several machines, and what this machine has."""
