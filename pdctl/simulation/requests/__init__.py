"""One request of an imagined service, from its arrival to its end."""
