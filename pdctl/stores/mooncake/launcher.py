"""Command line of `mooncake_master`, and the file from which engines learn its address."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pdctl.stores.launcher import Reader, StoreClient, StoreLaunch, StorePlace, config_path
from pdctl.topology.spec import Store

# Mooncake's word for engines that find each other through the master alone.
_PEER_TO_PEER = "P2PHANDSHAKE"


class MooncakeLauncher:
    """See StoreLauncher."""

    settings = frozenset({"data_dir", "segment_gb", "buffer_gb", "metadata"})
    distributions = ("mooncake-transfer-engine", "mooncake-transfer-engine-cuda13", "mooncake-transfer-engine-non-cuda")
    requirement = "mooncake-transfer-engine"

    def ports(self, store: Store) -> tuple[str, ...]:
        """See StoreLauncher.ports."""
        return ("rpc", "metrics", *(("metadata",) if store.metadata == "http" else ()))

    def launch(self, place: StorePlace) -> StoreLaunch:
        """See StoreLauncher.launch. Its command replaces itself by the server, so the process is the server."""
        argv = (place.python, "-m", "mooncake.cli", *_flags(place), *place.store.args)
        health = f"http://{place.host}:{place.ports['metrics']}/health"
        return StoreLaunch(argv, {}, ready=health, alive=health)

    def client(self, place: StorePlace, reader: Reader) -> StoreClient:
        """See StoreLauncher.client."""
        transfer, path = reader.transfer, config_path(reader, "mooncake.json")
        protocol = transfer.protocol if transfer.protocol != "auto" else "rdma" if reader.rdma else "tcp"
        config = {
            "metadata_server": _metadata(place),
            "master_server_address": f"{place.host}:{place.ports['rpc']}",
            "protocol": protocol,
            "device_name": ",".join(reader.rdma) if protocol == "rdma" else "",
            "global_segment_size": int(place.store.segment_gb * 2**30),
            "local_buffer_size": int(place.store.buffer_gb * 2**30),
        }
        # Without this variable, an engine gives others the address of its default route.
        env = {"MOONCAKE_CONFIG_PATH": path, "MOONCAKE_REQUESTER_LOCAL_HOSTNAME": reader.host}
        return StoreClient(env, {path: json.dumps(config, indent=1) + "\n"})


def _flags(place: StorePlace) -> Iterator[str]:
    yield f"--rpc_address={place.host}"
    yield f"--rpc_port={place.ports['rpc']}"
    yield f"--metrics_host={place.host}"
    yield f"--metrics_port={place.ports['metrics']}"
    yield "--logtostderr=true"
    if "metadata" in place.ports:
        yield "--enable_http_metadata_server=true"
        yield f"--http_metadata_server_host={place.host}"
        yield f"--http_metadata_server_port={place.ports['metadata']}"
    if place.store.data_dir:
        yield f"--root_fs_dir={place.store.data_dir}"


def _metadata(place: StorePlace) -> str:
    if "metadata" not in place.ports:
        return _PEER_TO_PEER
    return f"http://{place.host}:{place.ports['metadata']}/metadata"


LAUNCHER = MooncakeLauncher()
