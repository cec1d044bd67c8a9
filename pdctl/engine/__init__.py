"""The engine: a front process (HTTP, leases) and a core process (torch, the step loop).

No other package imports this one; it is run with `python -m pdctl.engine`.
"""
