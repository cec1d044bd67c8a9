"""Answers of the control API about what uses a service (API keys, and KV), and about its logs."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdctl.control_api.meanings import says


class KeyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An API key, counted since the start of each proxy worker."""

    name: Annotated[str, says("its name; the key itself is not stored")]
    weight: Annotated[float, says("its share of the engines, relative to other keys")]
    priority: Annotated[int, says("its class, lower goes first")]
    running: Annotated[int, says("its answers that the engines work on")]
    waiting: Annotated[int, says("its answers that wait in the proxy")]
    requests: Annotated[int, says("requests, answered or not")]
    refused: Annotated[int, says("those refused with 429: by a limit, or because too many requests waited")]
    prompt_tokens: Annotated[int, says("tokens of its prompts")]
    cached_tokens: Annotated[int, says("those found in a prefix cache")]
    output_tokens: Annotated[int, says("tokens of its answers")]
    queue_s: Annotated[float, says("mean seconds that its requests waited in the proxy")]
    ttft_s: Annotated[float | None, says("mean seconds to the first token; null without one")]
    requests_per_minute: Annotated[int | None, says("its limit; null for none")]
    requests_left: Annotated[int | None, says("requests that it may send now; null without that limit")]
    tokens_per_minute: Annotated[int | None, says("its limit; null for none")]
    tokens_left: Annotated[int | None, says("tokens that it may use now; null without that limit")]
    streams: Annotated[int | None, says("answers that it may have at once; null for any number")]


class KeysStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The API keys of a service."""

    keys: Annotated[tuple[KeyStatus, ...], says("by name")]


class EngineBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """The use of an engine's KV blocks. The total is the sum of free, referenced, leased and quarantined."""

    name: Annotated[str, says("the engine")]
    blocks_total: Annotated[int, says("all")]
    blocks_free: Annotated[int, says("free")]
    blocks_cached: Annotated[int, says("those of the free ones that keep KV for prompts with the same beginning")]
    blocks_referenced: Annotated[int, says("in use by requests")]
    blocks_leased: Annotated[int, says("kept for peers under a lease")]
    blocks_quarantined: Annotated[int, says("a late transfer may still write there")]
    blocks_reserved: Annotated[int, says("those in use that wait for KV to arrive")]
    counters: Annotated[
        dict[str, int], says("more counts since the engine's start, such as `prefix_hits`, or vLLM's `expired_leases`")
    ]


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """One live lease."""

    id: Annotated[str, says("its id, for `pdctl kv --revoke`")]
    request_id: Annotated[str, says("the request that it belongs to")]
    holder: Annotated[str, says("the process that holds it: name and epoch")]
    state: Annotated[str, says("`held` or `claimed`")]
    age_s: Annotated[float, says("seconds since it was granted")]
    quiet_s: Annotated[float, says("seconds since the holder's last sign of life")]
    blocks: Annotated[int, says("KV blocks")]
    bytes: Annotated[int, says("of KV")]
    leak: Annotated[str, says("why it counts as a leak, or empty")]
    engine: Annotated[str, says("the engine that granted it")]


class KvStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The KV of a service: blocks per engine, and leases."""

    engines: Annotated[tuple[EngineBlocks, ...], says("engines that answered")]
    leases: Annotated[tuple[Lease, ...], says("all live leases")]
    unreachable: Annotated[dict[str, str], says("engines that did not answer, each with the reason")]

    def leaks_alone(self) -> KvStatus:
        """The same, with only those leases that are leaks."""
        return msgspec.structs.replace(self, leases=tuple(lease for lease in self.leases if lease.leak))


class LogNames(msgspec.Struct, frozen=True, kw_only=True):
    """The processes that have logs."""

    names: Annotated[dict[str, tuple[str, ...]], says("names by node; on one machine, the node is empty")]
    silent: Annotated[dict[str, str], says("nodes that did not answer, each with the reason")] = {}


class LogPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a process's log."""

    place: Annotated[str, says("where the next piece begins")]
    text: Annotated[str, says("whole lines")]
    more: Annotated[bool, says("whether there may be more by now")]
