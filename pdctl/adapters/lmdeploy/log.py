"""What LMDeploy writes to its log with --log-level INFO: the phases of its start, and why it failed."""

from __future__ import annotations

from pdctl.adapters import KnownFailure

PHASES = (
    (r"Creating processes\.|init ray cluster", "starting workers"),
    (r"Building Model\.|Loading weights from", "loading weights"),
    (r"Building GraphRunner and warmup ops", "compiling"),
    (r"Building CacheEngine", "allocating the KV cache"),
    (r"Starting engine warmup|Warming up (?:model|prefill|decoding)", "warming up"),
    (r"Started server process", "starting the API server"),
)

FAILURES = (
    KnownFailure(
        r"lmdeploy: error: unrecognized arguments: (.+)|error: unrecognized arguments: (.+)",
        "LMDeploy does not know the option {0}{1}",
        "correct args of this engine; LMDeploy lists its options with: lmdeploy serve api_server --help",
    ),
    KnownFailure(
        r"serve api_server: error: (.+)", "LMDeploy refuses its command line: {0}", "correct args of this engine"
    ),
    KnownFailure(
        r"No enough gpu memory for (kv cache|runtime|state cache)",
        "the model leaves no GPU memory for LMDeploy's {0}",
        "raise gpu_memory_utilization, lower max_num_seqs, or use more GPUs with tensor_parallel",
    ),
    KnownFailure(
        r"torch\.OutOfMemoryError|CUDA out of memory",
        "the model does not fit into the GPU's memory",
        "use more GPUs with tensor_parallel, or a smaller or quantized model",
    ),
    KnownFailure(
        r"PD migration does not support block_size != kernel_block_size",
        "prefill and decode engines need the same block size for kernels and for the cache",
        "remove --kernel-block-size from args",
    ),
    KnownFailure(
        r"No RDMA devices available",
        "LMDeploy's Mooncake backend found no RDMA device",
        "it needs one, also between engines of one machine (Mooncake #1811); see: pdctl doctor rdma",
    ),
    KnownFailure(
        r"No module named '(dlslime|mooncake)\w*",
        "the package of the connector is not installed: {0}",
        "install it into the environment of this engine's python, or choose another connector",
    ),
    KnownFailure(
        r"Torch not compiled with CUDA enabled|Found no NVIDIA driver",
        "LMDeploy found no GPU",
        "LMDeploy has no engine for CPUs (LMDeploy #2586); install PyTorch with CUDA into this engine's environment",
    ),
    KnownFailure(
        r"(?i:address already in use)", "a port is in use by another process", "stop the other process", incurable=False
    ),
    KnownFailure(r"^((?:[A-Za-z_]+\.)*[A-Z]\w*(?:Error|Exception): .+)", "{0}", "", incurable=False),
)
