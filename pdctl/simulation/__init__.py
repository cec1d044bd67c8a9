"""A service in virtual time: the shipped router, admission, failover, hand-over and scheduler, driven by their seams.

`spec` describes an imagined fleet, `service` runs it, `report` measures it as `pdctl bench` measures a real one.
Modelled, and not the shipped code: how long a step takes (`pdctl.latency`, `machine`), what calls and reads of KV take
(`wires`), and when an engine dies (`node`).
"""
