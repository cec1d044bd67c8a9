"""The command line of an engine, shared by front and core."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from pdctl.names.attention import ATTENTION_NAMES
from pdctl.names.parsers import REASONING_PARSERS, TOOL_PARSERS
from pdctl.names.policies import FETCH_PREFIXES, KV_EVENTS, POLICY_NAMES, SCHEDULE_AHEAD
from pdctl.net import LOOPBACK
from pdctl.speculative import parse_speculative


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of `python -m pdctl.engine serve`. Units are tokens, GiB and seconds, as named."""

    name: str
    model: str
    served_model_name: str
    host: str
    port: int
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_gb: float
    gpu_memory_utilization: float
    block_size: int
    prefix_caching: bool
    deterministic: bool
    prefix_quota: float
    kv_offload_gb: float
    store: str
    kv_events: str
    kv_events_port: int
    kv_replay_port: int
    policy: str
    inline_prefill: bool
    attention: str
    enforce_eager: bool
    schedule_ahead: str
    fetch_prefixes: str
    speculative: str
    tensor_parallel: int
    pipeline_parallel: int
    sequence_parallel: int
    rank_cpus: str
    transfer: str
    transfer_protocol: str
    transfer_devices: str
    transfer_ports: str
    lease_s: float
    read_s: float
    leased_max: float
    chunked: bool
    open: bool
    tool_parser: str
    reasoning_parser: str
    otlp_endpoint: str
    run_dir: Path
    epoch: str
    front_pid: int
    rank: int
    rank_fd: int

    @property
    def schedules_ahead(self) -> bool:
        """Whether the next step is scheduled while one computes. Not over several devices: tokens would have to be
        sent to the others first."""
        is_alone = self.num_ranks == 1
        return self.schedule_ahead == "true" or (self.schedule_ahead == "auto" and self.device == "cuda" and is_alone)

    @property
    def has_tiers(self) -> bool:
        """Whether KV is kept elsewhere than in the pool."""
        return bool(self.kv_offload_gb or self.store)

    @property
    def num_ranks(self) -> int:
        """Processes that share the model."""
        return self.tensor_parallel * self.pipeline_parallel * self.sequence_parallel

    @property
    def cpus_of_rank(self) -> set[int]:
        """The CPUs of this rank; empty for those of the engine."""
        if not self.rank_cpus:
            return set()
        return {int(number) for number in self.rank_cpus.split(";")[self.rank].split(",")}

    @property
    def port_range(self) -> tuple[int, int] | None:
        """First and last port that transports may listen on; None for any."""
        first, _, last = self.transfer_ports.partition("-")
        return (int(first), int(last)) if last else None

    def to_argv(self) -> list[str]:
        """The same options as arguments, for the core."""
        words: list[str] = []
        for name in self.__slots__:
            words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        return words


def _boolean(word: str) -> bool:
    return word.lower() == "true"


def _speculative(word: str) -> str:
    try:
        parse_speculative(word)
    except ValueError as failure:
        raise argparse.ArgumentTypeError(str(failure)) from failure
    return word


def _add_prefixes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefix-caching", type=_boolean, default=True, help="keep KV for prompts with the same beginning"
    )
    parser.add_argument(
        "--deterministic", type=_boolean, default=False, help="KV that is found has the bits of KV that is computed"
    )
    parser.add_argument(
        "--prefix-quota", type=float, default=1.0,
        help="fraction of the kept KV that one API key may have while others need the room",
    )  # fmt: skip
    parser.add_argument(
        "--kv-offload-gb", type=float, default=0.0, help="host memory for KV that the pool has no room for"
    )
    parser.add_argument("--store", default="", help="kind of a KV store that engines share; its file: see docs")
    parser.add_argument(
        "--kv-events", choices=KV_EVENTS, default="off", help="publish which blocks of KV can be found, over ZeroMQ"
    )
    parser.add_argument("--kv-events-port", type=int, default=5557, help="for subscribers to --kv-events")
    parser.add_argument("--kv-replay-port", type=int, default=5558, help="for events that a subscriber has missed")
    parser.add_argument(
        "--fetch-prefixes", choices=FETCH_PREFIXES, default="false",
        help="fetch KV of a prompt's beginning from another engine; auto: where that is predicted to be faster",
    )  # fmt: skip


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="devices that share each layer, one process each"
    )
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="groups of these, which share the layers")
    parser.add_argument("--sequence-parallel", type=int, default=1, help="processes that share the rows of prompts")
    parser.add_argument(
        "--rank-cpus", default="", help="the CPUs of each of these processes: 0,1;2,3; default: the engine's"
    )


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transfer", default="auto")
    parser.add_argument("--transfer-protocol", choices=["auto", "tcp", "rdma"], default="auto")
    parser.add_argument(
        "--transfer-devices", default="", help="RDMA devices, comma-separated; default: all active ones"
    )
    parser.add_argument("--transfer-ports", default="", help="port range FIRST-LAST for transports to listen on")
    parser.add_argument("--lease-s", type=float, default=30.0)
    parser.add_argument("--read-s", type=float, default=5.0, help="seconds after which a KV read is aborted")
    parser.add_argument(
        "--leased-max", type=float, default=0.75, help="fraction of the KV pool that may be leased to peers"
    )
    parser.add_argument(
        "--chunked", type=_boolean, default=True, help="let peers read KV chunk by chunk during prefill"
    )


def parse(argv: list[str]) -> EngineOptions:
    """Parse the options. Raises SystemExit(2) with usage, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m pdctl.engine serve")
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", required=True, help="a local Hugging Face directory")
    parser.add_argument("--served-model-name", default="")
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-cache-gb", type=float, default=1.0)
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.0,
        help="fraction of a GPU's memory to use, for KV what is left of it; 0: --kv-cache-gb is the size",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, default=16)
    _add_prefixes(parser)
    parser.add_argument("--policy", choices=POLICY_NAMES, default="fcfs", help="which prompt is computed first")
    parser.add_argument(
        "--inline-prefill", type=_boolean, default=True, help="keep the TPOT target of requests beside prompts"
    )
    parser.add_argument("--attention", choices=ATTENTION_NAMES, default="auto", help="how attention is computed")
    parser.add_argument("--enforce-eager", type=_boolean, default=False, help="do not use CUDA graphs")
    parser.add_argument(
        "--schedule-ahead", choices=SCHEDULE_AHEAD, default="auto",
        help="schedule and launch the next step while one computes; auto: on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--speculative", type=_speculative, default="", help='guess tokens: {"kind": "ngram", "tokens": 4}'
    )
    _add_parallel(parser)
    _add_transfer(parser)
    parser.add_argument("--open", type=_boolean, default=False, help="also serve callers without this run's secret")
    parser.add_argument("--tool-parser", choices=TOOL_PARSERS, default="auto")
    parser.add_argument("--reasoning-parser", choices=REASONING_PARSERS, default="auto")
    parser.add_argument("--otlp-endpoint", default="", help="OpenTelemetry collector for spans, over HTTP")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--epoch", default="", help="set by the front for its core")
    parser.add_argument("--front-pid", type=int, default=0, help="set by the front for its core")
    parser.add_argument("--rank", type=int, default=0, help="set by the core for its other ranks")
    parser.add_argument("--rank-fd", type=int, default=-1, help="set by the core for its other ranks")
    found = vars(parser.parse_args(argv))
    found["served_model_name"] = found["served_model_name"] or Path(found["model"]).name
    return EngineOptions(**found)
