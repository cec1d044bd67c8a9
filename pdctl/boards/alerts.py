"""Alert rules for Prometheus. Each has a sentence that says what is wrong, and a command that shows more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdctl.boards.promql import rate, ratio, select, total

# Burn rates and windows of Google's SRE Workbook, chapter 5 (https://sre.google/workbook/alerting-on-slos): at 14.4, 2%
# of a month's allowed misses are used in an hour; at 6, 5% in six hours. The short window ends an alert soon.
_BURNS = (("Fast", 14.4, "1h", "5m", "critical"), ("Slow", 6.0, "6h", "30m", "warning"))
# Restarts within ten minutes that count as a crash loop.
_RESTARTS = 3
# Growth of bit errors that is not normal on any link: IBTA's bit error rate of 1e-12 on a 4X link, per hour.
_SYMBOL_ERRORS = 120


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert. `lasts`: how long it must be true; `severity`: critical needs a person now."""

    name: str
    expression: str
    lasts: str
    severity: str
    summary: str
    look: str


def alerts(objective: float) -> tuple[Alert, ...]:
    """All alerts. `objective`: the part of answers that must meet slo.ttft_ms, such as 0.99."""
    return (*_promises(), *_processes(), *_rdma(), *_burns(objective))


def _promises() -> Iterator[Alert]:
    leaked = select("pdctl_engine_block_seconds_total", what="leaked")
    yield Alert(
        "PdctlKvLeaked", f"increase({leaked}[5m]) > 0", "0m", "critical",
        "{{ $labels.engine }} holds KV for a holder that is gone", "pdctl kv --leaks",
    )  # fmt: skip
    yield Alert(
        "PdctlTransportFallback", f"{select('pdctl_link_fallback')} == 1", "1m", "warning",
        "KV from {{ $labels.prefill }} to {{ $labels.decode }} does not use the configured protocol", "pdctl status",
    )  # fmt: skip
    yield Alert(
        "PdctlNoLink", f"{select('pdctl_link_up')} == 0", "2m", "warning",
        "{{ $labels.decode }} cannot read the KV of {{ $labels.prefill }}", "pdctl status",
    )  # fmt: skip


def _processes() -> Iterator[Alert]:
    restarts = select("pdctl_process_restarts_total")
    yield Alert(
        "PdctlCrashLoop", f"increase({restarts}[10m]) >= {_RESTARTS}", "0m", "critical",
        "{{ $labels.process }} was restarted {{ $value | humanize }} times in ten minutes",
        "pdctl why {{ $labels.process }}",
    )  # fmt: skip
    yield Alert(
        "PdctlProcessFailed", f"{select('pdctl_process_state', state='failed')} == 1", "0m", "critical",
        "{{ $labels.process }} has failed and is not restarted", "pdctl why {{ $labels.process }}",
    )  # fmt: skip
    yield Alert(
        "PdctlSourceSilent", f"{select('pdctl_scrape_ok')} == 0", "2m", "warning",
        "{{ $labels.source }} does not tell its metrics", "pdctl status",
    )  # fmt: skip
    yield Alert(
        "PdctlDown", f"{select('up', job='pdctl')} == 0", "1m", "critical",
        "the proxy of {{ $labels.service }} does not answer", "pdctl status; pdctl why proxy",
    )  # fmt: skip


def _rdma() -> Iterator[Alert]:
    port = "{{ $labels.device }}:{{ $labels.port }}"
    symbols = select("pdctl_rdma_events_total", counter="symbol_error")
    yield Alert(
        "PdctlRdmaSymbolErrors", f"increase({symbols}[1h]) > {_SYMBOL_ERRORS}", "0m", "critical",
        f"{port} has bit errors: clean, reseat or replace the cable", "pdctl doctor rdma",
    )  # fmt: skip
    downed = select("pdctl_rdma_events_total", counter="link_downed")
    yield Alert(
        "PdctlRdmaLinkDowned", f"increase({downed}[10m]) > 0", "0m", "critical",
        f"{port} lost its link", "pdctl doctor rdma",
    )  # fmt: skip


def _burns(objective: float) -> Iterator[Alert]:
    for name, factor, long, short, severity in _BURNS:
        limit = factor * (1 - objective)
        yield Alert(
            f"PdctlTtftBurn{name}", f"{_missed(long)} > {limit:.6g} and {_missed(short)} > {limit:.6g}", "0m", severity,
            f"too many first tokens are later than slo.ttft_ms: {{{{ $value | humanizePercentage }}}} in {long}",
            "pdctl status; pdctl recommend",
        )  # fmt: skip


def _missed(over: str) -> str:
    """The part of the answers whose first token was too late. NaN, so no alert, without answers."""
    met = total(rate(select("pdctl_proxy_slo_met_total", target="ttft"), over), "service")
    return f"1 - {ratio(met, total(rate(select('pdctl_proxy_requests_total', status='200'), over), 'service'))}"
