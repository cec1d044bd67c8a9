"""Processes: start, probe and log them, and end them with all their descendants."""
