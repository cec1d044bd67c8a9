"""`pdctl agent`: a supervisor whose plan comes from the registry of its cluster."""
