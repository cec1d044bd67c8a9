"""All checks by id: when each fires, the source of its threshold, and how it was tested.

`pdctl doctor --list` prints this; docs/doctor.md has the same table. Evidence: *real tool*: compared with Debian's
tool; *stub*: NVIDIA's Python binding over a stub library; *tree*: a fake sysfs or proc tree makes it fire and another
does not; *recorded*: published kernel messages; *planted*: a test sets the fact; *this machine*: observed on the
development machine. No check has been tested on RDMA hardware or on a GPU yet."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """One check. `severity`: the worst it reports; `fires`: when; `source`: of the threshold, "" if it has none."""

    id: str
    area: str
    severity: str
    fires: str
    source: str
    fix: str
    evidence: str


CHECKS = (
    Check("rdma.none", "rdma", "info; critical if required",
          "the kernel has no RDMA support, or there is no device",
          "", "modprobe, lspci", "tree, this machine"),
    Check("port.gone", "rdma", "critical",
          "a device named in the topology does not exist; a sysfs entry without a device",
          "NVSentinel", "correct the name; lspci, dmesg", "tree"),
    Check("port.chardev", "rdma", "critical", "`/dev/infiniband/uverbsN` is missing or cannot be opened",
          "NVSentinel", "pass the device to the container; modprobe ib_uverbs", "tree"),
    Check("port.state", "rdma", "critical if required, else warning",
          "not ACTIVE; INIT and ARMED wait for a subnet "
          "manager", "gcm", "cable, switch port, opensm", "tree"),
    Check("port.lid", "rdma", "critical", "an active InfiniBand port has LID 0 or 0xffff, or no subnet manager",
          "IBTA", "opensm",
          "tree"),
    Check("port.rate", "rdma", "critical",
          "slower than `[expect] rate_gbps`, or than the median of ports on the same board type",
          "NVSentinel", "cable, forced speed, breakout", "tree"),
    Check("port.link_layer", "rdma", "critical", "not `[expect] link_layer`", "", "mlxconfig", "tree"),
    Check("err.counters", "rdma", "warning when saturated, else info", "a narrow error counter is not zero",
          "widths: IBTA PMA", "check whether it grows", "tree"),
    Check("roce.gid", "rdma", "critical", "no RoCE v2 GID with an address", "Mooncake guide", "ip addr add", "tree"),
    Check("roce.gid_index", "rdma", "critical", "`MC_`, `NCCL_IB_`, `UCX_IB_`, `NVSHMEM_IB_GID_INDEX` or `[expect] "
          "gid_index` points at an empty or v1 slot", "Mooncake guide", "the index in the finding", "tree"),
    Check("roce.mtu", "rdma", "critical with a larger `MC_MTU`, else warning",
          "the RDMA MTU that the netdev allows is below "
          "4096, `[expect] mtu` or `MC_MTU`", "kernel, iboe_get_mtu", "ip link set mtu 9000", "tree"),
    Check("fw.mix", "rdma", "warning", "devices with the same board type have different firmware", "gcm",
          "mlxfwmanager", "tree"),
    Check("link.flap", "rdma", "critical, warning",
          "since the last run: `link_downed` grew; `carrier_changes` by more than "
          "2", "NVSentinel", "cable, transceiver", "tree"),
    Check("err.symbol", "rdma", "critical", "since the last run: more than 9 symbol errors, and 120 per hour",
          "IBTA, BER 1e-12",
          "cable, transceiver", "tree"),
    Check("err.recovery", "rdma", "warning", "since the last run: more than 5 link recoveries per minute", "NVSentinel",
          "cable, transceiver", "tree"),
    Check("err.integrity", "rdma", "critical", "since the last run: link integrity errors or buffer overruns",
          "NVSentinel",
          "cable, flow control", "tree"),
    Check("err.rcv", "rdma", "warning", "since the last run: more than 10 corrupt packets per second", "NVSentinel",
          "cable",
          "tree"),
    Check("err.discards", "rdma", "warning", "since the last run: more than 100 discarded packets per second",
          "NVSentinel",
          "congestion, peer down", "tree"),
    Check("err.reset", "rdma", "info", "a counter is lower than in the last run", "", "", "tree"),
    Check("tx.retry", "rdma", "critical, warning",
          "since the last run: retries exceeded; more than 1 late acknowledgement per "
          "second; receivers not ready", "NVSentinel", "the path to the peer", "tree"),
    Check("tx.oos", "rdma", "critical above 1e-4, warning above 1e-6",
          "since the last run: fraction of packets out of sequence",
          "pdctl's own", "flow control, cables", "tree"),
    Check("roce.slow_restart", "rdma", "warning", "since the last run: more than 10 slow restarts per second",
          "NVSentinel",
          "PFC, ECN", "tree"),
    Check("roce.congestion", "rdma", "info", "since the last run: congestion notifications", "", "", "tree"),
    Check("kernel.log", "rdma", "unknown", "the kernel log cannot be read", "", "root, or --kmsg FILE",
          "this machine"),
    Check("drv.log", "rdma", "critical, warning",
          "in the kernel log: a driver lost its card's firmware, was stuck, or "
          "reports power, heat or cable problems; older than 2 hours: info", "NVSentinel", "reset, reboot, replace",
          "recorded"),
    Check("link.log", "rdma", "warning", "in the kernel log: an RDMA link went down", "NVSentinel", "cable",
          "recorded"),
    Check("nic.mkey", "rdma", "critical", "in the kernel log: memory keys ran out", "Mooncake guide",
          "reload the driver; no SIGKILL", "recorded"),
    Check("gpu.xid", "rdma", "critical, warning",
          "in the kernel log: an Xid error, critical if in Azure's fatal set; "
          "older than 2 hours: info", "Azure NHC, NVIDIA catalogue", "reset, reboot, replace", "recorded"),
    Check("pcie.width", "rdma", "critical", "an RDMA card uses fewer PCIe lanes than it has", "", "reseat, BIOS",
          "tree"),
    Check("pcie.speed", "rdma", "warning", "an RDMA card runs below its maximum PCIe speed", "", "reseat, BIOS",
          "tree"),
    Check("pcie.path", "rdma", "critical", "the link of a bridge above a card is narrower than both ends support",
          "gcm", "reseat, BIOS",
          "tree"),
    Check("pcie.aer", "rdma", "critical, warning",
          "since the last run: PCIe errors; more than 10 corrected errors per minute",
          "pdctl's own", "reseat, riser", "tree"),
    Check("pcie.acs", "rdma", "warning; info in a virtual machine",
          "with GPUDirect: ACS on a bridge redirects peer traffic",
          "NCCL troubleshooting", "setpci", "tree"),
    Check("host.iommu", "rdma", "warning", "with GPUDirect on bare metal: the IOMMU translates", "NCCL troubleshooting",
          "iommu=pt", "tree"),
    Check("gdr.access", "rdma", "info",
          "RDMA and GPUs, but neither nvidia_peermem nor dma-buf; Mooncake needs peermem "
          "unless `WITH_NVIDIA_PEERMEM=0`", "Mooncake, environ.cpp", "modprobe nvidia_peermem", "tree"),
    Check("gpu.none", "gpu", "info; critical if required", "no GPU, with the reason", "", "nvidia-smi, --gpus all",
          "stub, this machine"),
    Check("gpu.present", "gpu", "ok", "a GPU was found", "", "", "stub"),
    Check("gpu.driver", "gpu", "critical", "the versions of the driver's library and kernel module differ", "",
          "reboot", "stub"),
    Check("gpu.count", "gpu", "critical if required or lost", "the driver knows a GPU that NVML does not list", "",
          "reset, reboot",
          "stub, tree"),
    Check("gpu.cuda", "gpu", "critical, warning", "torch was built for a newer CUDA than the driver supports",
          "CUDA compatibility guide", "update the driver", "stub"),
    Check("gpu.ecc", "gpu", "critical", "uncorrected memory errors since the driver was loaded", "Azure NHC", "reset",
          "stub"),
    Check("gpu.rows", "gpu", "critical", "a row remap is pending or failed, or more than 512 rows were remapped",
          "Azure NHC",
          "reset, replace", "stub"),
    Check("gpu.throttle", "gpu", "warning", "throttled by hardware, heat or the power brake", "nvml.h", "cooling",
          "stub"),
    Check("gpu.nvlink", "gpu", "critical", "some NVLinks are down while others are up", "NVIDIA validation",
          "fabric manager", "stub"),
    Check("gpu.lanes", "gpu", "warning", "a GPU uses fewer PCIe lanes than it has", "", "reseat, BIOS", "stub"),
    Check("gpu.mem_held", "gpu", "critical if too little is left, else warning",
          "processes outside the service use more than 1 GiB",
          "pdctl's own", "kill PID", "stub"),
    Check("gpu.mig", "gpu", "critical", "MIG is on, but the topology uses the whole GPU", "", "nvidia-smi -mig 0",
          "stub"),
    Check("gpu.mode", "gpu", "critical", "compute mode EXCLUSIVE_PROCESS with several engines, or PROHIBITED", "",
          "nvidia-smi -c DEFAULT", "stub"),
    Check("gpu.persistence", "gpu", "info", "persistence mode is off", "", "nvidia-smi -pm 1", "stub"),
    Check("pcie.affinity", "gpu", "critical for SYS, else warning",
          "an engine's RDMA device is farther from its GPU than "
          "another one", "NCCL's distance classes", "leave devices out", "tree"),
    Check("limit.files", "host", "info below 65,536, warning below 4,096", "low hard limit of open files",
          "pdctl's own",
          "LimitNOFILE", "planted"),
    Check("limit.memlock", "host", "critical",
          "RDMA is used, and the limit is below the KV pools' size, without CAP_IPC_LOCK",
          "Mooncake guide",
          "LimitMEMLOCK=infinity", "planted"),
    Check("host.stuck", "host", "critical", "a process of the running service is in uninterruptible sleep for 0.5 s",
          "pdctl's own", "/proc/PID/stack, dmesg", "tree"),
    Check("shm.size", "host", "warning", "`/dev/shm` below 1 GiB", "NCCL troubleshooting", "remount", "planted"),
    Check("memory.free", "host", "warning", "KV pools and weights on the CPU need more than the free memory", "",
          "fewer replicas",
          "planted"),
    Check("clock.sync", "host", "info", "the clock is not synchronised", "adjtimex(2)", "timesyncd, chrony",
          "this machine"),
    Check("host.hugepages", "host", "critical", "`MC_STORE_USE_HUGEPAGE` is set, but no huge page is free",
          "Mooncake guide",
          "vm.nr_hugepages", "tree"),
    Check("host.map_count", "host", "info", "RDMA is used, and `vm.max_map_count` is below 16,777,216",
          "Mooncake guide", "sysctl",
          "tree"),
    Check("host.numa_balancing", "host", "info", "automatic NUMA balancing is on with several nodes", "", "sysctl",
          "tree"),
    Check("host.container", "host", "critical", "a container lacks the device or the capability that RDMA needs", "",
          "docker run flags", "tree"),
    Check("net.ports", "net", "critical; warning for transfers",
          "another process uses the proxy's port; more than half of `transfer.ports` are in use", "", "kill PID",
          "planted"),
    Check("net.clash", "net", "warning", "`proxy.port` is within `transfer.ports`", "", "another port", "planted"),
    Check("net.ephemeral", "net", "warning", "a port of the topology is within the kernel's ephemeral range", "",
          "ip_local_reserved_ports", "tree"),
    Check("net.backlog", "net", "warning", "`net.core.somaxconn` below 1,024", "pdctl's own", "sysctl", "tree"),
    Check("net.loopback", "net", "critical; warning if another pair works",
          "an engine on another host would read KV from 127.0.0.1",
          "", "run all engines on one host",
          "planted"),
    Check("net.attached", "net", "warning", "an attached engine's address cannot be reached", "", "start it",
          "planted"),
    Check("env.proxy", "net", "warning", "`http_proxy` is set, but the service's hosts are not in `no_proxy`",
          "Mooncake guide",
          "export no_proxy", "planted"),
    Check("runtime.package", "runtime", "warning, info", "a package that the engine needs is missing", "",
          "pip install",
          "planted"),
    Check("runtime.libibverbs", "runtime", "critical with RDMA, else warning", "Mooncake is installed, but "
          "`libibverbs.so.1` is not", "", "apt-get install libibverbs1", "planted"),
    Check("runtime.versions", "runtime", "critical, warning",
          "torch without CUDA on a GPU topology; transformers older than 5.17; both "
          "builds of Mooncake, or the wrong one", "pdctl's own", "pip install", "planted"),
    Check("nvshmem.install", "runtime", "warning", "the NVSHMEM installation is incomplete", "DeepEP", "pip install",
          "planted"),
    Check("nvshmem.ibgda", "runtime", "info",
          "NVSHMEM is installed, but neither the driver's peer mapping nor gdrdrv is enabled",
          "DeepEP", "modprobe gdrdrv", "planted"),
    Check("nccl.install", "runtime", "ok", "NCCL is installed; shows its version", "", "", "planted"),
    Check("env.switch", "runtime", "critical, warning",
          "`MC_FORCE_TCP`, `NCCL_IB_DISABLE` or `NCCL_P2P_DISABLE` is set", "",
          "unset", "planted"),
    Check("env.ucx_tls", "runtime", "critical", "RDMA is used, but `UCX_TLS` excludes it", "UCX", "unset UCX_TLS",
          "planted"),
    Check("env.devices", "runtime", "critical with RDMA, else warning",
          "`UCX_NET_DEVICES`, `NCCL_IB_HCA`, `MC_MS_FILTERS` or "
          "similar variables name a device that is missing or down", "", "the device in the finding", "planted"),
    Check("topology.invalid", "topology", "critical", "any problem for which `pdctl up` refuses the topology", "",
          "the loader's hint",
          "planted"),
    Check("topology.valid", "topology", "ok", "no problem was found", "", "", "planted"),
    Check("topology.context", "topology", "critical", "`max_model_len` exceeds the model's maximum positions",
          "config.json",
          "max_model_len", "planted"),
    Check("topology.kv_pool", "topology", "warning", "a KV pool is too small for one request of full length",
          "config.json",
          "kv_cache_gb", "planted"),
    Check("topology.pairs", "topology", "critical, warning", "prefill and decode engines are of different kinds", "",
          "use one kind", "planted"),
    Check("topology.blocks", "topology", "info", "block sizes differ", "", "block_size", "planted"),
    Check("topology.secret", "topology", "critical", "an attached engine's `secret_file` cannot be read", "",
          "create the file",
          "planted"),
    Check("topology.single", "topology", "info", "only one engine of a role", "", "replicas = 2", "planted"),
    Check("model.weights", "topology", "critical", "the model's folder has no weights", "", "download it again",
          "planted"),
    Check("gpu.memory", "topology", "critical if weights and KV alone exceed it, else warning",
          "all engines on a GPU, with weights, KV and 2 GiB each, exceed its memory",
          "pdctl's own", "kv_cache_gb", "stub"),
)  # fmt: skip

_COLUMNS = ("id", "area", "severity", "fires when", "source", "fix", "evidence")


def markdown() -> str:
    """The table in docs/doctor.md."""
    rows = [(f"`{check.id}`", *check[1:]) for check in CHECKS]
    lines = [" | ".join(_COLUMNS), "|".join(["---"] * len(_COLUMNS)), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" if set(line) - set("-|") else f"|{line}|\n" for line in lines)
