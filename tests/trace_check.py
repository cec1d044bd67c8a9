"""The hand-over protocol's rules, checked on the events of real engines.

1. A lease is granted once and ends at most once.
2. A reception decodes only after a successful commit at the engine that granted the lease.
3. A commit succeeds only while the lease is live: granted, claimed by the same holder, not ended before.
4. Nothing happens to a reception after it was lost or started to decode.
"""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]


def check(events: list[Event]) -> int:
    """Raise AssertionError with the event that breaks a rule; returns the number of events read."""
    events = sorted(events, key=lambda event: event["at"])
    granted: dict[str, str] = {}
    claimed: dict[str, str] = {}
    committed: set[str] = set()
    ended: set[str] = set()
    final: dict[tuple[str, str, str], str] = {}
    for event in events:
        lease, kind = event["lease"], event["event"]
        if kind == "grant":
            assert lease not in granted, f"granted twice: {event}"
            granted[lease] = event["epoch"]
        elif kind == "claim" and event["ok"]:
            assert lease in granted, f"claimed without grant: {event}"
            assert lease not in ended, f"claimed after its end: {event}"
            assert claimed.get(lease, event["holder"]) == event["holder"], f"two holders: {event}"
            claimed[lease] = event["holder"]
        elif kind == "commit" and event["ok"]:
            assert claimed.get(lease) == event["holder"], f"committed by a stranger: {event}"
            assert lease in committed or lease not in ended, f"committed after its end: {event}"
            committed.add(lease)
        elif kind == "ended":
            assert lease in granted, f"ended without grant: {event}"
            assert lease not in ended, f"ended twice: {event}"
            ended.add(lease)
        elif kind == "advance":
            key = (event["engine"], event["epoch"], event["request"])
            assert key not in final or final[key] == event["phase"], f"moved after its end: {event}"
            if event["phase"] == "decoding":
                assert lease in committed, f"decoded uncertified KV: {event}"
            if event["phase"] in ("decoding", "lost"):
                final[key] = event["phase"]
    return len(events)
