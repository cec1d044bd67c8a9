"""GPUs, RDMA devices and the PCI tree between them, from NVML and sysfs."""
