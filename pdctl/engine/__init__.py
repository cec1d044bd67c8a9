"""The engine: a front process (HTTP, leases) and a core process (torch, the step loop).

Nobody imports this package from outside; it is reached by `python -m pdctl.engine`.
"""
