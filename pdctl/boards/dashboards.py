"""The dashboards: an overview of a service, its engines, the hand-over of KV, and RDMA."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from pdctl.boards.panels import Dashboard, Panel, Query, Row
from pdctl.boards.promql import ENGINE, metric, quantile, rate, ratio, total

_stat = partial(Panel, kind="stat", width=4)
_engine = partial(metric, engine=f"~{ENGINE}")


def _quantiles(name: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(part, name), f"p{100 * part:g}") for part in (0.5, 0.9, 0.99))


def _per_second(name: str, legend: str, *by: str, **labels: str) -> Query:
    return Query(total(rate(metric(name, **labels)), *by), legend)


def _each(name: str, legend: str = "{{engine}}") -> Query:
    return Query(_engine(name), legend)


def _rates(name: str, legend: str = "{{engine}}") -> Query:
    return Query(rate(_engine(name)), legend)


def _met(target: str) -> str:
    """The part of the answers that met a target."""
    answered = total(rate(metric("pdctl_proxy_requests_total", status="200")))
    return ratio(total(rate(metric("pdctl_proxy_slo_met_total", target=target))), answered)


OVERVIEW = Dashboard(
    uid="pdctl-overview",
    title="pdctl: overview",
    about="What clients of the service get, and whether its processes are well.",
    rows=(
        Row("Now", (
            _stat("Ready", "1 if every process of the service is ready.", "none",
                  (Query(metric("pdctl_service_ready"), ""),), red_below=1),
            _stat("Requests", "Requests answered or refused.", "reqps",
                  (_per_second("pdctl_proxy_requests_total", ""),)),
            _stat("Output tokens", "Tokens sent to clients.", "short",
                  (_per_second("pdctl_proxy_tokens_total", "per second"),)),
            _stat("Waiting", "Requests that wait for admission.", "short",
                  (Query(metric("pdctl_proxy_waiting"), ""),)),
            _stat("TTFT target met", "Part of the answers whose first token met slo.ttft_ms.", "percentunit",
                  (Query(_met("ttft"), ""),), red_below=0.95),
            _stat("TPOT target met", "Part of the answers that met slo.tpot_ms.", "percentunit",
                  (Query(_met("tpot"), ""),), red_below=0.95),
        )),
        Row("Clients", (
            Panel("Time to first token", "From request to first token.", "s", _quantiles("pdctl_proxy_ttft_seconds")),
            Panel("Time between tokens", "Gaps in streams.", "s", _quantiles("pdctl_proxy_itl_seconds")),
            Panel("Requests by status", "429 is a refusal, 499 a client that left.", "reqps",
                  (_per_second("pdctl_proxy_requests_total", "{{status}}", "status"),), stacked=True),
            Panel("Tokens", "Tokens of prompts and of answers.", "short",
                  (_per_second("pdctl_proxy_prompt_tokens_total", "prompt"),
                   _per_second("pdctl_proxy_tokens_total", "output"))),
            Panel("Time in queue", "Time that requests wait for admission.", "s",
                  _quantiles("pdctl_proxy_queue_seconds")),
            Panel("Refused", "Requests refused with 429, by reason.", "reqps",
                  (_per_second("pdctl_proxy_sheds_total", "{{reason}}", "reason"),), stacked=True),
        )),
        Row("Processes", (
            Panel("Up", "1 if the process does its work.", "none",
                  (Query(metric("pdctl_process_up"), "{{process}}"),), kind="state-timeline", red_below=1),
            Panel("Restarts", "Starts after the first.", "short",
                  (Query(f"increase({metric('pdctl_process_restarts_total')}[$__range])", "{{process}}"),)),
            Panel("Failovers", "Requests that went on at another engine because this one failed.", "reqps",
                  (_per_second("pdctl_proxy_failovers_total", "{{engine}}", "engine"),)),
            Panel("Sources of metrics", "1 if the source answered the last scrape in time.", "none",
                  (Query(metric("pdctl_scrape_ok"), "{{source}}"),), kind="state-timeline", red_below=1),
        )),
        Row("API keys", (
            Panel("Tokens by key", "Output tokens. Empty without proxy.api_keys.", "short",
                  (_per_second("pdctl_proxy_key_tokens_total", "{{key}}", "key"),), stacked=True),
            Panel("Running and waiting by key", "Answers of each key.", "short",
                  (Query(metric("pdctl_proxy_key_running"), "{{key}} running"),
                   Query(metric("pdctl_proxy_key_waiting"), "{{key}} waiting"))),
        )),
    ),
)  # fmt: skip

_HITS = ratio(
    total(rate(_engine("pdctl_engine_prefix_hits_total")), "engine"),
    total(rate(_engine("pdctl_engine_prefix_tokens_total")), "engine"),
)
_KV_USED = f"1 - {ratio(_engine('pdctl_engine_blocks_free'), _engine('pdctl_engine_blocks'))}"
_ERROR = ratio(
    total(rate(_engine("pdctl_engine_step_errors_total")), "engine", "kind"),
    total(rate(_engine("pdctl_engine_steps_total")), "engine", "kind"),
)
_ACCEPTED = ratio(
    total(rate(_engine("pdctl_engine_accepted_tokens_total")), "engine"),
    total(rate(_engine("pdctl_engine_drafted_tokens_total")), "engine"),
)


class _Names(NamedTuple):
    """What another kind of engine calls these. `dropped`: requests whose KV was dropped; "" if the kind tells none."""

    running: str
    waiting: str
    tokens: str
    kv: str
    dropped: str = ""


def _others(title: str, names: _Names) -> Row:
    """Engines of another kind, as they count themselves. One engine may have several series, of its ranks."""
    tokens = total(rate(_engine(names.tokens)), "engine")
    panels: tuple[Panel, ...] = (
        Panel("Running and waiting", "Requests.", "short",
              (_each(names.running, "{{engine}} running"), _each(names.waiting, "{{engine}} waiting"))),
        Panel("Tokens", "Tokens generated per second.", "short", (Query(tokens, "{{engine}}"),)),
        Panel("KV in use", "Part of the KV cache in use.", "percentunit", (_each(names.kv),), red_from=0.95),
    )  # fmt: skip
    if names.dropped:
        about = "Requests whose KV was dropped to make room."
        panels += (Panel("Preemptions", about, "short", (_rates(names.dropped),)),)
    return Row(title, panels)


ENGINES = Dashboard(
    uid="pdctl-engines",
    title="pdctl: engines",
    about="Load, KV and speed of each engine.",
    by_engine="pdctl_proxy_engine_healthy",
    rows=(
        Row("As the proxy sees them", (
            Panel("Available", "1 if the engine answers its probes.", "none",
                  (_each("pdctl_proxy_engine_healthy"),), kind="state-timeline", red_below=1),
            Panel("Calls in progress", "Calls of the proxy.", "short", (_each("pdctl_proxy_engine_requests"),)),
        )),
        Row("Builtin engines", (
            Panel("Running", "Requests being computed.", "short", (_each("pdctl_engine_requests_running"),)),
            Panel("Waiting", "Requests that wait for blocks or budget.", "short",
                  (_each("pdctl_engine_requests_waiting"),)),
            Panel("Tokens", "Tokens generated per second.", "short", (_rates("pdctl_engine_tokens_total"),)),
            Panel("KV in use", "Part of the blocks that are not free.", "percentunit", (Query(_KV_USED, "{{engine}}"),),
                  red_from=0.95),
            Panel("Prefix cache", "Part of the prompts' tokens whose KV was there already.", "percentunit",
                  (Query(_HITS, "{{engine}}"),)),
            Panel("Accepted guesses", "Part of the guessed tokens that were right.", "percentunit",
                  (Query(_ACCEPTED, "{{engine}}"),)),
            Panel("Steps", "Steps per second, by kind.", "short",
                  (_rates("pdctl_engine_steps_total", "{{engine}} {{kind}}"),)),
            Panel("Error of predicted steps", "Mean relative error of the latency model.", "percentunit",
                  (Query(_ERROR, "{{engine}} {{kind}}"),), red_from=0.5),
        )),
        _others("vLLM engines", _Names(
            "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:generation_tokens_total",
            "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total",
        )),
        _others("SGLang engines", _Names(
            "sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:generation_tokens_total",
            "sglang:token_usage",
        )),
        _others("LMDeploy engines", _Names(
            "lmdeploy:num_requests_running", "lmdeploy:num_requests_waiting", "lmdeploy:generation_tokens_total",
            "lmdeploy:gpu_cache_usage_perc",
        )),
    ),
)  # fmt: skip

_PAIR = "{{prefill}} to {{decode}}"
_MEAN = ratio(
    total(rate(metric("pdctl_proxy_hand_over_seconds_total")), "prefill", "decode"),
    total(rate(metric("pdctl_proxy_hand_overs_total")), "prefill", "decode"),
)

KV = Dashboard(
    uid="pdctl-kv",
    title="pdctl: KV hand-over",
    about="How KV moves from prefill to decode engines, and whether any of it is left behind.",
    by_engine="pdctl_proxy_engine_healthy",
    rows=(
        Row("Promises", (
            _stat("Leaked", "KV blocks times seconds held for holders that are gone. It must stay 0.", "short",
                  (Query(f"{total(metric('pdctl_engine_block_seconds_total', what='leaked'))}", ""),), red_from=1e-9),
            _stat("Quarantined", "Blocks that a late transfer may still write to.", "short",
                  (Query(total(metric("pdctl_engine_blocks_quarantined")), ""),), red_from=1),
            _stat("Links in fallback", "Pairs whose KV does not use the configured protocol.", "short",
                  (Query(total(metric("pdctl_link_fallback")), ""),), red_from=1),
            _stat("Lost", "Hand-overs lost and prefilled again.", "short",
                  (Query(total(f"increase({metric('pdctl_engine_pulls_lost_total')}[$__range])"), ""),), red_from=1),
        )),
        Row("Hand-overs", (
            Panel("Hand-overs", "Requests decoded from handed-over KV.", "reqps",
                  (_per_second("pdctl_proxy_hand_overs_total", _PAIR, "prefill", "decode"),), stacked=True),
            Panel("Bytes", "KV handed over.", "Bps",
                  (_per_second("pdctl_proxy_hand_over_bytes_total", _PAIR, "prefill", "decode"),), stacked=True),
            Panel("Time of a hand-over", "Mean time that a decode engine spends fetching KV.", "s",
                  (Query(_MEAN, _PAIR),)),
            Panel("Speed of the links", "Over the last 16 transfers.", "Bps",
                  (Query(metric("pdctl_link_bytes_per_second"), _PAIR),)),
            Panel("Links", "How KV moves between each pair.", "none",
                  (Query(metric("pdctl_link_up"), ""),), kind="table"),
            Panel("Where prompts are computed", "By a prefill engine (remote), or inline by a decode engine, and why.",
                  "reqps", (_per_second("pdctl_proxy_prompts_placed_total", "{{why}}", "why"),), stacked=True),
        )),
        Row("Leases", (
            Panel("Leased blocks", "Blocks held for decode engines.", "short", (_each("pdctl_engine_blocks_leased"),)),
            Panel("Leases ended", "How leases end: all but committed are failures or cancellations.", "short",
                  (_per_second("pdctl_engine_leases_ended_total", "{{how}}", "how"),), stacked=True),
            Panel("Held back", "Prefills that wait because leases hold too many blocks.", "short",
                  (_each("pdctl_engine_requests_held_back"),)),
            Panel("Reserved", "Blocks of decode engines that wait for KV.", "short",
                  (_each("pdctl_engine_blocks_reserved"),)),
        )),
    ),
)  # fmt: skip

_PORT = "{{device}}:{{port}}"


def _events(*counters: str) -> tuple[Query, ...]:
    found = rate(metric("pdctl_rdma_events_total", counter=f"~{'|'.join(counters)}"))
    return (Query(found, f"{_PORT} {{{{counter}}}}"),)


RDMA = Dashboard(
    uid="pdctl-rdma",
    title="pdctl: RDMA",
    about="The machine's RDMA ports: state, traffic, errors and congestion. Empty without RDMA devices.",
    rows=(
        Row("Ports", (
            Panel("Active", "1 if the port is ACTIVE.", "none",
                  (Query(metric("pdctl_rdma_port_active"), _PORT),), kind="state-timeline", red_below=1),
            Panel("Nominal rate", "A port that trained at a lower rate shows here.", "Bps",
                  (Query(metric("pdctl_rdma_port_bytes_per_second"), _PORT),)),
            Panel("Received", "Bytes per second.", "Bps",
                  (Query(rate(metric("pdctl_rdma_received_bytes_total")), _PORT),)),
            Panel("Sent", "Bytes per second.", "Bps", (Query(rate(metric("pdctl_rdma_sent_bytes_total")), _PORT),)),
        )),
        Row("Errors", (
            Panel("Bit errors and link failures", "Cables and transceivers.", "short",
                  _events("symbol_error", "link_downed", "link_error_recovery", "local_link_integrity_errors",
                          "port_rcv_errors")),
            Panel("Retries", "Peers that are late or gone.", "short",
                  _events("local_ack_timeout_err", "rnr_nak_retry_err", "req_transport_retries_exceeded",
                          "req_rnr_retries_exceeded")),
            Panel("Out of sequence", "Packets lost or reordered.", "short",
                  _events("out_of_sequence", "packet_seq_err", "implied_nak_seq_err", "duplicate_request")),
            Panel("Congestion", "Packets dropped or slowed down.", "short",
                  _events("port_xmit_discards", "port_xmit_wait", "np_cnp_sent", "rp_cnp_handled",
                          "roce_slow_restart")),
        )),
    ),
)  # fmt: skip

ALL = (OVERVIEW, ENGINES, KV, RDMA)
