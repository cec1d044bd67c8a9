"""What SGLang writes to its log: the phases of its start, and why it failed (read in sglang 0.5.23)."""

from __future__ import annotations

from pdctl.adapters import KnownFailure

PHASES = (
    (r"server_args=", "starting workers"),
    (r"Load weight begin", "loading weights"),
    (r"Load weight end", "allocating the KV cache"),
    (r"Capture .*CUDA graph begin", "capturing CUDA graphs"),
    (r"max_total_num_tokens=", "starting the API server"),
    (r"Uvicorn running|Start of pd disaggregation warmup", "warming up"),
)

FAILURES = (
    KnownFailure(
        r"error: unrecognized arguments: (.+)",
        "SGLang does not know the option {0}",
        "correct args of this engine; SGLang lists its options with --help",
    ),
    KnownFailure(
        r"(?:sglang serve|launch_server\.py): error: (.+)",
        "SGLang refuses its command line: {0}",
        "correct args of this engine",
    ),
    KnownFailure(
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        "the model's weights leave no memory for the KV cache",
        "raise gpu_memory_utilization, or use more GPUs with tensor_parallel",
    ),
    KnownFailure(
        r"torch\.OutOfMemoryError|CUDA out of memory",
        "the model does not fit into the GPU's memory",
        "use more GPUs with tensor_parallel, a smaller or quantized model, or lower gpu_memory_utilization",
    ),
    KnownFailure(
        r"libcudnn|libcuda\.so|No module named '(?:sgl_kernel|flashinfer|triton|torchvision)'",
        "SGLang's GPU libraries cannot be loaded",
        "install sglang with all its dependencies, on a machine with an NVIDIA driver",
    ),
    KnownFailure(
        r"No module named 'mooncake'",
        "the transfer engine of connector 'mooncake' is not installed",
        "install mooncake-transfer-engine into this engine's environment, or set another connector",
    ),
    KnownFailure(
        r"No module named 'nixl'",
        "the library of connector 'nixl' is not installed",
        "install nixl into this engine's environment, or set another connector",
    ),
    KnownFailure(
        r"(?i:address) already in use", "a port is in use by another process", "stop the other process", incurable=False
    ),
)
