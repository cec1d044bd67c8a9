"""All parts of this engine's side of shared beginnings of prompts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.offers import OfferDesk
from pdctl.engine.front.handover.peers import Peers
from pdctl.engine.front.handover.receiver import Receiver
from pdctl.engine.front.prefixes.directory import Directory
from pdctl.engine.front.prefixes.feed import BlockFeed
from pdctl.engine.front.prefixes.fetching import PrefixFetcher
from pdctl.engine.front.prefixes.following import Follower
from pdctl.engine.front.prefixes.lending import LendingDesk
from pdctl.engine.options import EngineOptions


@dataclass(frozen=True, slots=True)
class PrefixDesk:
    """What an engine with `fetch_prefixes` has."""

    feed: BlockFeed
    directory: Directory
    follower: Follower
    lending: LendingDesk
    fetcher: PrefixFetcher

    def counts(self) -> dict[str, int]:
        """What was fetched and lent since the start, for metrics."""
        totals = self.fetcher.totals
        return {
            "prefixes_fetched": totals.prefixes,
            "prefix_tokens_fetched": totals.tokens,
            "prefixes_lost": totals.lost,
            "prefixes_lent": self.lending.lent,
            "prefix_blocks_known": self.directory.size,
        }


def prefix_desk(
    options: EngineOptions,
    core: CoreClient,
    leases: LeaseDesk,
    desk: OfferDesk,
    peers: Peers,
    links: LinkBook,
    receiver: Receiver,
    tasks: asyncio.TaskGroup,
) -> PrefixDesk | None:
    """None: the engine neither fetches nor lends."""
    if options.fetch_prefixes == "false":
        return None
    feed, directory = BlockFeed(options.epoch), Directory()
    fetcher = PrefixFetcher(core, feed, directory, peers, links, receiver, always=options.fetch_prefixes == "true")
    follower = Follower(peers, directory, tasks)
    return PrefixDesk(feed, directory, follower, LendingDesk(core, leases, desk), fetcher)
