"""The transports that move KV between engines, and the properties of each. No torch import: topology, plan and doctor
use this module too.

To add one: a row here, and a module of its name in pdctl/engine/transfer/.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransportInfo:
    """One transport.

    `crosses_hosts`: it reads from other machines; protocol and devices are configurable. `takes_ports`: it can be
    limited to a range of ports. `is_open_to_strangers`: without authentication; any client that reaches its ports can
    read the KV. `reads_per_peer`: number of concurrent reads from one peer that is still faster than fewer.
    `environment`: prefix of the environment variables of its library. `on_gpu`: it reads and writes pools in the memory
    of GPUs. `may_be_on_gpu`: it does so where its library and the network can, and else has a copy in host memory.
    """

    crosses_hosts: bool
    takes_ports: bool = False
    is_open_to_strangers: bool = False
    reads_per_peer: int = 2
    environment: str = ""
    on_gpu: bool = False
    may_be_on_gpu: bool = False


TRANSPORTS = {
    "cuda_ipc": TransportInfo(crosses_hosts=False, reads_per_peer=1, on_gpu=True),
    "shm": TransportInfo(crosses_hosts=False, reads_per_peer=1),
    "mooncake": TransportInfo(
        crosses_hosts=True, takes_ports=True, is_open_to_strangers=True, environment="MC_", may_be_on_gpu=True
    ),
    "nixl": TransportInfo(crosses_hosts=True, environment="UCX_"),
}  # fmt: skip
# `auto` uses the first one that both sides have: NEAR on one host, FAR between hosts.
NEAR = ("cuda_ipc", "shm", "nixl", "mooncake")
FAR = ("mooncake", "nixl")
