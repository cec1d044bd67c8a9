"""A whole service: the order of its units, changes of its plan, its KV, its shutdown."""
