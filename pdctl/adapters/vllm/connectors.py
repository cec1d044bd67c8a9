"""vLLM's KV connectors: how each is configured, and which ports it opens."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.topology.spec import Device, Role


@dataclass(frozen=True, slots=True)
class Connector:
    """One connector. `name`: vLLM's; `pulls`: decode gets a hand-over from prefill's answer and reads the KV from
    prefill, else prefill puts it into a store and decode gets it from there. `store`: the kind of store that it uses,
    or ""; `store_variable`: the variable that names its configuration file; `needs_store`: it does nothing without.

    `side_channel`: the purpose of the port that it opens, "" for none; `port_variable`, `host_variable`: the variables
    with its port and address. `needs_equal_hashes`: the engines name blocks by Python's hash.
    """

    name: str
    pulls: bool
    side_channel: str = ""
    port_variable: str = ""
    host_variable: str = ""
    needs_equal_hashes: bool = False
    store: str = ""
    store_variable: str = ""
    needs_store: bool = False


_LMCACHE, _MOONCAKE = ("lmcache", "LMCACHE_CONFIG_FILE"), ("mooncake", "MOONCAKE_CONFIG_PATH")

CONNECTORS = {
    "nixl": Connector(
        "NixlConnector", True, "side-channel", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST"
    ),
    "lmcache": Connector("LMCacheConnectorV1", False, "", "", "", True, *_LMCACHE, needs_store=True),
    "mooncake-store": Connector("MooncakeStoreConnector", False, "", "", "", True, *_MOONCAKE, needs_store=True),
    "nixl+lmcache": Connector(
        "MultiConnector", True, "side-channel", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST",
        True, *_LMCACHE,
    ),
    "nixl+mooncake-store": Connector(
        "MultiConnector", True, "side-channel", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST",
        True, *_MOONCAKE, needs_store=True,
    ),
}  # fmt: skip
_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer", Role.HYBRID: "kv_both"}


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a connector's configuration depends on. `lease_s`: whole seconds that prefill keeps KV without a heartbeat;
    `namespace`: the same only for engines with interchangeable KV."""

    role: Role
    device: Device
    lease_s: int
    namespace: str


def transfer_config(connector: str, exchange: Exchange) -> dict[str, object]:
    """The value of --kv-transfer-config."""
    role = exchange.role
    if "+" in connector:
        parts = [transfer_config(part, exchange) for part in connector.split("+")]
        return {
            "kv_connector": "MultiConnector",
            "kv_role": _ROLES[role],
            "kv_connector_extra_config": {"connectors": parts},
        }
    found: dict[str, object] = {"kv_connector": CONNECTORS[connector].name, "kv_role": _ROLES[role]}
    if connector == "nixl":
        # "fail": a request whose KV cannot be read ends with an error, and pdctl prefills it again elsewhere.
        found |= {
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"kv_lease_duration": exchange.lease_s},
        }
        if exchange.device is Device.CPU:
            found["kv_buffer_device"] = "cpu"
    elif connector == "mooncake-store":
        # "recompute": what the store has lost is computed again. The lookup of keys must not hold up running requests
        # while the store does not answer. vLLM's keys name the model only by the last part of its path.
        extra = {"lookup_async": True, "cache_prefix": exchange.namespace}
        found |= {"kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}
    return found
