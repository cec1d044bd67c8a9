"""What each key of a topology file means, in Markdown. docs/reference/topology.md is made of these and of the schema.

Links are relative to docs/reference."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """A key's meaning. `default`: what applies without the key, if the schema's own default does not say it."""

    text: str
    default: str = ""


ABOUT: dict[str, str] = {
    "service": "what is served.",
    "proxy": "the address for clients, and what the proxy does with requests: [the proxy](../proxy.md).",
    "keys": "settings of an API key: [API keys](../keys.md).",
    "slo": "latency targets.",
    "elastic": "roles that follow the load: [roles](../elastic.md).",
    "cluster": "a service over several machines: [clusters](../cluster.md).",
    "dashboard": "the live page: [live page](../dashboard.md).",
    "transfer": "how KV moves between engines: [transports](../transports.md), [leases](../kv.md).",
    "expect": "what RDMA ports should be. Only [`pdctl doctor`](../doctor.md) uses it.",
    "engines": "a group of equal engines. Which keys a group takes depends on its kind: "
    "[engines](../engines.md). A key without effect is an error.",
    "processes": "any program, supervised like an engine: [processes](../engines/stores.md#processes).",
    "stores": "a KV store between engines: [stores](../engines/stores.md#stores).",
    "supervisor": "when processes are restarted, probed and stopped: [supervision](../supervision.md).",
}

_PARSERS = "(../proxy.md#tool-calls-and-reasoning)"
_NODES = "[LMDeploy's engines register themselves](../engines/lmdeploy.md#engines-that-register-themselves)"

MEANINGS: dict[str, dict[str, Meaning]] = {
    "service": {
        "name": Meaning("name of the service and its run directory; services with different names run side by side"),
        "model": Meaning("`sample:NAME`, a Hugging Face directory (relative to the file), or a Hub id"),
        "served_model_name": Meaning("model name that clients use", "last part of `model`"),
        "max_model_len": Meaning("tokens, prompt and output together"),
        "engine_ports": Meaning(
            "first and last port that engines, stores and processes may listen on; ports in use are skipped",
            "[18100, 26099]",
        ),
        "tool_parser": Meaning(
            f"how builtin engines find [tool calls]{_PARSERS} in outputs; `auto`: by the chat template"
        ),
        "reasoning_parser": Meaning(
            f"how builtin engines find [reasoning]{_PARSERS}: `think` (`<think>`), `mistral` (`[THINK]`), `none`; "
            "`auto`: by the chat template"
        ),
    },
    "proxy": {
        "host": Meaning("address for clients; `0.0.0.0` also accepts other machines. Everything else uses loopback"),
        "port": Meaning("port for clients"),
        "routing": Meaning("[how engines are chosen](../proxy.md#routing)"),
        "cpus": Meaning("CPUs that the proxy may use", "all available"),
        "nodes": Meaning("nodes of a [cluster](../cluster.md) that have a proxy", "all"),
        "workers": Meaning(
            "[proxy processes](../proxy.md#more-than-one-core) on the port; more if one core is not enough"
        ),
        "admission": Meaning(
            "[which requests wait and which are refused](../proxy.md#admission): `queue` waits for room, `slo` also "
            "refuses with 429 what would miss its targets"
        ),
        "max_queue": Meaning("limit of waiting requests; more are refused with 429 and `Retry-After`"),
        "max_body_mb": Meaning("limit of a request body in MiB, after decompression"),
        "unknown_fields": Meaning(
            "request fields that no engine knows: `warn` (dropped and [reported](../proxy.md#fields)) or `refuse` (400)"
        ),
        "api_keys": Meaning(
            "file with [API keys](../keys.md), relative to the topology's folder; requests then need one", "none"
        ),
        "tls_cert": Meaning("certificate for https; needs `tls_key`", "none: http"),
        "tls_key": Meaning("key of the certificate", "none"),
        "cors_origins": Meaning("origins of web pages that may use the service", "none"),
        "access_log": Meaning("file with [one JSON line per request](../proxy.md#logs-and-traces)", "none"),
        "otlp_endpoint": Meaning(
            "OpenTelemetry collector for the [traces](../observability.md#traces) of proxy and engines; needs "
            "`pip install 'pdctl[otlp]'`",
            "none",
        ),
        "accept_nodes": Meaning(f"{_NODES}; then no `[[engines]]` is needed"),
        "node_keys": Meaning("file with the keys with which they do", "none"),
        "node_away_s": Meaning("such an engine is forgotten when it has not answered for so many seconds"),
        "takeover": Meaning("[clients' connections outlive the proxy](../takeover.md)"),
        "takeover_slots": Meaning("connections of each proxy process that do; others are served, but end with it"),
    },
    "keys": {
        "name": Meaning("name of a key in the file of `proxy.api_keys`; `*`: every key without an entry of its own"),
        "weight": Meaning(
            "[share](../keys.md#shares) of the engines, relative to other keys that have something to do"
        ),
        "requests_per_minute": Meaning("[limit](../keys.md#limits); 0: none"),
        "tokens_per_minute": Meaning("limit for prompts and answers together; 0: none"),
        "streams": Meaning("limit of answers at once, waiting ones included; 0: none"),
        "priority": Meaning("class: lower goes first, those behind get one eighth meanwhile"),
    },
    "slo": {
        "ttft_ms": Meaning(
            'target for the time to the first token, counted in `/metrics`; enforced with `admission = "slo"`'
        ),
        "tpot_ms": Meaning(
            "target for the mean time per token after the first. Builtin engines keep it when they "
            "compute prompts beside "
            "running requests"
        ),
    },
    "elastic": {
        "mode": Meaning("`advise` only says what would change (`pdctl why --elastic`), `act` changes roles"),
        "min_prefill": Meaning("engines that keep the role at least; a hybrid counts as both"),
        "min_decode": Meaning("engines that keep the role at least; a hybrid counts as both"),
        "interval_s": Meaning("seconds between two looks"),
        "cooldown_s": Meaning("an engine keeps a new role at least so many seconds"),
    },
    "cluster": {
        "etcd": Meaning('addresses of the members of etcd, such as `["https://10.0.0.1:2379"]`'),
        "interface": Meaning(
            "what a node listens on: the name of an interface, an address, or a network such as `10.0.0.0/24`"
        ),
        "secret_file": Meaning("file with the secret that all processes of the service share, the same on every node"),
        "certificates": Meaning("folder with this node's certificate: [security](../cluster.md#security)", "none"),
        "etcd_user": Meaning("user of etcd's own access control", "none"),
        "etcd_password_file": Meaning("file with that user's password", "none"),
        "launcher": Meaning(
            "who starts `pdctl agent` on the nodes: `none`: systemd or you; `ray`: Ray; `ssh`: `pdctl up`, by ssh"
        ),
        "ssh_nodes": Meaning("hosts on which ssh starts agents, as ssh knows them; they name the nodes", "none"),
        "agent_port": Meaning("port on which agents answer each other"),
        "ttl_s": Meaning("a node that is silent for so many seconds is unknown, and its engines are asked directly"),
        "node_lost_s": Meaning("the engines of such a node are placed on other nodes after so many seconds"),
        "spare_nodes": Meaning("so many nodes may fail, and the others must have room for all engines"),
        "cells": Meaning(
            'patterns of node names, such as `["rack1-*", "rack2-*"]`: parts of a large cluster. KV and requests stay '
            "in the cell of a node, which is the first that its name matches",
            "one cell",
        ),
        "ray_address": Meaning(
            "address of Ray's head, such as `10.0.0.1:6379`", "the Ray that this machine is a node of"
        ),
        "ray_token_file": Meaning("file with Ray's token, the same on every node", "as the environment says"),
        "ray_allow_commands": Meaning("start agents with `--allow-commands`"),
    },
    "dashboard": {
        "listen": Meaning(
            "loopback address and port of the page, such as `127.0.0.1:8099`", "off; `pdctl dash` opens it"
        ),
    },
    "transfer": {
        "backend": Meaning("how KV moves: `auto` chooses the best transport that both sides support"),
        "protocol": Meaning("for `mooncake` and `nixl`; `auto`: RDMA if a device has an active port"),
        "devices": Meaning('RDMA devices, such as `["mlx5_0"]`', "all that are up"),
        "ports": Meaning(
            "`[first, last]` for `mooncake` to listen on, on every interface: protect them with a firewall", "any"
        ),
        "lease_s": Meaning(
            "seconds without a renewal by its reader after which a finished prefill's KV is freed; vLLM's "
            "`kv_lease_duration` and SGLang's timeouts follow it"
        ),
        "read_s": Meaning(
            "a read is aborted after this many seconds, in addition to the time for its bytes at 50 MB/s"
        ),
        "leased_max": Meaning("largest fraction of a KV pool that leases may hold; further prefills wait"),
        "chunked": Meaning("decode reads a prompt's first chunks while prefill computes the rest"),
    },
    "expect": {
        "rate_gbps": Meaning("speed, such as 400", "0: only that equal ports are equally fast"),
        "link_layer": Meaning("link layer"),
        "mtu": Meaning("MTU, such as 4096", "0: any, with a warning below 4096"),
        "gid_index": Meaning("GID index that must hold a RoCE v2 address", "-1: any"),
    },
    "engines": {
        "name": Meaning("name of the group; its replicas are `NAME-0`, `NAME-1` and so on"),
        "role": Meaning("what its engines do first; `hybrid`: both. [It can change](../elastic.md)"),
        "kind": Meaning(
            "which engine: [engines](../engines.md). `PDCTL_ENGINE_KINDS=NAME=PACKAGE` adds "
            "[kinds of your own](../architecture.md#engine-kinds)"
        ),
        "url": Meaning(
            "[an attached engine](../proxy.md#attached-engines): it runs already, pdctl does not start it", "none"
        ),
        "secret_file": Meaning(
            "file with the bearer token of an attached engine: its API key, or its run's secret", "none"
        ),
        "bootstrap_port": Meaning("of an attached SGLang prefill engine", "8998"),
        "replicas": Meaning("number of equal engines"),
        "nodes": Meaning("nodes of a [cluster](../cluster.md) that its engines may run on", "any"),
        "device": Meaning("where it computes", "`cuda` if `gpus` is set; else `builtin`: `cpu`, other kinds: `cuda`"),
        "gpus": Meaning(
            "driver indices, UUIDs or prefixes of them, or MIG slices; as many per replica as its parallel sizes need. "
            "[Available devices](../topology.md#available-devices)",
            "chosen: idle ones first",
        ),
        "share_gpu": Meaning("two engines on one GPU need it on both"),
        "open": Meaning(
            "true: the engine's own port serves anyone who can reach it, without the proxy's keys and limits; "
            "[other routers](../engines/behind-routers.md) need it. false: it serves only its own "
            "service, except `/health`"
        ),
        "cpus": Meaning("CPU pins; divided equally among replicas if they divide evenly", "all available"),
        "max_num_seqs": Meaning("sequences computed at once"),
        "max_num_batched_tokens": Meaning("tokens per step: the prefill chunk"),
        "kv_cache_gb": Meaning(
            "GiB of KV per engine. A `builtin` engine that has a GPU for itself takes what "
            "`gpu_memory_utilization` leaves, "
            "if this is not set"
        ),
        "block_size": Meaning("tokens per KV block; may differ between engines"),
        "prefix_caching": Meaning(
            "keep KV for [prompts with the same beginning](../kv.md#prompts-with-the-same-beginning)"
        ),
        "deterministic": Meaning(
            "a hit in the prefix cache changes [not even a bit](../kv.md#hits-and-rounding) of an answer"
        ),
        "prefix_quota": Meaning(
            "part of the kept KV that clients with one API key may have [while others need the room]"
            "(../kv.md#quotas); 1: all of it"
        ),
        "kv_offload_gb": Meaning(
            "GiB of host memory per engine for KV that its pool [has no room for](../kv.md#host-memory-and-stores)"
        ),
        "kv_events": Meaning(
            "publish over ZeroMQ which blocks can be found, for [other routers](../kv.md#events-for-routers)"
        ),
        "policy": Meaning("[which prompt is computed first](../scheduling.md)"),
        "inline_prefill": Meaning(
            "decode engines also take [whole requests](../scheduling.md#inline-prefill) where that is "
            "faster; beside prompts, "
            "running requests keep their `tpot_ms`"
        ),
        "attention": Meaning("[how attention is computed](../gpu.md#attention)"),
        "enforce_eager": Meaning("true: decode without [CUDA graphs](../gpu.md#cuda-graphs)"),
        "schedule_ahead": Meaning(
            "the next decode step is [scheduled and launched while one computes]"
            "(../scheduling.md#steps-scheduled-ahead); `auto`: on GPUs"
        ),
        "fetch_prefixes": Meaning(
            "fetch KV of a prompt's beginning [from another engine](../kv.md#prefixes-of-other-engines); `auto`: where "
            "that is predicted to be faster than to compute it"
        ),
        "speculative": Meaning(
            "[guess next tokens](../scheduling.md#guessed-tokens); further keys: `min_ngram` (2), `max_ngram` (4)",
            "off",
        ),
        "ready": Meaning("readiness probe", "the kind's own"),
        "restart_with": Meaning("when a process of these groups exits, this group is restarted, too", "none"),
        "env": Meaning(
            "added to pdctl's environment. Put secrets into the environment of `pdctl up`, not here", "none"
        ),
        "python": Meaning(
            "interpreter of the environment that has the engine. It gets neither `PYTHONPATH` nor "
            "`VIRTUAL_ENV` of pdctl; "
            "programs beside it come first in `PATH`",
            "`PDCTL_PYTHON`, else pdctl's own; [the binary](../install.md) has none",
        ),
        "args": Meaning("added to the engine's command line", "none"),
        "tensor_parallel": Meaning(
            "one engine uses as many GPUs as the product of its parallel sizes. `builtin`: as many "
            "[processes](../engines/parallel.md), on CPUs too"
        ),
        "pipeline_parallel": Meaning("see `tensor_parallel`"),
        "data_parallel": Meaning(
            "see `tensor_parallel`. `builtin`: each of the replicas is so many engines, each with its own KV"
        ),
        "sequence_parallel": Meaning(
            "`builtin`: [processes](../engines/parallel.md), each with a GPU or on CPUs, that share prompts' tokens"
        ),
        "dtype": Meaning(
            "number type. `builtin`, `auto`: bfloat16 on GPUs, and on CPUs with AVX512_BF16 or AMX where "
            "answers stay equal; "
            "else float32 ([limits](../limits.md)). The groups of a pair need the same value"
        ),
        "quantization": Meaning("as the engine names it", "none"),
        "gpu_memory_utilization": Meaning(
            "fraction of a GPU's memory that the engine may use ([memory](../gpu.md#memory)); engines on "
            "one GPU: 0.95 together",
            "the engine's own; `builtin`: 0.9",
        ),
        "connector": Meaning("how engines of this kind exchange KV", "the kind's first"),
        "store": Meaning(
            "the entry of `[[stores]]` that it uses, or its connector does; the engine starts after it. `builtin`: for "
            "[KV that the pool has no room for](../kv.md#host-memory-and-stores)",
            "none",
        ),
        "depends_on": Meaning("groups, processes and stores that must be ready before its first start", "none"),
        "process": Meaning("instead of `url`: the engine is this entry of `[[processes]]`, at its first port", "none"),
    },
    "processes": {
        "name": Meaning("its name"),
        "command": Meaning(
            "its command line. The first word is a program in `PATH`, or a path (with a slash) relative "
            "to the file's folder"
        ),
        "ports": Meaning(
            "purposes; pdctl chooses the numbers. In `command` and `env`, `{port}` is the first port, "
            "`{port:PURPOSE}` that "
            "of a purpose",
            "none",
        ),
        "ready": Meaning("readiness probe; `none`: ready at once", "`tcp` if it has a port, else `none`"),
        "alive": Meaning("liveness probe; `none`: only its exit counts", "as `ready`, if that is `tcp` or `http`"),
        "gpus": Meaning("set as `CUDA_VISIBLE_DEVICES`; engines get other GPUs unless both share them", "none"),
        "share_gpu": Meaning("as for engines"),
        "cpus": Meaning("CPU pins", "all available"),
        "env": Meaning("added to pdctl's environment", "none"),
        "depends_on": Meaning(
            "groups, processes and stores that must be ready before its first start; it is stopped before them", "none"
        ),
        "restart_with": Meaning("it is restarted when one of these exits", "none"),
    },
    "stores": {
        "name": Meaning("its name, for `engines[].store`"),
        "kind": Meaning("which store"),
        "python": Meaning("interpreter of the environment that has the store", "`PDCTL_PYTHON`, else pdctl's own"),
        "args": Meaning("added to its command line", "none"),
        "env": Meaning("added to pdctl's environment", "none"),
        "cpus": Meaning("CPU pins", "all available"),
        "data_dir": Meaning("`mooncake`: `--root_fs_dir`, a folder for blocks on disk. It must exist", "memory only"),
        "segment_gb": Meaning(
            "`mooncake`: GiB of memory that each engine adds. They hold the blocks; the store only knows where they are"
        ),
        "buffer_gb": Meaning("GiB of memory that each engine copies through; for `lmcache`, `max_local_cpu_size`"),
        "metadata": Meaning(
            "`mooncake`: with `p2p` engines find each other through the store; `http` also starts its "
            "metadata service, "
            "on all addresses"
        ),
        "chunk_tokens": Meaning("`lmcache`: tokens per object"),
    },
    "supervisor": {
        "grace_s": Meaning("grace period in seconds after each stop signal"),
        "stop_signals": Meaning("sent in this order, then SIGKILL to the whole process tree"),
        "drain_s": Meaning("limit in seconds for running requests to finish when draining"),
        "max_restarts": Meaning("more unexpected exits than this within `within_s` make the process `failed`"),
        "within_s": Meaning("see `max_restarts`"),
        "startup_s": Meaning("a process that is not ready after this is killed; this counts as a failed start"),
        "stable_s": Meaning("after being ready this long, the next restart is immediate again"),
        "liveness_s": Meaning("interval of liveness probes; 0: none"),
        "liveness_failures": Meaning("consecutive failures after which a process is killed and restarted"),
        "progress_s": Meaning("an engine hangs if it runs requests but computes nothing for this long; 0: no check"),
        "functional_s": Meaning("interval of one-token requests to an idle engine; 0: none"),
        "on_supervisor_death": Meaning(
            "`survive`: engines keep running, and the next `pdctl up` "
            "[takes them over](../supervision.md#when-the-supervisor-is-killed)"
        ),
        "log_mb": Meaning("size limit of each process's log; its older half then moves to a second file"),
    },
}
