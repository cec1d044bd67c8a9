"""Every check by its id: what it means, when it fires, where the threshold comes from, what it was tested with.

`pdctl doctor --list` prints this; docs/doctor.md holds the same table. Evidence: *real tool*, compared with Debian's;
*stub*, NVIDIA's real binding over a stub library; *tree*, a fake sysfs or proc tree makes it fire and another does not;
*recorded*, kernel messages as others have published them; *planted*, a test plants the fact; *this machine*, seen where
it was built. No check has been seen on RDMA hardware or on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """`severity`: at worst; `fires`: when; `source`: of the threshold, "" where there is none to choose."""

    id: str
    area: str
    severity: str
    fires: str
    source: str
    fix: str
    evidence: str


CHECKS = (
    Check("rdma.none", "rdma", "info; critical where asked for",
          "the kernel has no RDMA support, or there is no device",
          "", "modprobe, or look at lspci", "tree, this machine"),
    Check("port.gone", "rdma", "critical", "a device that the topology names is not there; a name without a device",
          "NVSentinel", "correct the name; lspci, dmesg", "tree"),
    Check("port.chardev", "rdma", "critical", "`/dev/infiniband/uverbsN` is missing or cannot be opened",
          "NVSentinel", "give the container the device; modprobe ib_uverbs", "tree"),
    Check("port.state", "rdma", "critical where asked for, else warning",
          "not ACTIVE; INIT and ARMED wait for a subnet "
          "manager", "gcm", "cable, switch port, opensm", "tree"),
    Check("port.lid", "rdma", "critical", "InfiniBand, up, and lid 0 or 0xffff, or no subnet manager", "IBTA", "opensm",
          "tree"),
    Check("port.rate", "rdma", "critical", "slower than `[expect] rate_gbps`, or than the median of its board",
          "NVSentinel", "cable, forced speed, breakout", "tree"),
    Check("port.link_layer", "rdma", "critical", "not `[expect] link_layer`", "", "mlxconfig", "tree"),
    Check("err.counters", "rdma", "warning when full, else info", "a narrow error counter is not zero",
          "widths: IBTA PMA", "watch whether it grows", "tree"),
    Check("roce.gid", "rdma", "critical", "no RoCE v2 GID with an address", "Mooncake guide", "ip addr add", "tree"),
    Check("roce.gid_index", "rdma", "critical", "`MC_`, `NCCL_IB_`, `UCX_IB_`, `NVSHMEM_IB_GID_INDEX` or `[expect] "
          "gid_index` at an empty or v1 slot", "Mooncake guide", "the index that is printed", "tree"),
    Check("roce.mtu", "rdma", "critical with a larger `MC_MTU`, else warning",
          "the RDMA MTU that the netdev leaves is below "
          "4096, `[expect] mtu` or `MC_MTU`", "kernel, iboe_get_mtu", "ip link set mtu 9000", "tree"),
    Check("fw.mix", "rdma", "warning", "devices of one board with different firmware", "gcm", "mlxfwmanager", "tree"),
    Check("link.flap", "rdma", "critical, warning",
          "since last time: `link_downed` grew; `carrier_changes` by more than "
          "2", "NVSentinel", "cable, transceiver", "tree"),
    Check("err.symbol", "rdma", "critical", "since last time: more than 9 symbol errors, and 120 an hour",
          "IBTA, BER 1e-12",
          "cable, transceiver", "tree"),
    Check("err.recovery", "rdma", "warning", "since last time: more than 5 link recoveries a minute", "NVSentinel",
          "cable, transceiver", "tree"),
    Check("err.integrity", "rdma", "critical", "since last time: link integrity errors or buffer overruns",
          "NVSentinel",
          "cable, flow control", "tree"),
    Check("err.rcv", "rdma", "warning", "since last time: more than 10 broken packets a second", "NVSentinel", "cable",
          "tree"),
    Check("err.discards", "rdma", "warning", "since last time: more than 100 discarded packets a second", "NVSentinel",
          "congestion, peer down", "tree"),
    Check("err.reset", "rdma", "info", "a counter is lower than last time", "", "", "tree"),
    Check("tx.retry", "rdma", "critical, warning",
          "since last time: retries exceeded; more than 1 late acknowledgement a "
          "second; receivers not ready", "NVSentinel", "the path to the peer", "tree"),
    Check("tx.oos", "rdma", "critical above 1e-4, warning above 1e-6",
          "since last time: part of packets out of sequence",
          "pdctl's own", "flow control, cables", "tree"),
    Check("roce.slow_restart", "rdma", "warning", "since last time: more than 10 slow restarts a second", "NVSentinel",
          "PFC, ECN", "tree"),
    Check("roce.congestion", "rdma", "info", "since last time: congestion notifications", "", "", "tree"),
    Check("kernel.log", "rdma", "unknown", "the kernel's log cannot be read", "", "root, or --kmsg FILE",
          "this machine"),
    Check("drv.log", "rdma", "critical, warning",
          "in the kernel's log: a driver lost its card's firmware, was stuck, or "
          "complains of power, heat, cable; older than 2 hours: info", "NVSentinel", "reset, reboot, replace",
          "recorded"),
    Check("link.log", "rdma", "warning", "in the kernel's log: an RDMA link went down", "NVSentinel", "cable",
          "recorded"),
    Check("nic.mkey", "rdma", "critical", "in the kernel's log: memory keys ran out", "Mooncake guide",
          "reload the driver; no SIGKILL", "recorded"),
    Check("gpu.xid", "rdma", "critical, warning",
          "in the kernel's log: an Xid error, critical if of Azure's fatal set; "
          "older than 2 hours: info", "Azure NHC, NVIDIA catalogue", "reset, reboot, replace", "recorded"),
    Check("pcie.width", "rdma", "critical", "an RDMA card in fewer lanes than it has", "", "reseat, BIOS", "tree"),
    Check("pcie.speed", "rdma", "warning", "an RDMA card at a lower PCIe speed than its best", "", "reseat, BIOS",
          "tree"),
    Check("pcie.path", "rdma", "critical", "a bridge above a card narrower than both its ends", "gcm", "reseat, BIOS",
          "tree"),
    Check("pcie.aer", "rdma", "critical, warning", "since last time: PCIe errors; more than 10 corrected a minute",
          "pdctl's own", "reseat, riser", "tree"),
    Check("pcie.acs", "rdma", "warning; info in a virtual machine", "a bridge's ACS redirects peers, with GPUDirect",
          "NCCL troubleshooting", "setpci", "tree"),
    Check("host.iommu", "rdma", "warning", "the IOMMU translates on bare metal, with GPUDirect", "NCCL troubleshooting",
          "iommu=pt", "tree"),
    Check("gdr.access", "rdma", "info",
          "RDMA and GPUs, and neither nvidia_peermem nor dma-buf; Mooncake wants peermem "
          "unless `WITH_NVIDIA_PEERMEM=0`", "Mooncake, environ.cpp", "modprobe nvidia_peermem", "tree"),
    Check("gpu.none", "gpu", "info; critical where asked for", "no GPU, and why", "", "nvidia-smi, --gpus all",
          "stub, this machine"),
    Check("gpu.present", "gpu", "ok", "a GPU is there", "", "", "stub"),
    Check("gpu.driver", "gpu", "critical", "the driver's library and module differ", "", "reboot", "stub"),
    Check("gpu.count", "gpu", "critical where asked for or lost", "the driver knows a GPU that NVML does not list", "",
          "reset, reboot",
          "stub, tree"),
    Check("gpu.cuda", "gpu", "critical, warning", "torch was built for a newer CUDA than the driver supports",
          "CUDA compatibility guide", "update the driver", "stub"),
    Check("gpu.ecc", "gpu", "critical", "uncorrected memory errors since the driver was loaded", "Azure NHC", "reset",
          "stub"),
    Check("gpu.rows", "gpu", "critical", "a row remap waits or failed, or more than 512 rows were remapped",
          "Azure NHC",
          "reset, replace", "stub"),
    Check("gpu.throttle", "gpu", "warning", "slowed down by hardware, heat or the power brake", "nvml.h", "cooling",
          "stub"),
    Check("gpu.nvlink", "gpu", "critical", "some NVLinks are down beside others that are up", "NVIDIA validation",
          "fabric manager", "stub"),
    Check("gpu.lanes", "gpu", "warning", "in fewer PCIe lanes than it has", "", "reseat, BIOS", "stub"),
    Check("gpu.mem_held", "gpu", "critical where too little is left, else warning",
          "more than 1 GiB is taken by what is not ours",
          "pdctl's own", "kill PID", "stub"),
    Check("gpu.mig", "gpu", "critical", "MIG is on, and the topology wants the GPU", "", "nvidia-smi -mig 0", "stub"),
    Check("gpu.mode", "gpu", "critical", "compute mode EXCLUSIVE_PROCESS with several engines, or PROHIBITED", "",
          "nvidia-smi -c DEFAULT", "stub"),
    Check("gpu.persistence", "gpu", "info", "persistence mode is off", "", "nvidia-smi -pm 1", "stub"),
    Check("pcie.affinity", "gpu", "critical for SYS, else warning",
          "an engine's RDMA device is farther from its GPU than "
          "another one", "NCCL's classes", "leave devices out", "tree"),
    Check("limit.files", "host", "info below 65,536, warning below 4,096", "hard limit of open files", "pdctl's own",
          "LimitNOFILE", "planted"),
    Check("limit.memlock", "host", "critical", "RDMA, and less than the KV pools, without CAP_IPC_LOCK",
          "Mooncake guide",
          "LimitMEMLOCK=infinity", "planted"),
    Check("host.stuck", "host", "critical", "a process of the running service is in uninterruptible sleep for 0.5 s",
          "pdctl's own", "/proc/PID/stack, dmesg", "tree"),
    Check("shm.size", "host", "warning", "`/dev/shm` below 1 GiB", "NCCL troubleshooting", "remount", "planted"),
    Check("memory.free", "host", "warning", "KV pools and weights on the CPU want more than is free", "",
          "fewer replicas",
          "planted"),
    Check("clock.sync", "host", "info", "the clock is not synchronised", "adjtimex(2)", "timesyncd, chrony",
          "this machine"),
    Check("host.hugepages", "host", "critical", "`MC_STORE_USE_HUGEPAGE` without a free huge page", "Mooncake guide",
          "vm.nr_hugepages", "tree"),
    Check("host.map_count", "host", "info", "RDMA, and `vm.max_map_count` below 16,777,216", "Mooncake guide", "sysctl",
          "tree"),
    Check("host.numa_balancing", "host", "info", "automatic NUMA balancing over several nodes", "", "sysctl", "tree"),
    Check("host.container", "host", "critical", "a container without the device or the capability that RDMA needs", "",
          "docker run flags", "tree"),
    Check("net.ports", "net", "critical; warning for transfers",
          "the proxy\'s port is taken, and by whom; more than half of `transfer.ports` are", "", "kill PID",
          "planted"),
    Check("net.clash", "net", "warning", "`proxy.port` lies within `transfer.ports`", "", "another port", "planted"),
    Check("net.ephemeral", "net", "warning", "a port of the topology within the kernel's ephemeral range", "",
          "ip_local_reserved_ports", "tree"),
    Check("net.backlog", "net", "warning", "`net.core.somaxconn` below 1,024", "pdctl's own", "sysctl", "tree"),
    Check("net.loopback", "net", "critical; warning where a pair is left", "a far engine would read KV from 127.0.0.1",
          "", "all there, or all here",
          "planted"),
    Check("net.attached", "net", "warning", "nobody answers at an attached engine's address", "", "start it",
          "planted"),
    Check("env.proxy", "net", "warning", "`http_proxy` without our own hosts in `no_proxy`", "Mooncake guide",
          "export no_proxy", "planted"),
    Check("runtime.package", "runtime", "warning, info", "a package of the engine is missing", "", "pip install",
          "planted"),
    Check("runtime.libibverbs", "runtime", "critical with RDMA, else warning", "Mooncake is installed and "
          "`libibverbs.so.1` is not", "", "apt-get install libibverbs1", "planted"),
    Check("runtime.versions", "runtime", "critical, warning",
          "torch without CUDA for GPUs; transformers before 5.17; both "
          "builds of Mooncake, or the wrong one", "pdctl's own", "pip install", "planted"),
    Check("nvshmem.install", "runtime", "warning", "NVSHMEM is there, and not whole", "DeepEP", "pip install",
          "planted"),
    Check("nvshmem.ibgda", "runtime", "info", "NVSHMEM is there, and neither the driver's peer mapping nor gdrdrv",
          "DeepEP", "modprobe gdrdrv", "planted"),
    Check("nccl.install", "runtime", "ok", "NCCL's version", "", "", "planted"),
    Check("env.switch", "runtime", "critical, warning",
          "`MC_FORCE_TCP`, `NCCL_IB_DISABLE`, `NCCL_P2P_DISABLE` left set", "",
          "unset", "planted"),
    Check("env.ucx_tls", "runtime", "critical", "RDMA, and `UCX_TLS` leaves it out", "UCX", "unset UCX_TLS", "planted"),
    Check("env.devices", "runtime", "critical with RDMA, else warning",
          "`UCX_NET_DEVICES`, `NCCL_IB_HCA`, `MC_MS_FILTERS` or "
          "their like name a device that is missing or down", "", "the device that is printed", "planted"),
    Check("topology.invalid", "topology", "critical", "everything that `pdctl up` refuses", "", "the loader's hint",
          "planted"),
    Check("topology.valid", "topology", "ok", "nothing to be said against it", "", "", "planted"),
    Check("topology.context", "topology", "critical", "`max_model_len` above the model's positions", "config.json",
          "max_model_len", "planted"),
    Check("topology.kv_pool", "topology", "warning", "a KV pool that holds no request of the full length",
          "config.json",
          "kv_cache_gb", "planted"),
    Check("topology.pairs", "topology", "critical, warning", "prefill and decode engines of different kinds", "",
          "one kind", "planted"),
    Check("topology.blocks", "topology", "info", "block sizes differ", "", "block_size", "planted"),
    Check("topology.secret", "topology", "critical", "an attached engine's `secret_file` cannot be read", "",
          "write it",
          "planted"),
    Check("topology.single", "topology", "info", "one engine of a role", "", "replicas = 2", "planted"),
    Check("model.weights", "topology", "critical", "a model\'s folder without weights", "", "fetch it again",
          "planted"),
    Check("gpu.memory", "topology", "critical where weights and KV alone are, else warning",
          "weights, KV and 2 GiB each of all engines on a GPU are more than it has",
          "pdctl's own", "kv_cache_gb", "stub"),
)  # fmt: skip

_COLUMNS = ("id", "area", "severity", "fires when", "source", "fix", "evidence")


def markdown() -> str:
    """The table of docs/doctor.md."""
    rows = [(f"`{check.id}`", *check[1:]) for check in CHECKS]
    lines = [" | ".join(_COLUMNS), "|".join(["---"] * len(_COLUMNS)), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" if set(line) - set("-|") else f"|{line}|\n" for line in lines)
