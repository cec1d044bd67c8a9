"""Processes themselves: started, looked at, logged, ended with their trees."""
