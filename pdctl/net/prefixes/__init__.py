"""Beginnings of prompts, as processes name them to each other and tell what they have of them."""
