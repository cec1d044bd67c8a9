"""Sequences that wait for a seat, in an order that is fair to API keys. Pure.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) over keys, with the work of a sequence counted in tokens as in the
virtual token counter (VTC: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): tokens of the prompt
that are computed, and tokens of the output, which cost twice as much. A sequence is charged what it is predicted to
cost, and corrected when it has ended. The key with the smallest `tag` (cost so far divided by its weight) goes first. A
key that comes back after it was idle starts where the others are, so idleness earns nothing.

Keys of a class with a lower `priority` go first. The classes behind them get one eighth of the work meanwhile, so that
nobody starves.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy_wire import KeySettings

# What a token of the output costs, in tokens of a prompt: VTC's value, and what providers charge at least.
_OUTPUT_COST = 2.0
# Output tokens of a key's answers until it had some, and the weight of the newest answer.
_OUTPUT, _NEWEST = 64.0, 0.1
# Of the work, for the classes behind one that has waiting sequences.
_PART_BEHIND = 1 / 8
# At most so many idle keys are kept.
_MAX_KEYS = 4096


class Work(NamedTuple):
    """Tokens of a sequence: those of its prompt that are computed, and those of its output."""

    prompt: float = 0.0
    output: float = 0.0

    @property
    def cost(self) -> float:
        """Its cost for its key, in tokens of a prompt."""
        return max(1.0, self.prompt + _OUTPUT_COST * self.output)


NO_WORK = Work()


@dataclass(slots=True, eq=False)
class Waiter:
    """One sequence from its arrival to its end. The caller wakes it when `granted` or `pushed_out` is set.

    `work`: predicted. `is_more`: a further sequence of a request that was admitted. `in_prompt`: granted, without a
    first token. `order`: its place in the engines' queues, lower goes first: twice the class of its key, plus one if
    the key had its share already. `tag`: that of its key when it was granted.
    """

    key: str
    priority: int
    since: float
    work: Work = NO_WORK
    is_more: bool = False
    granted: bool = False
    pushed_out: bool = False
    in_prompt: bool = False
    order: int = 0
    tag: float = 0.0


@dataclass(slots=True, eq=False)
class KeyClass:
    """Keys of one priority. `now`: its virtual time, the largest tag of a sequence whose prompt is computed; `granted`:
    the largest tag of a sequence that was granted; `latest`: that of a key that ended something; `busy`: its sequences
    here; `owed`: work that it owes to the classes behind it; `waiting`: its keys with waiting sequences, by name."""

    now: float = 0.0
    granted: float = 0.0
    latest: float = 0.0
    busy: int = 0
    owed: float = 0.0
    waiting: dict[str, KeyState] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class KeyState:
    """One API key. `group`: its class; `tag`: cost of all that it was granted, divided by its weight; `running`: its
    sequences at the engines, `prompts` of them without a first token; `waiting`, of these `requests` as first ones;
    `output`: mean output tokens of its answers."""

    settings: KeySettings
    group: KeyClass
    tag: float = 0.0
    running: int = 0
    prompts: int = 0
    waiting: int = 0
    requests: int = 0
    output: float = _OUTPUT
    asked_at: float = -math.inf
    lines: dict[int, OrderedDict[Waiter, None]] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing here."""
        return not self.running and not self.waiting


