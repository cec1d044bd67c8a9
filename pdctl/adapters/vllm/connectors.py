"""vLLM's KV connectors: how each is configured, and which ports it opens."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.topology.spec import Device, Role


@dataclass(frozen=True, slots=True)
class Connector:
    """One connector. `name`: vLLM's; `pulls`: decode gets a hand-over from prefill's answer and reads the KV from
    prefill, else both use a store.

    `side_channel`: the purpose of the port that it opens, "" for none; `port_variable`, `host_variable`: the variables
    with its port and address. `needs_equal_hashes`: the engines name blocks by Python's hash.
    """

    name: str
    pulls: bool
    side_channel: str = ""
    port_variable: str = ""
    host_variable: str = ""
    needs_equal_hashes: bool = False


CONNECTORS = {
    "nixl": Connector(
        "NixlConnector", True, "side-channel", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST"
    ),
    "lmcache": Connector("LMCacheConnectorV1", False, needs_equal_hashes=True),
    "mooncake-store": Connector("MooncakeStoreConnector", False, needs_equal_hashes=True),
    "nixl+lmcache": Connector(
        "MultiConnector", True, "side-channel", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST",
        needs_equal_hashes=True,
    ),
    "nixl+mooncake-store": Connector(
        "MultiConnector", True, "side-channel", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST",
        needs_equal_hashes=True,
    ),
}  # fmt: skip
_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer", Role.HYBRID: "kv_both"}


def transfer_config(connector: str, role: Role, lease_s: int, device: Device) -> dict[str, object]:
    """The value of --kv-transfer-config. `lease_s`: whole seconds that prefill keeps KV without a heartbeat."""
    if "+" in connector:
        parts = [transfer_config(part, role, lease_s, device) for part in connector.split("+")]
        return {
            "kv_connector": "MultiConnector",
            "kv_role": _ROLES[role],
            "kv_connector_extra_config": {"connectors": parts},
        }
    found: dict[str, object] = {"kv_connector": CONNECTORS[connector].name, "kv_role": _ROLES[role]}
    if connector == "nixl":
        # "fail": a request whose KV cannot be read ends with an error, and pdctl prefills it again elsewhere.
        found |= {"kv_load_failure_policy": "fail", "kv_connector_extra_config": {"kv_lease_duration": lease_s}}
        if device is Device.CPU:
            found["kv_buffer_device"] = "cpu"
    return found
