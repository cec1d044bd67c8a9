"""The supervisor makes no calls to a vLLM engine. The engine is attached, and its leases end by vLLM's own timeout."""

from pdctl.adapters.control import NoControl

CONTROL = NoControl()
