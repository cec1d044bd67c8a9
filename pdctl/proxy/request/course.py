"""The course of one leg: which engines compute its next part, and what follows a failure. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.proxy.engines.breaker import RetryBudget
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.fleet import Fleet
from pdctl.proxy.engines.inline import Why
from pdctl.proxy.engines.routing import Ask, EnginePair, RoutingPolicy, choose
from pdctl.proxy.request.failover import ComputeAlone, Decision, FailoverPolicy, Failure, Tries, decide


class Course:
    """The failures of a leg so far: `avoid`: engines that its next try must not use; `alone`: one engine computes the
    rest."""

    # Only a leg that fails changes these: a frozen record per request costs more than a microsecond.
    tries: Tries | None = None
    avoid: frozenset[str] = frozenset()
    alone = False

    def pair(self, fleet: Fleet, policy: RoutingPolicy, ask: Ask, pieces: Sequence[int]) -> EnginePair | None:
        """The engines of the next try; None if no engine is available."""
        if not self.avoid and (only := fleet.only_pair()) is not None:
            return only
        return choose(policy, fleet.views(pieces), ask, self.avoid, self.alone)

    def inline(self, fleet: Fleet, pair: EnginePair, ask: Ask, pieces: Sequence[int]) -> tuple[str, Why] | None:
        """The decode engine that computes the request instead of the pair, and why; None if none does."""
        return fleet.inline(pair, ask.size, pieces, self.avoid, ask.tpot_s)

    def may_be_inline(self, fleet: Fleet, pair: EnginePair) -> bool:
        """Whether `inline` is to be asked."""
        return not (self.alone or pair.is_one) and fleet.has_inline

    def one_engine(self, prefill: Engine, decode: Engine, has_one_token_left: bool) -> Engine | None:
        """The engine that computes the rest without a hand-over; None for a pair."""
        if prefill is decode or (has_one_token_left and prefill.dialect.pairing.one_token_alone):
            return prefill
        if not self.alone:
            return None
        return next((one for one in (prefill, decode) if one.address.role in one.dialect.pairing.alone), None)

    def failed(
        self,
        failure: Failure,
        sent: int,
        received_at: float,
        now: float,
        budget: RetryBudget,
        chance: float,
        policy: FailoverPolicy,
    ) -> Decision:
        """A call failed. `sent`: how much of the answer the client has; see `failover.decide`."""
        tries = self.tries or Tries(progress_at=received_at)
        self.tries, decision = decide(tries, failure, sent, now, budget, chance, policy)
        self.avoid = self.tries.avoid
        self.alone = self.alone or isinstance(decision, ComputeAlone)
        return decision
