"""The keys of a topology file, with the check and the default of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pdctl.adapters import kinds
from pdctl.attention_names import ATTENTION_NAMES
from pdctl.net import LOOPBACK_PORT
from pdctl.parser_names import REASONING_PARSERS, TOOL_PARSERS
from pdctl.policy_names import KV_EVENTS, POLICY_NAMES
from pdctl.speculative import Speculative
from pdctl.stores import store_kinds
from pdctl.topology.spec import Device, Role
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
LAUNCHERS = ("none", "ray")
TRANSFER_PROTOCOLS = ("auto", "tcp", "rdma")

# Returns what is wrong with a value ("must be ..."), or None.
Check = Callable[[object], str | None]


@dataclass(frozen=True, slots=True)
class Key:
    """One key. If `default` is None and `required` is False, the loader derives the value."""

    check: Check
    default: object = None
    required: bool = False


def text(pattern: str = r".+", what: str = "a non-empty string") -> Check:
    """A string that matches the pattern completely."""
    compiled = re.compile(pattern)

    def check(value: object) -> str | None:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            return f"must be {what}"
        return _unusable(value)

    return check


# Limits of the kernel for a file name and for a path, in bytes.
_NAME_MAX, _PATH_MAX = 255, 4095


def _unusable(value: str) -> str | None:
    """Why a string cannot be used, or None. Many strings become paths or environment variables."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        return "must have no control characters"
    data = value.encode()
    if len(data) > _PATH_MAX or max(map(len, data.split(b"/"))) > _NAME_MAX:
        return f"must have at most {_PATH_MAX} bytes, {_NAME_MAX} between slashes"
    return None


def choice(*values: str) -> Check:
    """One of the given words."""
    listed = ", ".join(values)
    return lambda value: None if isinstance(value, str) and value in values else f"must be one of: {listed}"


def speculative() -> Check:
    """Settings of speculative decoding."""
    example = 'must be a table such as { kind = "ngram", tokens = 4 }'

    def check(value: object) -> str | None:
        try:
            found = msgspec.convert(value, Speculative)
        except msgspec.ValidationError as failure:
            return f"{example} ({failure})"
        return f"{example} ({found.wrong})" if found.wrong else None

    return check


def integer(low: int, high: int = 2**31) -> Check:
    """A whole number within bounds. TOML's true and false are not numbers."""
    # `type() is int`, because bool is a subclass of int.
    what = f"must be a whole number from {low} to {high}" if high < 2**31 else f"must be a whole number, at least {low}"
    return lambda value: None if type(value) is int and low <= value <= high else what


def choices(*values: str) -> Check:
    """A list of one or more of the given words."""
    listed = ", ".join(values)

    def check(value: object) -> str | None:
        good = isinstance(value, list) and value and all(isinstance(item, str) and item in values for item in value)
        return None if good else f"must be a list of one or more of: {listed}"

    return check


def strings() -> Check:
    """A table of strings: environment variables."""

    def check(value: object) -> str | None:
        good = isinstance(value, dict) and all(isinstance(item, str) and "\0" not in item for item in value.values())
        if not good or not isinstance(value, dict):
            return 'must be a table of strings, such as { NCCL_DEBUG = "WARN" }'
        taken = next((name for name in value if not _ENV_NAME.fullmatch(name)), None)
        if taken is not None:
            return f"sets {taken!r}, which is not a valid variable name"
        taken = next((name for name in value if name.startswith("PDCTL_")), None)
        return None if taken is None else f"sets {taken!r}, which is reserved for pdctl"

    return check


def number(above: float, most: float = 1e9) -> Check:
    """A number greater than `above`, at most `most`. A negative `above` allows 0."""
    what = f"must be a number greater than {above:g}" if above >= 0 else "must be a number, at least 0"
    what += f" and at most {most:.15g}" if most < 1e9 else ""
    # The largest negative float: `low < value` then allows 0, but no negative number.
    low = above if above >= 0 else -5e-324
    return lambda value: None if type(value) in (int, float) and low < float(str(value)) <= most else what


def boolean() -> Check:
    """A boolean."""
    return lambda value: None if isinstance(value, bool) else "must be true or false"


def switch() -> Check:
    """True, false, or the engine's own choice."""
    return lambda value: None if isinstance(value, bool) or value == "auto" else 'must be "auto", true or false'


def indices(what: str) -> Check:
    """A list of distinct device numbers."""

    def check(value: object) -> str | None:
        good = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        if not good or not isinstance(value, list):
            return f"must be a list of {what} numbers, such as [0, 1]"
        return None if len(set(value)) == len(value) else f"names a {what} twice"

    return check


