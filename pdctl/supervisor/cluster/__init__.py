"""A supervisor as one of many: what it tells the registry of its node, and what it learns of the others."""
