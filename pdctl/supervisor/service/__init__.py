"""A whole service: its units in order, its plan as it changes, its KV, its end."""
