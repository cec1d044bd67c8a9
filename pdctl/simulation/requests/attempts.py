"""One try of a request, by one engine alone or by a pair: the calls, their accounts, and the hand-over.

The decode side of a hand-over is the shipped state machine (`engine.handover.reception`); a read takes the time of its
bytes. Leases are renewed as long as their reader lives, so here they end only with an engine.
"""

from __future__ import annotations

from collections.abc import Sequence as Pieces
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pdctl.engine.handover.reception import Action, Reception, ReceptionEvent, advance
from pdctl.engine.ipc.messages import Failed, Held, Progress, Sampling, Token
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.engine.virtual import TOKEN
from pdctl.proxy.engines.accounts import AnswerLoad, PromptLoad, unreachable
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.request.failover import Cause, Failure

if TYPE_CHECKING:
    from pdctl.simulation.engines.node import Node
    from pdctl.simulation.requests.wires import Wires


class Wanted(NamedTuple):
    """What a request still needs. `prompt`: its token ids; `emitted`: tokens that the client has; `outputs`: of the
    whole answer; `size`: of the prompt in bytes; `pieces`: its prefixes."""

    prompt: list[int]
    emitted: int
    outputs: int
    size: float
    pieces: Pieces[int]
    ttft_s: float
    tpot_s: float

    def sequence(self, name: str, hold: bool = False, offer: bool = False, kv_tokens: int = 0) -> Sequence:
        """The request as an engine schedules it. `kv_tokens`: of KV that a peer has."""
        tokens = self.prompt + [TOKEN] * self.emitted
        status = Status.AWAITING_BLOCKS if kv_tokens else Status.WAITING
        return Sequence(
            name, tokens, len(self.prompt), Sampling(self.outputs), hold=hold, offer=offer, kv_tokens=kv_tokens,
            status=status, ttft_s=self.ttft_s, tpot_s=self.tpot_s,
        )  # fmt: skip


class Client(Protocol):
    """Who wants the answer."""

    def token(self) -> None:
        """A token is here."""

    def done(self, prefill: str, decode: str) -> None:
        """The answer is complete."""

    def failed(self, engine: Engine, failure: Failure) -> None:
        """The try failed."""


class Place(NamedTuple):
    """An engine, and what the router knows of it."""

    node: Node
    engine: Engine


class Solo:
    """One engine computes all that is left."""

    def __init__(self, name: str, wanted: Wanted, place: Place, wires: Wires, client: Client) -> None:
        self.name, self._wanted, self._place, self._wires, self._client = name, wanted, place, wires, client
        self._stream = _Stream(wires, place.engine, wanted, with_prompt=True)
        self._is_over = False
        wires.patience(place.engine, self._too_long)
        wires.call(place, self._arrive, self._not_reached)

    def token(self, node: Node, token: Token) -> None:
        """See Call."""
        self._stream.token(0.0)
        self._client.token()
        if token.finish_reason:
            self._stream.end(done=True)
            self._is_over = True
            self._client.done(node.name, node.name)

    def refused(self, node: Node, failed: Failed) -> None:
        """See Call."""
        self._fail(Cause.REFUSED, failed.reason)

    def lost(self, node: Node) -> None:
        """See Call."""
        unreachable(self._place.engine, self._wires.time())
        self._fail(Cause.BROKE, f"{node.name} died")

    def given_back(self, node: Node) -> None:
        """See Call."""
        raise AssertionError(node.name)

    def held(self, node: Node, held: Held) -> None:
        """See Call."""
        raise AssertionError(held)

    def progress(self, node: Node, done: Progress) -> None:
        """See Call."""
        raise AssertionError(done)

    def withdrawn(self, node: Node) -> None:
        """See Call."""
        raise AssertionError(node.name)

    def reserved(self, node: Node, sequence: Sequence) -> None:
        """See Call."""
        raise AssertionError(sequence.request_id)

    def _arrive(self) -> None:
        if not self._is_over:
            self._place.node.add(self._wanted.sequence(self.name), self)

    def _not_reached(self) -> None:
        if not self._is_over:
            unreachable(self._place.engine, self._wires.time())
            self._fail(Cause.NOT_REACHED, f"{self._place.node.name} cannot be reached")

    def _too_long(self) -> None:
        if not self._is_over and not self._stream.has_begun:
            unreachable(self._place.engine, self._wires.time())
            self._place.node.abort(self.name)
            self._fail(Cause.BROKE, f"{self._place.node.name} sent nothing")

    def _fail(self, cause: Cause, reason: str) -> None:
        self._is_over = True
        self._stream.end(done=False)
        self._client.failed(self._place.engine, Failure(self._place.node.name, cause, reason))


