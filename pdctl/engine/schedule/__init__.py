"""Scheduling: which tokens are computed next. It handles only ids."""
