"""pdctl's own engine, `python -m pdctl.engine`: vLLM's PD dialect with leases and resumption added."""
