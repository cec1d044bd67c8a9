"""Grafana dashboards, Prometheus' configuration and alert rules, made from the metrics in docs/metrics.md.

`dashboards.py` and `alerts.py` say what is shown and what is wrong; `panels.py` writes panels in Grafana's
format; `stack.py` makes the files. tests/boards compares every name and label with a real service.
"""
