"""Verbs that show what a service is and was doing."""
