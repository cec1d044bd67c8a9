"""All parts of this engine's side of shared beginnings of prompts: what proxies are told, and what engines share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.offers import OfferDesk
from pdctl.engine.front.handover.peers import Peers
from pdctl.engine.front.handover.receiver import Receiver
from pdctl.engine.front.prefixes.anywhere import Anywhere
from pdctl.engine.front.prefixes.bringing import Bringer
from pdctl.engine.front.prefixes.directory import Directory
from pdctl.engine.front.prefixes.feed import BlockFeed, Feed
from pdctl.engine.front.prefixes.fetching import PrefixFetcher
from pdctl.engine.front.prefixes.following import Follower
from pdctl.engine.front.prefixes.lending import LendingDesk
from pdctl.engine.front.prefixes.names import BlockNames
from pdctl.engine.front.prefixes.pieces import PieceIndex
from pdctl.engine.front.prefixes.prompt import Source
from pdctl.engine.front.prefixes.tiers import TierLoader
from pdctl.engine.ipc.messages import KvChange
from pdctl.engine.options import EngineOptions


@dataclass(frozen=True, slots=True)
class Sharing:
    """What an engine with `fetch_prefixes` has."""

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


@dataclass(frozen=True, slots=True)
class PrefixDesk:
    """What an engine with a prefix cache has. `sharing`: None: it neither fetches nor lends; `loader`: None: it has no
    tiers; `bringer`: None: neither."""

    blocks: BlockFeed
    pieces: PieceIndex
    anywhere: Anywhere
    sharing: Sharing | None
    loader: TierLoader | None
    bringer: Bringer | None

    def take(self, changes: list[KvChange]) -> None:
        """Note changes of the prefix cache, in order."""
        self.blocks.take(changes)
        self.pieces.take(self.anywhere.pool_changed(changes))

    def take_offloaded(self, came: list[bytes], went: list[bytes]) -> None:
        """Note changes of the memory beside the pool."""
        self.pieces.take(self.anywhere.beside_changed(came, went))

    def close(self) -> None:
        """Answer all who wait: the engine ends."""
        self.blocks.close()
        self.pieces.told.close()

    def counts(self) -> dict[str, int]:
        """What was fetched and lent since the start, for metrics."""
        shared = self.sharing.counts() if self.sharing is not None else {}
        if self.loader is None:
            return shared
        totals = self.loader.totals
        loaded = {"prefixes": totals.prefixes, "prefix_tokens": totals.tokens, "loads_lost": totals.lost}
        return {**shared, **{f"tier_{name}": count for name, count in loaded.items()}}


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
    """None: the engine has no prefix cache."""
    if not options.prefix_caching:
        return None
    names, blocks, anywhere = BlockNames(core), BlockFeed(options.epoch), Anywhere()
    pieces = PieceIndex(anywhere, Feed(options.epoch), names)
    loader = TierLoader(core) if options.has_tiers else None
    sharing = None
    if options.fetch_prefixes != "false":
        directory = Directory()
        fetcher = PrefixFetcher(core, directory, peers, links, receiver)
        follower = Follower(peers, directory, tasks)
        sharing = Sharing(directory, follower, LendingDesk(core, leases, desk), fetcher)
    sources: list[Source] = [*([loader] if loader else []), *([sharing.fetcher] if sharing else [])]
    always = options.fetch_prefixes == "true"
    bringer = Bringer(core, blocks, names, sources, always) if sources else None
    return PrefixDesk(blocks, pieces, anywhere, sharing, loader, bringer)