class Pair:
    """A prefill engine computes the prompt and one token, a decode engine reads the KV and computes the rest."""

    def __init__(self, name: str, wanted: Wanted, prefill: Place, decode: Place, wires: Wires, client: Client) -> None:
        self.name, self._wanted, self._wires, self._client = name, wanted, wires, client
        self._prefill, self._decode = prefill, decode
        self._prompt: PromptLoad | None = PromptLoad(wires.fleet, prefill.engine, wanted.size, wires.time())
        self._stream: _Stream | None = None
        self._prefilled_at = 0.0
        self._reading: _Reading | None = None
        self._readings = 0
        self._may_announce = True
        self._is_over = False
        wires.patience(prefill.engine, self._too_long)
        wires.call(prefill, self._arrive, partial(self._not_reached, prefill))

    # -- the engines' side ---------------------------------------------------------------------------------

    def token(self, node: Node, token: Token) -> None:
        """See Call."""
        if self._stream is None:
            # The prompt's token was the last one.
            self._prompted()
            self._client.token()
            self._is_over = True
            self._client.done(node.name, node.name)
            return
        self._stream.token(self._prefilled_at)
        self._client.token()
        if token.finish_reason:
            self._decode.engine.handed_over(self._prefill.node.name, self._prefilled_at, self._wires.time(), good=True)
            self._stream.end(done=True)
            self._is_over = True
            self._client.done(self._prefill.node.name, node.name)

    def progress(self, node: Node, done: Progress) -> None:
        """See Call."""
        if self._reading is None and self._may_announce and self._decode.node.is_up:
            self._may_announce = False
            tokens = self._wanted.sequence("").token_ids
            self._read_by(Sequence(
                "", tokens, 0, Sampling(1), kv_tokens=len(tokens), status=Status.AWAITING_BLOCKS
            ))  # fmt: skip
        if self._reading is not None:
            self._reading.advance(ReceptionEvent.OFFERED, done.num_computed)

    def withdrawn(self, node: Node) -> None:
        """See Call."""
        if self._reading is not None:
            self._reading.advance(ReceptionEvent.LEASE_GONE)

    def held(self, node: Node, held: Held) -> None:
        """See Call."""
        self._prompted()
        self._client.token()
        self._wanted = self._wanted._replace(emitted=self._wanted.emitted + 1)
        self._stream = _Stream(self._wires, self._decode.engine, self._wanted, with_prompt=False)
        self._wires.call(
            self._decode, partial(self._hand_over, held.num_tokens), partial(self._not_reached, self._decode)
        )

    def reserved(self, node: Node, sequence: Sequence) -> None:
        """See Call."""
        assert self._reading is not None
        self._reading.advance(ReceptionEvent.RESERVED, sequence.num_cached)

    def refused(self, node: Node, failed: Failed) -> None:
        """See Call."""
        if node is self._decode.node and self._stream is None:
            # Only the announcement; the request itself is still to come.
            self._reading = None
        else:
            self._fail(node, Cause.REFUSED, failed.reason)

    def given_back(self, node: Node) -> None:
        """See Call."""
        # As the proxy takes a refusal by the role's epoch.
        self._fail(node, Cause.NOT_REACHED, f"{node.name} has another role")

    def lost(self, node: Node) -> None:
        """See Call."""
        if self._is_over:
            return
        if node is self._decode.node and self._stream is None:
            self._reading = None
        elif node is self._prefill.node and self._stream is not None:
            # The prompt is computed: what is lost is its KV, if it is not at the decode engine yet.
            if self._reading is None:
                self._kv_lost(f"{node.name} died")
            else:
                self._reading.advance(ReceptionEvent.LEASE_GONE)
        else:
            unreachable((self._prefill if self._stream is None else self._decode).engine, self._wires.time())
            self._fail(node, Cause.BROKE, f"{node.name} died")

    # -- the hand-over -------------------------------------------------------------------------------------

    def holds(self) -> bool:
        """Whether the prefill engine has the KV."""
        return self._prefill.node.calls.get(self.name) is self

    def moved(self) -> None:
        """The decode engine has the KV, and goes on with it."""
        self._prefill.node.abort(self.name)

    def not_moved(self, reason: str) -> None:
        """The KV is lost for the decode engine."""
        self._reading = None
        if self._stream is not None:
            self._kv_lost(reason)

    def _arrive(self) -> None:
        if self._is_over:
            return
        sequence = self._wanted.sequence(self.name, hold=True, offer=self._wires.transfer.chunked)
        self._prefill.node.add(sequence, self)

    def _hand_over(self, kv_tokens: int) -> None:
        """The request arrives at the decode engine."""
        if self._is_over:
            return
        sequence = self._wanted.sequence("", kv_tokens=kv_tokens)
        if self._reading is None:
            self._read_by(sequence)
        else:
            sequence.request_id = self._reading.name
            self._decode.node.add(sequence, self)
        if (reading := self._reading) is not None:
            reading.advance(ReceptionEvent.SEALED, kv_tokens)
            # Two engines that wait for each other's blocks, for instance.
            self._wires.time.after(self._wires.transfer.deadline_s, partial(reading.advance, ReceptionEvent.DEADLINE))

    def _read_by(self, sequence: Sequence) -> None:
        """Have the decode engine reserve blocks, and read into them."""
        self._readings += 1
        # A reservation that was given up may still be written to, so the next one has another name.
        sequence.request_id = f"{self.name}.{self._readings}"
        self._reading = _Reading(self, sequence.request_id, self._decode.node, self._wires)
        self._reading.advance(ReceptionEvent.CLAIM_OK)
        self._decode.node.add(sequence, self)

    # -- the router's side ---------------------------------------------------------------------------------

    def _prompted(self) -> None:
        """The prefill call is answered."""
        now = self._wires.time()
        assert self._prompt is not None
        self._prompt.end(now, done=True)
        self._prefill.engine.breaker.abandoned()
        self._prompt.answered(now, self._wanted.pieces)
        self._prompt, self._prefilled_at = None, now

    def _not_reached(self, place: Place) -> None:
        if not self._is_over:
            unreachable(place.engine, self._wires.time())
            self._fail(place.node, Cause.NOT_REACHED, f"{place.node.name} cannot be reached")

    def _too_long(self) -> None:
        if not self._is_over and self._prompt is not None:
            unreachable(self._prefill.engine, self._wires.time())
            self._fail(self._prefill.node, Cause.BROKE, f"{self._prefill.node.name} sent nothing")

    def _kv_lost(self, reason: str) -> None:
        self._decode.engine.handed_over(self._prefill.node.name, self._prefilled_at, self._wires.time(), good=False)
        self._fail(self._decode.node, Cause.KV_LOST, reason)

    def _fail(self, node: Node, cause: Cause, reason: str) -> None:
        """Give up this try, with all that it has anywhere."""
        assert not self._is_over
        self._is_over = True
        now = self._wires.time()
        if self._prompt is not None:
            self._prompt.end(now, done=False)
        if self._stream is not None:
            self._stream.end(done=False)
        self._prefill.node.abort(self.name)
        if self._reading is not None:
            self._reading.advance(ReceptionEvent.CANCELLED)
            self._decode.node.abort(self._reading.name)
        place = self._prefill if node is self._prefill.node else self._decode
        self._client.failed(place.engine, Failure(node.name, cause, reason))


