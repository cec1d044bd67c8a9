"""The core process: the step loop and its queue of messages."""
