"""The core process: the step loop and its message queue."""
