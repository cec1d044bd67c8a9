"""Both sides of a hand-over as pure machines, and the threads that pull."""
