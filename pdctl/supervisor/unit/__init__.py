"""One supervised process: its life as a pure function, and the shell that carries it out."""
