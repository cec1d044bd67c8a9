"""Command line of LMCache's server, and the configuration file of engines that use it."""

from __future__ import annotations

import json

from pdctl.stores.launcher import Reader, StoreClient, StoreLaunch, StorePlace, config_path
from pdctl.topology.spec import Store


class LmcacheLauncher:
    """See StoreLauncher."""

    settings = frozenset({"buffer_gb", "chunk_tokens"})
    distributions = ("lmcache",)
    requirement = "lmcache"

    def ports(self, store: Store) -> tuple[str, ...]:
        """See StoreLauncher.ports."""
        return ("store",)

    def launch(self, place: StorePlace) -> StoreLaunch:
        """See StoreLauncher.launch."""
        port = place.ports["store"]
        argv = (place.python, "-m", "lmcache.v1.server", place.host, str(port), "cpu", *place.store.args)
        return StoreLaunch(argv, {}, ready=f"tcp:{place.host}:{port}", alive=f"tcp:{place.host}:{port}")

    def client(self, place: StorePlace, reader: Reader) -> StoreClient:
        """See StoreLauncher.client."""
        path = config_path(reader, "lmcache.yaml")
        config = {
            "chunk_size": place.store.chunk_tokens,
            "local_cpu": False,
            "max_local_cpu_size": place.store.buffer_gb,
            "remote_url": f"lm://{place.host}:{place.ports['store']}",
            "remote_serde": "naive",
        }
        # JSON is YAML.
        return StoreClient({"LMCACHE_CONFIG_FILE": path}, {path: json.dumps(config, indent=1) + "\n"})


LAUNCHER = LmcacheLauncher()
