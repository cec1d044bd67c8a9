"""Both sides of a hand-over as pure state machines, and the threads that pull KV."""