class FairQueue:
    """All keys of one proxy worker, and their waiting sequences.

    `waiting`: all of them; `requests`: those that are the first of their request; `prompts`: granted sequences without
    a first token, and `prompt_tokens` of these; `weight`: sum of the weights of keys that are not idle.
    """

    def __init__(self, rules: KeyRules | None = None) -> None:
        self.waiting = 0
        self.requests = 0
        self.prompts = 0
        self.prompt_tokens = 0.0
        self.weight = 0.0
        self.rules = rules or KeyRules()
        self._keys: dict[str, KeyState] = {}
        self._classes: dict[int, KeyClass] = {}
        self._last: tuple[str, float] = ("", -math.inf)
        self._other_at = -math.inf

    def follow(self, rules: KeyRules) -> None:
        """Apply other settings. A key that changes its class starts there like one that was idle."""
        self.rules = rules
        for name, key in self._keys.items():
            before, key.settings = key.settings, rules.of(name)
            if key.settings.priority != before.priority:
                left, entered = key.group, self._class(key.settings.priority)
                key.group = entered
                left.waiting.pop(name, None)
                left.busy -= key.running + key.waiting
                entered.busy += key.running + key.waiting
                key.tag = entered.now
                if key.waiting:
                    entered.waiting[name] = key
            if not key.is_idle:
                self.weight += key.settings.weight - before.weight

    # -- keys ----------------------------------------------------------------------------------------------

    def asks(self, name: str, now: float) -> KeyState:
        """A key sends a sequence."""
        key = self.state(name)
        if not key.waiting:
            key.tag = max(key.tag, key.group.now)
        key.asked_at = now
        if self._last[0] != name:
            self._other_at = self._last[1]
        self._last = name, now
        return key

    def state(self, name: str) -> KeyState:
        """The state of a key."""
        found = self._keys.get(name)
        if found is None:
            self._forget_idle_keys()
            settings = self.rules.of(name)
            group = self._class(settings.priority)
            found = self._keys[name] = KeyState(settings, group, group.now)
        return found

    def states(self) -> dict[str, KeyState]:
        """All keys, by name."""
        return self._keys

    def others_asked_at(self, name: str) -> float:
        """When another key has sent something last."""
        return self._last[1] if self._last[0] != name else self._other_at

    def has_its_share(self, key: KeyState) -> bool:
        """Whether this key got as much as any other key of its class, with all that the engines have not computed
        yet."""
        return key.tag > key.group.granted

    def predict(self, key: KeyState, prompt: float, max_tokens: int | None) -> Work:
        """The work of a sequence that a key sends."""
        return Work(prompt, key.output if max_tokens is None else min(float(max_tokens), key.output))

    def _class(self, priority: int) -> KeyClass:
        found = self._classes.get(priority)
        if found is None:
            found = self._classes[priority] = KeyClass()
        return found

    def _forget_idle_keys(self) -> None:
        if len(self._keys) >= _MAX_KEYS:
            idle = [name for name, key in self._keys.items() if key.is_idle]
            for name in sorted(idle, key=lambda name: self._keys[name].asked_at)[: (len(idle) + 1) // 2]:
                del self._keys[name]

    # -- the queue -----------------------------------------------------------------------------------------

    def push(self, waiter: Waiter) -> None:
        """Queue a sequence of a key that has asked."""
        key = self._keys[waiter.key]
        self._add(key, 1)
        key.lines.setdefault(waiter.priority, OrderedDict())[waiter] = None
        key.group.waiting[waiter.key] = key
        self._count(key, waiter, 1)

    def remove(self, waiter: Waiter) -> None:
        """Take a waiting sequence out."""
        key = self._keys[waiter.key]
        line = key.lines[waiter.priority]
        del line[waiter]
        if not line:
            del key.lines[waiter.priority]
        self._count(key, waiter, -1)
        if not key.waiting:
            del key.group.waiting[waiter.key]
        self._add(key, -1)

    def __contains__(self, waiter: Waiter) -> bool:
        key = self._keys.get(waiter.key)
        return key is not None and waiter in key.lines.get(waiter.priority, ())

    def in_order(self) -> Iterator[KeyState]:
        """Keys with waiting sequences: the one that goes next, the one that goes next if that one may not, and so
        on."""
        for group in _by_turns([group for _, group in sorted(self._classes.items()) if group.waiting]):
            # Usually the first one may go: sorting all of them would cost more.
            first = min(group.waiting.values(), key=_tag)
            yield first
            yield from (key for key in sorted(group.waiting.values(), key=_tag) if key is not first)

    def head(self, key: KeyState) -> Waiter:
        """A key's sequence that goes first: the lowest `priority` of the request, then the order of arrival."""
        return next(iter(key.lines[min(key.lines)]))

    def last_of_longest(self, newcomer: KeyState) -> Waiter | None:
        """The newest request of the key with most waiting requests for its weight; None if that is the newcomer's."""
        keys = [key for group in self._classes.values() for key in group.waiting.values() if key.requests]
        longest = max(keys, key=lambda key: key.requests / key.settings.weight, default=newcomer)
        mine = (newcomer.requests + 1) / newcomer.settings.weight
        if longest is newcomer or longest.requests / longest.settings.weight <= mine:
            return None
        lines = (longest.lines[priority] for priority in sorted(longest.lines, reverse=True))
        return next(waiter for line in lines for waiter in reversed(line) if not waiter.is_more)

    def ahead(self, newcomer: KeyState) -> float:
        """The number of waiting sequences that go before the next one of a key."""
        own, mine = newcomer.settings, newcomer.waiting + 1
        found = float(newcomer.waiting)
        for priority, group in self._classes.items():
            if priority < own.priority:
                found += sum(key.waiting for key in group.waiting.values())
            elif priority == own.priority:
                others = (key for key in group.waiting.values() if key is not newcomer)
                found += sum(min(key.waiting, mine * key.settings.weight / own.weight) for key in others)
        return found

    # -- seats ---------------------------------------------------------------------------------------------

    def grant(self, waiter: Waiter) -> None:
        """A sequence that does not wait goes to the engines."""
        key = self._keys[waiter.key]
        group = key.group
        waiter.order = 2 * key.settings.priority + self.has_its_share(key)
        waiter.granted = waiter.in_prompt = True
        waiter.tag = key.tag
        group.granted = max(group.granted, key.tag)
        cost = waiter.work.cost
        key.tag += cost / key.settings.weight
        self._add(key, 1)
        key.running += 1
        key.prompts += 1
        self.prompts += 1
        self.prompt_tokens += waiter.work.prompt
        if len(self._classes) > 1:
            self._owe(key.group, cost)

    def prefilled(self, waiter: Waiter) -> None:
        """A granted sequence has its first token, or has ended."""
        if waiter.in_prompt:
            waiter.in_prompt = False
            key = self._keys[waiter.key]
            group = key.group
            group.now = max(group.now, min(waiter.tag, group.granted))
            key.prompts -= 1
            self.prompts -= 1
            self.prompt_tokens = self.prompt_tokens - waiter.work.prompt if self.prompts else 0.0

    def settle(self, waiter: Waiter, actual: Work, answered: bool) -> None:
        """A granted sequence has ended. `answered`: with a complete answer."""
        self.prefilled(waiter)
        key = self._keys[waiter.key]
        if actual is not waiter.work:
            key.tag = max(0.0, key.tag + (actual.cost - waiter.work.cost) / key.settings.weight)
        if answered:
            key.output += _NEWEST * (actual.output - key.output)
        key.running -= 1
        self._add(key, -1)

    def _owe(self, served: KeyClass, cost: float) -> None:
        """Note whether classes behind got their part."""
        has_behind, is_behind = False, True
        for _, group in sorted(self._classes.items(), reverse=True):
            if group is served:
                group.owed = min(cost, group.owed + _PART_BEHIND * cost) if has_behind else min(0.0, group.owed)
                is_behind = False
            elif not group.waiting:
                group.owed = 0.0
            elif not is_behind:
                group.owed -= (1 - _PART_BEHIND) * cost
            has_behind = has_behind or bool(group.waiting)

    def _count(self, key: KeyState, waiter: Waiter, change: int) -> None:
        key.waiting += change
        self.waiting += change
        if not waiter.is_more:
            key.requests += change
            self.requests += change

    def _add(self, key: KeyState, change: int) -> None:
        """Call with 1 before a key gets a sequence here, with -1 after it has lost one."""
        group = key.group
        group.busy += change
        if change < 0:
            group.latest = max(group.latest, key.tag)
            if not group.busy:
                # What was done while nobody else wanted anything is held against no key.
                group.now = group.granted = max(group.granted, group.latest)
        if key.is_idle:
            self.weight += change * key.settings.weight

    def audit(self) -> None:
        """Check that all counts match what waits, and that no book is negative."""
        found = [(key, waiter) for key in self._keys.values() for line in key.lines.values() for waiter in line]
        assert len({id(waiter) for _, waiter in found}) == len(found) == self.waiting
        assert not any(waiter.granted or waiter.pushed_out or waiter.in_prompt for _, waiter in found)
        assert self.requests == sum(not waiter.is_more for _, waiter in found)
        assert all(line for key in self._keys.values() for line in key.lines.values())
        for name, key in self._keys.items():
            waiting = [waiter for owner, waiter in found if owner is key]
            assert all(waiter.key == name for waiter in waiting)
            assert (key.waiting, key.requests) == (len(waiting), sum(not waiter.is_more for waiter in waiting))
            assert 0 <= key.prompts <= key.running
            assert key.tag >= 0
            assert math.isfinite(key.tag)
            assert (key.group.waiting.get(name) is key) == bool(key.waiting)
        assert self.waiting == sum(key.waiting for group in self._classes.values() for key in group.waiting.values())
        for priority, group in self._classes.items():
            members = [key for key in self._keys.values() if key.settings.priority == priority]
            assert group.busy == sum(key.running + key.waiting for key in members)
        assert self.prompts == sum(key.prompts for key in self._keys.values())
        assert self.prompts or not self.prompt_tokens
        busy = sum(key.settings.weight for key in self._keys.values() if not key.is_idle)
        assert math.isclose(self.weight, busy, rel_tol=1e-6, abs_tol=1e-6)


def _tag(key: KeyState) -> float:
    return key.tag


def _by_turns(groups: list[KeyClass]) -> Iterator[KeyClass]:
    """Classes by priority, but one that owes work to those behind goes after them."""
    if not groups:
        return
    first, behind = groups[0], groups[1:]
    if first.owed > 0:
        yield from _by_turns(behind)
        yield first
    else:
        yield first
        yield from _by_turns(behind)
