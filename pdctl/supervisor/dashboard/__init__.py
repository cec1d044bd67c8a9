"""The live page: what it shows, who may see it, and its server. Nothing here is imported before somebody wants it."""
