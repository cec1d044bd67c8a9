"""A prefill and a decode engine with real schedulers, allocators, lease table and receptions; no threads, no sockets.

Slots hold tokens instead of KV (tests/engine/schedule/engine.py), also those that a transfer copies: what is read after
it was freed, overwritten or not computed yet is noticed when it is decoded."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from functools import partial

import pytest

from pdctl.engine import speculation
from pdctl.engine.handover.lease import LeaseTable, Verdict
from pdctl.engine.handover.reception import FINAL, Action, Phase, Reception, ReceptionEvent, advance
from pdctl.engine.ipc.messages import Held, Sampling
from pdctl.engine.schedule.batch import Batch, Outcome
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.speculative import Speculative
from tests.engine.schedule.engine import BLOCK, Engine, varied

EPOCH, ROUTER, READER = "e0", "proxy", "d0"
LEASE_S = 10.0
_TROUBLE, _NEW, _HELD = 0.2, 0.1, 0.7
GUESSING = Speculative("chance")


@dataclass
class Request:
    """What a client asked for, and the tokens that it must get."""

    prompt: list[int]
    answer: list[int]
    salt: str
    sampling: Sampling

    @classmethod
    def made(cls, family: int, length: int, output: int, salt: str, stops: Tokens[int] = ()) -> Request:
        """A prompt of a family: those of one family begin alike. The answer ends with the first token of `stops`."""
        tokens = [family, *range(length)]
        prompt = list(tokens)
        while len(tokens) - len(prompt) < output and (len(tokens) == len(prompt) or tokens[-1] not in stops):
            tokens.append(varied(tuple(tokens)))
        return cls(prompt, tokens[len(prompt) :], salt, Sampling(output, stop_token_ids=list(stops)))


@dataclass
class Moving:
    """A hand-over at its reader. `source`: the other's blocks, `tokens`: those whose KV it has; `reading`: tokens
    (next, end) of the running read."""

    request: Request
    lease_id: str
    source: list[int]
    tokens: int
    state: Reception = field(default_factory=Reception)
    reading: tuple[int, int] | None = None
    committing: bool = False

    @property
    def first(self) -> int:
        """The number of output tokens that came before."""
        return self.tokens - len(self.request.prompt) + 1


@dataclass
class Readable:
    """KV that the reader may read: `ready` of `tokens`."""

    lease_id: str
    ready: int
    tokens: int
    blocks: list[int]
    held: Held | None = None


class Pair:
    """Both engines, the leases between them, and the rules' verbs. `chance`: what is guessed right. `ahead`: the
    engines do not guess, but launch the next step while one computes; everything then happens while one does."""

    def __init__(self, chance: random.Random, blocks: int, ahead: bool = False) -> None:
        self.chance = chance
        self.now = 0.0
        self.p, self.d = (
            Engine(
                blocks, 12, 4, leased=blocks * 3 // 4, speculative=None if ahead else GUESSING,
                ahead=chance if ahead else None,
            )
            for _ in range(2)
        )  # fmt: skip
        self.leases = LeaseTable(EPOCH, LEASE_S)
        self.requests: dict[str, Request] = {}
        self.gone: set[str] = set()
        # By the prefill's request: the early lease of one that is offered; the sealed one of one that is held.
        self.early: dict[str, str] = {}
        self.readable: dict[str, Readable] = {}
        self.moving: dict[str, Moving] = {}
        self.late: dict[str, tuple[Sequence, list[int]]] = {}

    # -- clients --

    def ask(self, engine: Engine, request: Request, hold: bool = False, offer: bool = False) -> None:
        """A request for this engine; `hold`: its KV is for the other one."""
        name = f"{len(self.requests)}"
        self.requests[name] = request
        engine.add_sampled(
            name, request.prompt, request.sampling, salt=request.salt, hold=hold, offer=offer,
            priority=self.chance.randint(0, 1),
        )  # fmt: skip

    def leave(self, engine: Engine, name: str) -> None:
        """The client of a request has left, or the front gives it up."""
        self.gone.add(name)
        if engine is self.d and name in self.moving:
            self.advance(name, ReceptionEvent.CANCELLED)
        elif (sequence := engine.scheduler.sequences.get(name)) and sequence.status is not Status.HELD:
            # What is held is freed by the end of its lease.
            engine.scheduler.abort(name)
            if name in self.early:
                self.verdict(self.leases.revoke(self.early.pop(name), self.now))

    # -- steps --

    def step(self, engine: Engine) -> None:
        """Compute a batch, and do what the front does with its outcome."""
        self._told(engine, engine.step_with_outcome()[1])

    def _told(self, engine: Engine, outcome: Outcome) -> None:
        if engine is self.p:
            self._offered(outcome)
        for name, output in engine.outputs.items():
            answer = self.requests[name].answer
            first = self.moving[name].first if engine is self.d and name in self.moving else 0
            assert output == answer[first : first + len(output)], f"{name}: wrong tokens"

    def _offered(self, outcome: Outcome) -> None:
        for withdrawn in outcome.withdrawn:
            self._withdraw(withdrawn.request_id)
        for done in outcome.progress:
            name = done.request_id
            if name not in self.early:
                lease = self.leases.grant(name, len(done.block_ids), ROUTER, self.now, sealed=False)
                assert lease is not None
                self.early[name] = lease.lease_id
            tokens = done.num_tokens or len(self.requests[name].prompt)
            self.readable[name] = Readable(self.early[name], done.num_computed, tokens, done.block_ids)
        for held in outcome.held:
            self._held(held)
        for token in outcome.tokens:
            if token.finish_reason is not None:
                self._withdraw(token.request_id)

    def _held(self, held: Held) -> None:
        name = held.request_id
        request = self.requests[name]
        assert held.token_id == request.answer[held.num_tokens - len(request.prompt)]
        early = self.early.pop(name, None)
        lease = self.leases.seal(early, len(held.block_ids), self.now) if early else None
        lease = lease or self.leases.grant(name, len(held.block_ids), ROUTER, self.now)
        assert lease is not None
        self.readable[name] = Readable(lease.lease_id, held.num_tokens, held.num_tokens, held.block_ids, held)

    def _withdraw(self, name: str) -> None:
        self.readable.pop(name, None)
        if (lease := self.early.pop(name, None)) is not None:
            self.verdict(self.leases.revoke(lease, self.now))
            for reader, moving in list(self.moving.items()):
                if moving.lease_id == lease:
                    self.advance(reader, ReceptionEvent.LEASE_GONE)

    def preempt(self, engine: Engine) -> None:
        """Take the blocks of any running sequence, as if others needed them. The scheduler does so only when nothing
        computes."""
        self._told(engine, engine.settle())
        if running := list(engine.scheduler.running):
            running = [sequence for sequence in running if sequence.offered] or running
            engine.scheduler._preempt(self.chance.choice(running), Batch(0))

    def move(self, name: str, offer: bool) -> None:
        """An answer of the first engine is to go on at the other one. Such a message waits until nothing computes."""
        self._told(self.p, self.p.settle())
        self.p.scheduler.move(name, offer)

    # -- the reader --

    def receive(self, name: str) -> None:
        """The other engine hears of a request that is held, or offered for the first time or again."""
        found = self.readable[name]
        lease, held = found.lease_id, found.held
        known = next((reader for reader, moving in self.moving.items() if moving.lease_id == lease), None)
        if known is None:
            known = f"{len(self.requests)}"
            self.requests[known] = self.requests[name]
            self.moving[known] = Moving(self.requests[name], lease, found.blocks, found.tokens)
            self._add(known, held)
            ok = self.leases.claim(lease, EPOCH, READER, self.now).ok
            self.advance(known, ReceptionEvent.CLAIM_OK if ok else ReceptionEvent.CLAIM_REFUSED)
        elif held is not None and self.moving[known].state.total is None:
            self._add(known, held)
        moving = self.moving[known]
        if len(found.blocks) > len(moving.source):
            # An answer's blocks are allocated one by one.
            moving.source = found.blocks
        event = ReceptionEvent.OFFERED if held is None else ReceptionEvent.SEALED
        if held is not None and moving.state.phase is not Phase.LOST:
            assert known in self.d.scheduler.sequences
        self.advance(known, event, found.ready)

    def _add(self, reader: str, held: Held | None) -> None:
        """Reserve blocks, or tell the request of those that are reserved."""
        moving, request = self.moving[reader], self.moving[reader].request
        if moving.state.phase is Phase.LOST:
            return
        tokens, length = moving.tokens, len(request.prompt)
        known = [*request.prompt, *request.answer[: tokens - length]]
        # Those of an answer are not known before it is held.
        given = (known if tokens == length else []) if held is None else [*known, held.token_id]
        length = 0 if held is None else length
        sequence = Sequence(
            reader, list(given), length, request.sampling, kv_tokens=tokens, salt=request.salt,
            status=Status.AWAITING_BLOCKS,
        )  # fmt: skip
        if self.d.scheduler.add(sequence) is not None:
            self.advance(reader, ReceptionEvent.CANCELLED)

    def reserve(self) -> None:
        """Give blocks to hand-overs that wait for them."""
        for sequence in self.d.scheduler.reserve():
            self.advance(sequence.request_id, ReceptionEvent.RESERVED, sequence.num_cached)

    def read(self, reader: str, count: int) -> None:
        """A running read copies some tokens, as they are in the peer's pool now."""
        moving = self.moving[reader]
        assert moving.reading is not None
        at, end = moving.reading
        target = self.d.scheduler.sequences[reader]
        for token in range(at, min(at + count, end)):
            found = self.p.slots[moving.source[token // BLOCK] * BLOCK + token % BLOCK]
            self.d.slots[target.block_ids[token // BLOCK] * BLOCK + token % BLOCK] = found
        moving.reading = min(at + count, end), end

    def end_read(self, reader: str, how: str) -> None:
        """A running read is complete, has failed, or was given up and may still write."""
        moving = self.moving[reader]
        assert moving.reading is not None
        if how == "whole":
            self.read(reader, moving.reading[1])
        left = range(*moving.reading)
        moving.reading = None
        if how == "late":
            target = self.d.scheduler.sequences[reader]
            self.late[reader] = target, [target.block_ids[token // BLOCK] * BLOCK + token % BLOCK for token in left]
        self.d.scheduler.pull_ended(reader, uncertain=how == "late")
        self.advance(reader, ReceptionEvent.READ_OK if how == "whole" else ReceptionEvent.READ_FAILED)

    def land(self, reader: str) -> None:
        """Bytes of a read that was given up arrive."""
        for slot in self.late[reader][1]:
            self.d.slots[slot] = (-1,)

    def settle(self, reader: str) -> None:
        """Nothing more of that read can arrive."""
        del self.late[reader]
        self.d.scheduler.pull_settled(reader)

    def commit(self, reader: str, is_answered: bool) -> None:
        """The prefill engine answers a commit; the answer may be lost."""
        moving = self.moving[reader]
        moving.committing = False
        verdict = self.leases.commit(moving.lease_id, EPOCH, READER, self.now)
        self.verdict(verdict)
        answer = ReceptionEvent.COMMIT_OK if verdict.ok else ReceptionEvent.COMMIT_REFUSED
        self.advance(reader, answer if is_answered else ReceptionEvent.COMMIT_UNANSWERED)

    def advance(self, reader: str, event: ReceptionEvent, tokens: int = 0) -> None:
        """Tell the reception, and do what it says."""
        moving = self.moving[reader]
        moving.state, actions = advance(moving.state, event, tokens)
        for action in actions:
            if action is Action.READ:
                if self.d.scheduler.pull_started(reader):
                    moving.reading = moving.state.read, moving.state.asked
                else:
                    self.advance(reader, ReceptionEvent.READ_FAILED)
            elif action is Action.COMMIT:
                moving.committing = True
            elif action is Action.DECODE:
                assert self.d.scheduler.start(reader)
            elif action is Action.DROP_BLOCKS:
                self.gone.add(reader)
                self.d.scheduler.abort(reader)
            elif action is Action.RELEASE_LEASE:
                self.verdict(self.leases.release(moving.lease_id, EPOCH, self.now))

    # -- leases --

    def verdict(self, verdict: Verdict) -> None:
        """The end of a lease frees the blocks."""
        if verdict.freed is not None:
            self.readable.pop(verdict.freed, None)
            self.gone.add(verdict.freed)
            self.p.scheduler.abort(verdict.freed)

    def pass_time(self, seconds: float) -> None:
        """Time passes; what is past its deadline is swept."""
        self.now += seconds
        for verdict in self.leases.expire(self.now):
            self.verdict(verdict)

    def renew(self) -> None:
        """The reader is alive; it gives up what it does not hold any more."""
        mine = {moving.lease_id: name for name, moving in self.moving.items() if moving.state.phase not in FINAL}
        for lease in self.leases.renew(list(mine), EPOCH, READER, self.now):
            self.advance(mine[lease], ReceptionEvent.LEASE_GONE)

    def go_on(self) -> None:
        """Do one of the things that come next, or rarely one that should not."""
        if self.chance.random() < _TROUBLE:
            self.chance.choice(self._troubles())()
            return
        todo: list[Callable[[], None]] = [partial(self.step, self.p), partial(self.step, self.d), self.reserve]
        known = {moving.lease_id: moving.state.total is not None for moving in self.moving.values()}
        for name, found in self.readable.items():
            if found.lease_id not in known or (found.held is not None and not known[found.lease_id]):
                todo.append(partial(self.receive, name))
        for reader, moving in self.moving.items():
            if moving.reading is not None:
                todo += [partial(self.read, reader, 3), partial(self.end_read, reader, "whole")]
            if moving.committing:
                todo.append(partial(self.commit, reader, True))
        self.chance.choice(todo)()

    def wander(self, times: int) -> None:
        """New requests, and whatever comes next of them, in any order."""
        for _ in range(times):
            if self.chance.random() < _NEW:
                salt, hold = self.chance.choice(["", "x"]), self.chance.random() < _HELD
                request = Request.made(
                    self.chance.randint(0, 2), self.chance.randint(0, 24), self.chance.randint(2, 24), salt,
                    self.chance.choice([(), range(self.chance.randint(1, 20))]),
                )  # fmt: skip
                engine = self.p if hold else self.chance.choice([self.p, self.d])
                self.ask(engine, request, hold, offer=hold and self.chance.random() < _HELD)
            else:
                self.go_on()
            self.audit()

    def _troubles(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = [partial(self.preempt, self.p), partial(self.preempt, self.d)]
        for name in self.movable():
            found += [partial(self.move, name, True), partial(self.move, name, False)]
        for reader, moving in self.moving.items():
            if moving.reading is not None:
                found += [partial(self.end_read, reader, "failed"), partial(self.end_read, reader, "late")]
            if moving.committing:
                found += [partial(self.commit, reader, False), partial(self.pass_time, LEASE_S + 1)]
        for reader in self.late:
            found += [partial(self.land, reader), partial(self.land, reader), partial(self.settle, reader)]
        return found

    def movable(self) -> list[str]:
        """The answers that the first engine computes."""
        return [sequence.request_id for sequence in self.p.scheduler.running.decoding.values()]

    # -- checks --

    def audit(self) -> None:
        """What holds between any two rules."""
        self.p.audit()
        self.d.audit()
        self.leases.audit()
        held = {s.request_id for s in self.p.scheduler.sequences.values() if s.status is Status.HELD}
        sealed = {lease.request_id for lease in self.leases.live() if lease.sealed}
        assert held == sealed, "blocks without a lease, or a lease without blocks"
        pinned = self.p.scheduler._room._pinned.count
        most = self.p.scheduler.limits.max_leased_blocks
        theirs = [s for s in self.p.scheduler.sequences.values() if s.hold and s.block_ids]
        # A sequence that moves may need one more block until it is held.
        growing = sum(s.hold_at > 0 for s in theirs)
        assert pinned <= most + growing or len(theirs) == 1
        waiting = {name for name, moving in self.moving.items() if moving.reading is not None}
        assert waiting == set(self.d.scheduler.pulls.running)
        assert self.d.scheduler.allocator._quarantine.keys() == self.late.keys()

    def finish(self) -> None:
        """Let everything end: every client has its answer, and no block is in use."""
        for reader, moving in self.moving.items():
            if moving.reading is not None:
                self.end_read(reader, "failed")
        for reader in list(self.late):
            self.land(reader)
            self.settle(reader)
        for reader, moving in self.moving.items():
            if moving.state.phase not in FINAL:
                self.advance(reader, ReceptionEvent.DEADLINE)
        for engine in (self.p, self.d):
            for _ in range(600):
                self.pass_time(LEASE_S + 1)
                if not engine.has_work:
                    break
                self.step(engine)
            else:
                raise AssertionError("requests starve")
        self.pass_time(LEASE_S + 1)
        self.audit()
        assert self.p.scheduler.allocator.num_free == self.p.scheduler.allocator.num_blocks, "blocks are left"
        assert self.d.scheduler.allocator.num_free == self.d.scheduler.allocator.num_blocks, "blocks are left"
        for name in self.requests.keys() - self.gone:
            engine = self.d if name in self.d.outputs else self.p
            first = self.moving[name].first if name in self.moving else 0
            assert engine.outputs.get(name, []) == self.requests[name].answer[first:], f"{name} has no whole answer"


class Chancy:
    """Guesses right for some tokens, then wrong."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def draft(self, token_ids: Tokens[int], most: int) -> list[int]:
        """See Drafter.draft."""
        found, right = list(token_ids), self._chance.randint(0, most)
        for index in range(most):
            found.append(varied(tuple(found)) + (index >= right))
        return found[len(token_ids) :]


def guessing(patch: pytest.MonkeyPatch, chance: random.Random) -> None:
    """Let the engines of a pair guess."""
    patch.setitem(speculation._KINDS, GUESSING.kind, lambda _: Chancy(chance))


