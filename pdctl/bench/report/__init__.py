"""Presentation of results: text, HTML pages, plots, PNG files."""
