"""The few forms of PromQL that boards and alerts need."""

from __future__ import annotations

# Grafana's variables, as a query names them.
SERVICE, ENGINE = "$service", "$engine"
# The time of a rate: as long as the panel's resolution needs.
INTERVAL = "$__rate_interval"


def metric(name: str, **labels: str) -> str:
    """A selector of one service's series. A value that begins with ~ is a regular expression."""
    return select(name, service=SERVICE, **labels)


def select(name: str, **labels: str) -> str:
    """A selector. A value that begins with ~ is a regular expression, with ! an exclusion."""
    return f"{name}{{{','.join(_matcher(label, value) for label, value in labels.items())}}}" if labels else name


def _matcher(label: str, value: str) -> str:
    for mark, operator in (("~", "=~"), ("!", "!=")):
        if value.startswith(mark):
            return f'{label}{operator}"{value[1:]}"'
    return f'{label}="{value}"'


def rate(selector: str, over: str = INTERVAL) -> str:
    """Per second, of a counter."""
    return f"rate({selector}[{over}])"


def total(expression: str, *by: str) -> str:
    """The sum, by these labels."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def quantile(part: float, name: str, *by: str) -> str:
    """A quantile of a service's histogram."""
    return f"histogram_quantile({part:g}, {total(rate(metric(f'{name}_bucket')), 'le', *by)})"


def ratio(above: str, below: str) -> str:
    """One divided by the other."""
    return f"{above} / {below}"