class _Reading:
    """The decode side of a hand-over, in one life of its engine."""

    def __init__(self, pair: Pair, name: str, node: Node, wires: Wires) -> None:
        self.name = name
        self._pair, self._node, self._wires = pair, node, wires
        self._engine = node.engine
        self._state = Reception()

    def advance(self, event: ReceptionEvent, tokens: int = 0) -> None:
        """Something happened to it."""
        self._state, actions = advance(self._state, event, tokens)
        for action in actions:
            if action is Action.READ:
                self._read(self._state.asked - self._state.read)
            elif action is Action.COMMIT:
                self._wires.after_call(self._commit)
            elif action is Action.DECODE:
                self._engine.start(self.name)
                self._pair.moved()
            elif action is Action.DROP_BLOCKS:
                self._node.abort(self.name)
            elif event is not ReceptionEvent.CANCELLED:
                self._pair.not_moved(self._state.reason)

    def _read(self, tokens: int) -> None:
        if self._engine.scheduler.pull_started(self.name):
            self._wires.read(self._node, tokens, self._was_read)

    def _was_read(self) -> None:
        # Also if it was aborted meanwhile: its blocks are freed now.
        self._engine.pull_ended(self.name)
        if not self._engine.is_dead:
            self.advance(ReceptionEvent.READ_OK)

    def _commit(self) -> None:
        if not self._engine.is_dead:
            self.advance(ReceptionEvent.COMMIT_OK if self._pair.holds() else ReceptionEvent.COMMIT_REFUSED)


class _Stream:
    """The accounts of a decode call."""

    def __init__(self, wires: Wires, engine: Engine, wanted: Wanted, with_prompt: bool) -> None:
        self._wires, self._engine, self._wanted = wires, engine, wanted
        self._load = AnswerLoad(wires.fleet, engine, wanted.size, with_prompt, wires.time())
        self._tokens = 0
        self._first_at = self._last_at = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether a token is here."""
        return self._tokens > 0

    def token(self, prefilled_at: float) -> None:
        """A token is here. `prefilled_at`: the end of the prefill by another engine, 0 if there was none."""
        self._last_at = self._wires.time()
        if not self._tokens:
            self._first_at = self._last_at
            self._load.first_token(self._last_at, prefilled_at)
        self._tokens += 1

    def end(self, done: bool) -> None:
        """The call is over."""
        now = self._wires.time()
        self._load.end(now, done)
        self._engine.breaker.abandoned()
        if self._tokens > 1:
            self._engine.token_s.add((self._last_at - self._first_at) / (self._tokens - 1))
        if done:
            self._load.answered(now, self._wanted.pieces)
