"""What vLLM writes to its log: the phases of its start, and why it failed."""

from __future__ import annotations

from pdctl.adapters import KnownFailure

PHASES = (
    (r"non-default args|version \d", "reading the model's configuration"),
    (r"Initializing a V1 LLM engine|Initializing an LLM engine", "starting workers"),
    (r"Starting to load model", "loading weights"),
    (r"Model loading took|Loading weights took", "measuring memory"),
    (r"KV cache size:|Available KV cache memory", "allocating the KV cache"),
    (r"Dynamo bytecode transform|torch\.compile takes|Compile and warming up|Warming up model", "compiling"),
    (r"Capturing CUDA graphs|Capturing cudagraphs", "capturing CUDA graphs"),
    (r"init engine \(profile, create kv cache", "starting the API server"),
)

FAILURES = (
    KnownFailure(
        r"error: unrecognized arguments: (.+)",
        "vLLM does not know the option {0}",
        "correct args of this engine; vLLM lists its options with --help=all",
    ),
    KnownFailure(
        r"api_server\.py: error: (.+)|vllm serve: error: (.+)",
        "vLLM refuses its command line: {0}{1}",
        "correct args of this engine",
    ),
    KnownFailure(
        r"\(([\d.]+) GiB KV cache is needed, which is larger than the available KV cache memory \(([\d.]+) GiB\)",
        "max_model_len does not fit: one request of that length needs {0} GiB of KV cache, {1} GiB are available",
        "lower service.max_model_len, or raise gpu_memory_utilization or kv_cache_gb",
    ),
    KnownFailure(
        r"No available memory for the cache blocks",
        "the model's weights leave no memory for the KV cache",
        "raise gpu_memory_utilization, or use more GPUs with tensor_parallel",
    ),
    KnownFailure(
        r"Failed to load model - not enough GPU memory|torch\.OutOfMemoryError|CUDA out of memory",
        "the model does not fit into the GPU's memory",
        "use more GPUs with tensor_parallel, or a smaller or quantized model",
    ),
    KnownFailure(
        r"Free memory on device (?:\S+ )?\(([\d./]+ ?(?:GiB)?).*\) on startup is less than desired",
        "another process uses the GPU: only {0} is free",
        "stop it (pdctl doctor gpu names it), or lower gpu_memory_utilization",
        incurable=False,
    ),
    KnownFailure(
        r"(?i:address) already in use.*?(?:tcp://\S+:|port |:)(\d+)|zmq\.error\.ZMQError: Address already in use \(addr='tcp://\S+:(\d+)'\)",
        "port {0}{1} is in use by another process",
        "pdctl why shows the log; stop the other process",
        incurable=False,
    ),
    KnownFailure(
        r"(?i:address) already in use", "a port is in use by another process", "stop the other process", incurable=False
    ),
    KnownFailure(
        r"Bfloat16 is only supported on GPUs with compute capability",
        "this GPU does not support bfloat16",
        'set dtype = "float16"',
    ),
    KnownFailure(
        r"Model architectures? \[?'?(\w+)'?\]? (?:are|is) not supported",
        "vLLM does not support the model architecture {0}",
        "use a newer vLLM, or another model",
    ),
    KnownFailure(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len.*?(\d+)\)",
        "max_model_len is {0}, but the model supports {1}",
        "lower service.max_model_len",
    ),
    KnownFailure(
        r"No module named '(nixl\w*|mooncake\w*|lmcache\w*)|(NIXL) is not available|[Pp]lease install (mooncake)",
        "the package of the connector is not installed: {0}{1}{2}",
        "install it into the environment of this engine's python, or choose another connector",
    ),
    # The first error of the engine core is the cause; the API server only says that the core failed.
    KnownFailure(
        r"\((?:EngineCore|Worker)[^)]*\) ERROR .*\] ((?:[A-Za-z_]+\.)*[A-Z]\w*(?:Error|Exception): .+)",
        "{0}",
        "",
        incurable=False,
    ),
    KnownFailure(r"^((?:[A-Za-z_]+\.)*[A-Z]\w*(?:Error|Exception): .+)", "{0}", "", incurable=False),
)  # fmt: skip
