"""A service in virtual time: the shipped router, admission, failover, hand-over and scheduler, driven by their seams.

`spec` describes an imagined fleet, `service` runs it, `report` measures it as `pdctl bench` measures a real one.
Modelled, and not the shipped code: how long a step takes (`pdctl.latency`, `engines.machine`), what calls and reads of
KV take (`requests.wires`), and when an engine dies (`engines.node`).
"""
