"""One supervised process: its lifecycle as a pure function, and the unit that executes it."""
