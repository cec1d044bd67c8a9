"""The life of one process as a pure function: state, event -> state, actions. No I/O, no clock, no chance.

pending -> starting -> ready -> stopping -> stopped
              |          |
              +--exit----+--> backoff -> starting ...   or failed, when a restart cannot help
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum

from pdctl.wire import EXIT_CONFIG

# Exit codes that say "start me differently": usage errors (argparse, sysexits.h EX_USAGE) and EX_CONFIG.
INCURABLE = frozenset({2, 64, EXIT_CONFIG})
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0


class Phase(StrEnum):
    """What people see as a process's state."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Policy:
    """When to give up: more than `max_restarts` exits within `within_s` seconds."""

    max_restarts: int
    within_s: float


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: a code or a signal number."""

    code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class Life:
    """`exits`: monotonic times of recent unexpected exits. `restarts`: starts after the first."""

    phase: Phase = Phase.PENDING
    starts: int = 0
    exits: tuple[float, ...] = ()
    reason: str = ""

    @property
    def restarts(self) -> int:
        """Starts after the first."""
        return max(0, self.starts - 1)


class Kind(Enum):
    """What can happen."""

    START = "start"  # dependencies are ready, or the back-off is over
    PROBE_OK = "probe_ok"
    STARTUP_TIMEOUT = "startup_timeout"
    EXITED = "exited"  # and its process tree is proven empty
    CANNOT_SPAWN = "cannot_spawn"
    STOP = "stop"
    GRACE_OVER = "grace_over"


@dataclass(frozen=True, slots=True)
class Event:
    """`now` in monotonic seconds; `chance` from [0, 1) spreads restarts; `exit` with EXITED."""

    kind: Kind
    now: float = 0.0
    chance: float = 0.0
    exit: Exit | None = None
    detail: str = ""


class Do(Enum):
    """What the shell must carry out."""

    SPAWN = "spawn"
    TERMINATE = "terminate"  # TERM to the leader, and a timer for GRACE_OVER
    KILL_TREE = "kill_tree"
    ARM_BACKOFF = "arm_backoff"  # START after `seconds`


@dataclass(frozen=True, slots=True)
class Action:
    """`seconds` with ARM_BACKOFF."""

    do: Do
    seconds: float = 0.0


def advance(life: Life, event: Event, policy: Policy) -> tuple[Life, tuple[Action, ...]]:
    """The next state and what to do. An event that does not fit the state changes nothing."""
    match event.kind:
        case Kind.STOP:
            return _stop(life)
        case Kind.EXITED:
            return _exited(life, event, policy)
        case Kind.START if life.phase in (Phase.PENDING, Phase.BACKOFF):
            started = replace(life, phase=Phase.STARTING, starts=life.starts + 1, reason="")
            return started, (Action(Do.SPAWN),)
        case Kind.PROBE_OK if life.phase is Phase.STARTING:
            return replace(life, phase=Phase.READY), ()
        case Kind.STARTUP_TIMEOUT if life.phase is Phase.STARTING:
            # Its exit, which follows, counts as a failed start.
            return replace(life, reason="not ready in time"), (Action(Do.KILL_TREE),)
        case Kind.CANNOT_SPAWN if life.phase is Phase.STARTING:
            return replace(life, phase=Phase.FAILED, reason=event.detail), ()
        case Kind.GRACE_OVER if life.phase is Phase.STOPPING:
            return life, (Action(Do.KILL_TREE),)
    return life, ()


def _stop(life: Life) -> tuple[Life, tuple[Action, ...]]:
    if life.phase in (Phase.STARTING, Phase.READY):
        return replace(life, phase=Phase.STOPPING), (Action(Do.TERMINATE),)
    if life.phase in (Phase.PENDING, Phase.BACKOFF):
        return replace(life, phase=Phase.STOPPED), ()
    return life, ()


def _exited(life: Life, event: Event, policy: Policy) -> tuple[Life, tuple[Action, ...]]:
    assert event.exit is not None
    if life.phase is Phase.STOPPING:
        return replace(life, phase=Phase.STOPPED), ()
    if life.phase not in (Phase.STARTING, Phase.READY):
        return life, ()
    # Failed starts count however slow they are: a start that takes a minute to fail would never use up the budget.
    starting = life.phase is Phase.STARTING
    exits = (*(at for at in life.exits if starting or event.now - at < policy.within_s), event.now)
    reason = life.reason or describe_exit(event.exit)
    if event.exit.code in INCURABLE:
        return replace(life, phase=Phase.FAILED, exits=exits, reason=f"{reason}: a restart would not help"), ()
    if len(exits) > policy.max_restarts:
        within = "failed starts" if starting else f"exits within {policy.within_s:g} s"
        given_up = f"{reason}; {len(exits)} {within}"
        return replace(life, phase=Phase.FAILED, exits=exits, reason=given_up), ()
    delay = backoff_s(len(exits), event.chance)
    return replace(life, phase=Phase.BACKOFF, exits=exits, reason=reason), (Action(Do.ARM_BACKOFF, delay),)


def backoff_s(recent_exits: int, chance: float) -> float:
    """At once after a first exit, then exponential with full jitter (AWS Architecture Blog, 2015)."""
    if recent_exits <= 1:
        return 0.0
    ceiling: float = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (recent_exits - 2))
    return ceiling * chance


_SIGNALS = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE",
            9: "SIGKILL", 11: "SIGSEGV", 13: "SIGPIPE", 15: "SIGTERM"}  # fmt: skip


def signal_name(number: int) -> str:
    """SIGKILL for 9, and so on."""
    return _SIGNALS.get(number, f"signal {number}")


def describe_exit(exit_: Exit) -> str:
    """In a person's words."""
    if exit_.signal is not None:
        return f"killed by {signal_name(exit_.signal)}"
    return f"exited with code {exit_.code}"