def gpu_names() -> Check:
    """A list of distinct GPUs: driver indices, UUIDs (or prefixes of them), MIG slices."""

    def check(value: object) -> str | None:
        if not isinstance(value, list) or not all(_is_gpu(item) for item in value):
            return 'must be a list of GPUs: indices, such as 0, or names, such as "GPU-8932f937" or "MIG-..."'
        return None if len(set(value)) == len(value) else "names a GPU twice"

    return check


def _is_gpu(item: object) -> bool:
    return (type(item) is int and item >= 0) or (isinstance(item, str) and item.startswith(("GPU-", "MIG-")))


def texts(what: str) -> Check:
    """A list of distinct names."""

    def check(value: object) -> str | None:
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            return f"must be a list of {what} names"
        if (reason := next(filter(None, map(_unusable, value)), None)) is not None:
            return f"each name {reason}"
        return None if len(set(value)) == len(value) else f"names a {what} twice"

    return check


def port_range(least: int) -> Check:
    """[first, last] with at least `least` ports; an empty list for any port."""

    def check(value: object) -> str | None:
        if value == []:
            return None
        good = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
        if not good or not isinstance(value, list) or not 1024 <= value[0] <= value[1] - least + 1 <= 65536 - least:
            return f"must be [first, last] from 1024 to 65535, at least {least} ports"
        return None

    return check


def arguments(example: str = '["--max-num-seqs", "64"]', least: int = 0) -> Check:
    """A list of command line arguments. The same one may occur twice."""

    def check(value: object) -> str | None:
        good = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        if not good or not isinstance(value, list) or len(value) < least:
            return f"must be a list of strings, such as {example}"
        return next(filter(None, map(_unusable, value)), None)

    return check


def port_names() -> Check:
    """A list of the purposes of ports, each with a number if pdctl must not choose it."""

    def check(value: object) -> str | None:
        if not isinstance(value, list) or not all(isinstance(item, str) and _PORT.fullmatch(item) for item in value):
            return 'must be a list of purposes, such as ["http"], or ["http:9100"] for a certain port'
        numbers = [int(number) for item in value if (number := item.partition(":")[2])]
        if any(not 1 <= number <= 65535 for number in numbers):
            return "must have port numbers from 1 to 65535"
        purposes = [item.partition(":")[0] for item in value]
        is_distinct = len(set(purposes)) == len(purposes) and len(set(numbers)) == len(numbers)
        return None if is_distinct else "names a port twice"

    return check


_PORT = re.compile(r"[a-z][a-z0-9-]{0,31}(:[0-9]{1,5})?")
_ENV_NAME = re.compile(r"[^=\0]+")
_HTTP = r"https?://[A-Za-z0-9.\[\]:-]+(/\S*)?"
_URL = r"http://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}/?"
_NAME = r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?"
_NAME_WORDS = "lower-case letters, digits and inner dashes, at most 40"

TABLES: dict[str, dict[str, Key]] = {
    "service": {
        "name": Key(text(_NAME, _NAME_WORDS), "pdctl"),
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
    "name": Key(text(_NAME, _NAME_WORDS), required=True),
    "role": Key(choice(*(role.value for role in Role)), required=True),
    "kind": Key(choice(*kinds()), "builtin"),
    "url": Key(text(_URL, "an address such as http://10.0.0.7:8100")),
    "secret_file": Key(text()),
    "bootstrap_port": Key(integer(1, 65535), 0),
    "replicas": Key(integer(1, 256), 1),
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
    "kv_events": Key(choice(*KV_EVENTS), "off"),
    "policy": Key(choice(*POLICY_NAMES), "fcfs"),
    "inline_prefill": Key(boolean(), True),
    "attention": Key(choice(*ATTENTION_NAMES), "auto"),
    "enforce_eager": Key(boolean(), False),
    "schedule_ahead": Key(switch(), "auto"),
    "speculative": Key(speculative()),
    "ready": Key(text(r"tcp|http:/\S*|log:.+", "tcp, http:/PATH or log:PATTERN")),
    "restart_with": Key(texts("group"), []),
    "env": Key(strings(), {}),
    "python": Key(text()),
    "args": Key(arguments(), []),
    "tensor_parallel": Key(integer(1, 64), 1),
    "pipeline_parallel": Key(integer(1, 64), 1),
    "data_parallel": Key(integer(1, 64), 1),
    "dtype": Key(choice("auto", "float16", "bfloat16", "float32"), "auto"),
    "quantization": Key(text()),
    "gpu_memory_utilization": Key(number(0, 1), 0.0),
    "connector": Key(text()),
    "store": Key(text(_NAME, _NAME_WORDS)),
    "depends_on": Key(texts("process"), []),
    "process": Key(text(_NAME, _NAME_WORDS)),
}
_PROBES = r"tcp|http:/\S*"
COMMAND: dict[str, Key] = {
    "name": Key(text(_NAME, _NAME_WORDS), required=True),
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
    "name": Key(text(_NAME, _NAME_WORDS), required=True),
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
