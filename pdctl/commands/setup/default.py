"""The default topology for this machine: `init` writes it, and `up` runs it when there is no file."""

from __future__ import annotations

from pdctl.host import Gpu, Host
from pdctl.host.models import SAMPLE_PREFIX

MODEL = SAMPLE_PREFIX + "gemma-3-270m"


def default_text(host: Host) -> str:
    """A commented topology with one prefill and one decode engine, on the GPUs if there are any, else on the CPU."""
    gpus = len(host.gpus)
    if gpus:
        found = f"{gpus} GPU" + ("s" if gpus > 1 else "") + f" ({host.gpus[0].name})"
        # Idle GPUs first.
        names = [_gpu_name(gpu) for gpu in sorted(host.gpus, key=lambda gpu: bool(host.gpu_holders.get(gpu.uuid)))]
        prefill, decode = _gpu_keys(names[0], gpus), _gpu_keys(names[1 % gpus], gpus)
    else:
        found = f"no GPU, {len(host.cpus)} CPUs"
        half = len(host.cpus) // 2
        prefill, decode = _cpu_keys(host.cpus[:half]), _cpu_keys(host.cpus[half:] if half else ())
    return _TEMPLATE.format(found=found, model=MODEL, prefill=prefill, decode=decode)


def _cpu_keys(cpus: tuple[int, ...]) -> str:
    pin = f"cpus = {list(cpus)}\n" if cpus else "# cpus = [0]                       # pin to CPUs\n"
    return f'device = "cpu"\n{pin}kv_cache_gb = 1.0'


def _gpu_name(gpu: Gpu) -> str:
    """The GPU's name in a topology."""
    return str(gpu.index) if gpu.index >= 0 else f'"{gpu.uuid}"'


def _gpu_keys(index: str, gpus: int) -> str:
    share = "share_gpu = true                   # both engines on one GPU\n" if gpus == 1 else ""
    part = 0.45 if gpus == 1 else 0.9
    return f'device = "cuda"\ngpus = [{index}]\n{share}gpu_memory_utilization = {part:<9} # KV gets what is left of it'


_TEMPLATE = """\
# pdctl topology, generated for this machine: {found}.
# `pdctl plan` shows what it would start; `pdctl up` starts it.

[service]
name = "pdctl"
model = "{model}"     # sample:NAME | a Hugging Face directory | a Hub id
max_model_len = 2048               # tokens, prompt and output together

[proxy]
host = "127.0.0.1"                 # "0.0.0.0" also accepts other machines
port = 8000
routing = "min_expected_latency"   # docs/proxy.md lists the others

[transfer]
backend = "auto"                   # how KV moves between engines: auto | cuda_ipc | shm | mooncake | nixl
lease_s = 30                       # KV that no engine fetches is freed after this

[[engines]]
name = "prefill"
role = "prefill"                   # prefill | decode | hybrid
replicas = 1
{prefill}
max_num_seqs = 8
max_num_batched_tokens = 512       # prefill chunk: tokens per step

[[engines]]
name = "decode"
role = "decode"
replicas = 1
{decode}
max_num_seqs = 32

[supervisor]
grace_s = 30                       # seconds between SIGTERM and SIGKILL
"""
