"""The keys of a topology file, with the check and the default of each."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.adapters import kinds
from pdctl.names.attention import ATTENTION_NAMES
from pdctl.names.parsers import REASONING_PARSERS, TOOL_PARSERS
from pdctl.names.policies import KV_EVENTS, POLICY_NAMES
from pdctl.names.services import NAME, NAME_WORDS
from pdctl.net import LOOPBACK_PORT
from pdctl.stores import store_kinds
from pdctl.topology.spec import Device, Role
from pdctl.topology.values import (
    Check,
    arguments,
    boolean,
    choice,
    choices,
    gpu_names,
    indices,
    integer,
    number,
    port_names,
    port_range,
    speculative,
    strings,
    switch,
    text,
    texts,
)
from pdctl.transports import TRANSPORTS

ROUTINGS = (
    "min_expected_latency", "min_observed_latency", "prefix_aware", "random", "round_robin", "slo",
)  # fmt: skip
ADMISSIONS = ("queue", "slo")
ELASTIC_MODES = ("off", "advise", "act")
UNKNOWN_FIELDS = ("warn", "refuse")
STOP_SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
LINK_LAYERS = ("any", "infiniband", "ethernet")
ON_DEATH = ("terminate", "survive")
LAUNCHERS = ("none", "ray", "ssh")
TRANSFER_PROTOCOLS = ("auto", "tcp", "rdma")


@dataclass(frozen=True, slots=True)
class Key:
    """One key. If `default` is None and `required` is False, the loader derives the value."""

    check: Check
    default: object = None
    required: bool = False


_HTTP = r"https?://[A-Za-z0-9.\[\]:-]+(/\S*)?"
_URL = r"http://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}/?"

TABLES: dict[str, dict[str, Key]] = {
    "service": {
        "name": Key(text(NAME, NAME_WORDS), "pdctl"),
        "model": Key(text(), required=True),
        "served_model_name": Key(text()),
        "max_model_len": Key(integer(16, 1_048_576), 2048),
        "engine_ports": Key(port_range(1), []),
        "tool_parser": Key(choice(*TOOL_PARSERS), "auto"),
        "reasoning_parser": Key(choice(*REASONING_PARSERS), "auto"),
    },
    "proxy": {
        "host": Key(text(r"[A-Za-z0-9.:-]+", "an address or host name"), "127.0.0.1"),
        "port": Key(integer(1, 65535), 8000),
        "routing": Key(choice(*ROUTINGS), "min_expected_latency"),
        "cpus": Key(indices("CPU"), []),
        "nodes": Key(texts("node"), []),
        "workers": Key(integer(1, 64), 1),
        "admission": Key(choice(*ADMISSIONS), "queue"),
        "max_queue": Key(integer(0, 65536), 256),
        "max_body_mb": Key(number(0, 1024), 16.0),
        "unknown_fields": Key(choice(*UNKNOWN_FIELDS), "warn"),
        "api_keys": Key(text()),
        "tls_cert": Key(text()),
        "tls_key": Key(text()),
        "cors_origins": Key(texts("origin"), []),
        "access_log": Key(text()),
        "otlp_endpoint": Key(text(_HTTP, "an address such as http://127.0.0.1:4318")),
        "accept_nodes": Key(boolean(), False),
        "node_keys": Key(text()),
        "node_away_s": Key(number(0, 86400), 90.0),
        "takeover": Key(boolean(), False),
        "takeover_slots": Key(integer(1, 65536), 512),
    },
    "slo": {"ttft_ms": Key(number(0), 2000.0), "tpot_ms": Key(number(0), 200.0)},
    "elastic": {
        "mode": Key(choice(*ELASTIC_MODES), "off"),
        "min_prefill": Key(integer(0, 256), 1),
        "min_decode": Key(integer(0, 256), 1),
        "interval_s": Key(number(0.1, 3600), 2.0),
        "cooldown_s": Key(number(0, 86400), 30.0),
    },
    "cluster": {
        "etcd": Key(texts("address"), required=True),
        "interface": Key(text(), required=True),
        "secret_file": Key(text(), required=True),
        "certificates": Key(text()),
        "etcd_user": Key(text()),
        "etcd_password_file": Key(text()),
        "launcher": Key(choice(*LAUNCHERS), "none"),
        "agent_port": Key(integer(1, 65535), 18090),
        "ttl_s": Key(integer(2, 3600), 5),
        "node_lost_s": Key(number(0, 86400), 60.0),
        "spare_nodes": Key(integer(0, 64), 0),
        "cells": Key(texts("cell"), []),
        "ssh_nodes": Key(texts("node"), []),
        "ray_address": Key(text()),
        "ray_token_file": Key(text()),
        "ray_allow_commands": Key(boolean(), False),
    },
    "dashboard": {"listen": Key(text(LOOPBACK_PORT, "a loopback address and a port, such as 127.0.0.1:8099"), "")},
    "transfer": {
        "backend": Key(choice("auto", *TRANSPORTS), "auto"),
        "protocol": Key(choice(*TRANSFER_PROTOCOLS), "auto"),
        "devices": Key(texts("RDMA device"), []),
        "ports": Key(port_range(100), []),
        "lease_s": Key(number(0.5, 3600), 30.0),
        "read_s": Key(number(0, 3600), 5.0),
        "leased_max": Key(number(0, 1), 0.75),
        "chunked": Key(boolean(), True),
    },
    "expect": {
        "rate_gbps": Key(number(-1, 10_000), 0.0),
        "link_layer": Key(choice(*LINK_LAYERS), "any"),
        "mtu": Key(integer(0, 4096), 0),
        "gid_index": Key(integer(-1, 65535), -1),
    },
    "supervisor": {
        "grace_s": Key(number(0, 3600), 30.0),
        "stop_signals": Key(choices(*STOP_SIGNALS), ["SIGTERM"]),
        "drain_s": Key(number(-1, 86400), 60.0),
        "max_restarts": Key(integer(0, 1000), 5),
        "within_s": Key(number(0, 86400), 120.0),
        "startup_s": Key(number(0, 86400), 1800.0),
        "stable_s": Key(number(0, 86400), 60.0),
        "liveness_s": Key(number(-1, 3600), 5.0),
        "liveness_failures": Key(integer(1, 100), 3),
        "progress_s": Key(number(-1, 86400), 60.0),
        "functional_s": Key(number(-1, 86400), 0.0),
        "on_supervisor_death": Key(choice(*ON_DEATH), "terminate"),
        "log_mb": Key(number(0, 1_048_576), 64.0),
    },
}

ENGINE: dict[str, Key] = {
    "name": Key(text(NAME, NAME_WORDS), required=True),
    "role": Key(choice(*(role.value for role in Role)), required=True),
    "kind": Key(choice(*kinds()), "builtin"),
    "url": Key(text(_URL, "an address such as http://10.0.0.7:8100")),
    "secret_file": Key(text()),
    "bootstrap_port": Key(integer(1, 65535), 0),
    "replicas": Key(integer(1, 10_000), 1),
    "nodes": Key(texts("node"), []),
    "device": Key(choice(*(device.value for device in Device))),
    "gpus": Key(gpu_names(), []),
    "share_gpu": Key(boolean(), False),
    "open": Key(boolean(), False),
    "cpus": Key(indices("CPU"), []),
    "max_num_seqs": Key(integer(1, 4096), 16),
    "max_num_batched_tokens": Key(integer(16, 1_048_576), 512),
    "kv_cache_gb": Key(number(0, 4096), 1.0),
    "block_size": Key(integer(1, 1024), 16),
    "prefix_caching": Key(boolean(), True),
    "deterministic": Key(boolean(), False),
    "prefix_quota": Key(number(0, 1), 1.0),
    "kv_offload_gb": Key(number(-1, 65536), 0.0),
    "kv_events": Key(choice(*KV_EVENTS), "off"),
    "policy": Key(choice(*POLICY_NAMES), "fcfs"),
    "inline_prefill": Key(boolean(), True),
    "attention": Key(choice(*ATTENTION_NAMES), "auto"),
    "enforce_eager": Key(boolean(), False),
    "schedule_ahead": Key(switch(), "auto"),
    "fetch_prefixes": Key(switch(), False),
    "speculative": Key(speculative()),
    "ready": Key(text(r"tcp|http:/\S*|log:.+", "tcp, http:/PATH or log:PATTERN")),
    "restart_with": Key(texts("group"), []),
    "env": Key(strings(), {}),
    "python": Key(text()),
    "args": Key(arguments(), []),
    "tensor_parallel": Key(integer(1, 64), 1),
    "pipeline_parallel": Key(integer(1, 64), 1),
    "data_parallel": Key(integer(1, 64), 1),
    "sequence_parallel": Key(integer(1, 64), 1),
    "dtype": Key(choice("auto", "float16", "bfloat16", "float32"), "auto"),
    "quantization": Key(text()),
    "gpu_memory_utilization": Key(number(0, 1), 0.0),
    "connector": Key(text()),
    "store": Key(text(NAME, NAME_WORDS)),
    "depends_on": Key(texts("process"), []),
    "process": Key(text(NAME, NAME_WORDS)),
}
_PROBES = r"tcp|http:/\S*"
COMMAND: dict[str, Key] = {
    "name": Key(text(NAME, NAME_WORDS), required=True),
    "command": Key(arguments('["node_exporter", "--web.listen-address=127.0.0.1:{port}"]', least=1), required=True),
    "ports": Key(port_names(), []),
    "ready": Key(text(rf"{_PROBES}|log:.+|none", "tcp, http:/PATH, log:PATTERN or none")),
    "alive": Key(text(rf"{_PROBES}|none", "tcp, http:/PATH or none")),
    "gpus": Key(gpu_names(), []),
    "share_gpu": Key(boolean(), False),
    "cpus": Key(indices("CPU"), []),
    "env": Key(strings(), {}),
    "depends_on": Key(texts("process"), []),
    "restart_with": Key(texts("group"), []),
}
STORE: dict[str, Key] = {
    "name": Key(text(NAME, NAME_WORDS), required=True),
    "kind": Key(choice(*store_kinds()), required=True),
    "python": Key(text()),
    "args": Key(arguments('["--eviction_ratio=0.1"]'), []),
    "env": Key(strings(), {}),
    "cpus": Key(indices("CPU"), []),
    "data_dir": Key(text()),
    "segment_gb": Key(number(0, 65536), 4.0),
    "buffer_gb": Key(number(0, 65536), 1.0),
    "metadata": Key(choice("p2p", "http"), "p2p"),
    "chunk_tokens": Key(integer(16, 65536), 256),
}
API_KEY: dict[str, Key] = {
    "name": Key(text(r"[A-Za-z0-9._-]{1,64}|\*", "the name of an API key, or * for every other key"), required=True),
    "weight": Key(number(0, 1e6), 1.0),
    "requests_per_minute": Key(integer(0), 0),
    "tokens_per_minute": Key(integer(0), 0),
    "streams": Key(integer(0), 0),
    "priority": Key(integer(-1000, 1000), 0),
}
# Tables that occur more than once.
LISTS: dict[str, dict[str, Key]] = {"engines": ENGINE, "processes": COMMAND, "stores": STORE, "keys": API_KEY}
# Keys with an effect on engines of every kind that pdctl starts; each kind has more (Launcher.settings).
EVERY_KIND = frozenset(
    {
        "name", "role", "kind", "replicas", "nodes", "device", "gpus", "share_gpu", "cpus", "ready", "restart_with",
        "env", "depends_on",
    }
)  # fmt: skip
# Keys with an effect on stores of every kind; each kind has more (StoreLauncher.settings).
EVERY_STORE = frozenset({"name", "kind", "python", "args", "env", "cpus"})
# Keys of an attached engine. pdctl does not start it, so other keys would have no effect.
ATTACHED = ("name", "role", "kind", "url", "process", "secret_file", "connector", "bootstrap_port")
