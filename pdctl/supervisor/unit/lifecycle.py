"""The lifecycle of one process as a pure function: state, event -> state, actions. No I/O, no clock, no randomness.

pending -> starting -> ready -> draining -> drained
              |          |         |           |
              +----------+---------+-----------+--> stopping
              |                                        |
              +--exit--> clearing <-------------exit---+
                            |
                            +--> backoff -> starting ..., pending (again), stopped, or failed

Clearing lasts until nothing of the old process is left: no descendants, no ports, no GPU memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum

from pdctl.wire import EXIT_CONFIG

# Exit codes that a restart cannot fix: usage errors (argparse, sysexits.h EX_USAGE) and EX_CONFIG.
INCURABLE = frozenset({2, 64, EXIT_CONFIG})
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 60.0


class Phase(StrEnum):
    """A process's state, as shown to users."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    STOPPING = "stopping"
    CLEARING = "clearing"
    BACKOFF = "backoff"
    STOPPED = "stopped"
    FAILED = "failed"


# In these phases the process exists and may exit at any moment.
LIVE = frozenset({Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.DRAINED, Phase.STOPPING})
# In these phases nothing happens until a user requests it.
ENDED = frozenset({Phase.STOPPED, Phase.FAILED})
_SERVING = frozenset({Phase.READY, Phase.DRAINING, Phase.DRAINED})


class Goal(StrEnum):
    """What is to happen next."""

    RUN = "run"
    HOLD = "hold"  # stay drained
    STOP = "stop"
    AGAIN = "again"  # stop, then start


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When to give up: more than `max_restarts` exits within `within_s` seconds. `signals`: the number of stop signals
    sent before SIGKILL to the whole tree."""

    max_restarts: int
    within_s: float
    signals: int = 1


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: an exit code or a signal number; neither if no supervisor observed it."""

    code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class Life:
    """`exits`: monotonic times of recent unexpected exits; `streak`: exits in a row without a stable time in between.

    While clearing, `came_from` is the phase in which the process ended, `exit` how it ended, and `last_words` the error
    that it logged; `incurable`: a restart cannot fix that error.
    """

    phase: Phase = Phase.PENDING
    starts: int = 0
    exits: tuple[float, ...] = ()
    streak: int = 0
    reason: str = ""
    goal: Goal = Goal.RUN
    signals_sent: int = 0
    came_from: Phase = Phase.PENDING
    exit: Exit | None = None
    last_words: str = ""
    incurable: bool = False

    @property
    def restarts(self) -> int:
        """Starts after the first."""
        return max(0, self.starts - 1)


class Kind(Enum):
    """Kinds of events."""

    START = "start"  # dependencies are ready, or the back-off is over
    PROBE_OK = "probe_ok"
    STABLE = "stable"  # it has been ready long enough to reset the back-off
    STARTUP_TIMEOUT = "startup_timeout"
    NOT_ALIVE = "not_alive"  # a probe declared it dead
    CANNOT_SPAWN = "cannot_spawn"
    EXITED = "exited"
    CLEARED = "cleared"  # nothing of it is left
    DRAIN = "drain"
    DRAINED = "drained"  # no requests run in it any more, or the drain timed out
    STOP = "stop"
    RESTART = "restart"
    RESUME = "resume"  # a user wants it to run again after a stop, a failure or a drain
    GRACE_OVER = "grace_over"


@dataclass(frozen=True, slots=True)
class LifecycleEvent:
    """`now`: monotonic seconds; `chance`: random, in [0, 1), for jitter; `goal` with DRAIN; with EXITED: `exit`,
    `incurable`, and the last words as `detail`."""

    kind: Kind
    now: float = 0.0
    chance: float = 0.0
    exit: Exit | None = None
    detail: str = ""
    goal: Goal = Goal.HOLD
    incurable: bool = False


class Do(Enum):
    """Actions that the unit must execute."""

    SPAWN = "spawn"
    DRAIN = "drain"  # send it no new requests; DRAINED when it is empty
    SIGNAL = "signal"  # the stop signal `number` to the leader, and a timer for GRACE_OVER
    KILL_TREE = "kill_tree"
    CLEAR = "clear"  # CLEARED when nothing is left
    ARM_BACKOFF = "arm_backoff"  # START after `seconds`
    ARM_STABLE = "arm_stable"


@dataclass(frozen=True, slots=True)
class Action:
    """`seconds` with ARM_BACKOFF, `number` with SIGNAL."""

    do: Do
    seconds: float = 0.0
    number: int = 0


Step = tuple[Life, tuple[Action, ...]]


def advance(life: Life, event: LifecycleEvent, policy: RestartPolicy) -> Step:
    """The next state and what to do. An event that does not fit the state changes nothing."""
    match event.kind:
        case Kind.EXITED | Kind.CLEARED:
            return _ended(life, event, policy)
        case Kind.DRAIN | Kind.DRAINED | Kind.STOP | Kind.RESTART | Kind.RESUME | Kind.GRACE_OVER:
            return _asked(life, event, policy)
    return _grown(life, event)


def _grown(life: Life, event: LifecycleEvent) -> Step:
    """Events on the way from the plan to a serving process."""
    match event.kind:
        case Kind.START if life.phase in (Phase.PENDING, Phase.BACKOFF):
            return _started(life)
        case Kind.PROBE_OK if life.phase is Phase.STARTING:
            return replace(life, phase=Phase.READY), (Action(Do.ARM_STABLE),)
        case Kind.STABLE if life.phase in _SERVING:
            return replace(life, streak=0), ()
        case Kind.STARTUP_TIMEOUT if life.phase is Phase.STARTING:
            # The exit that follows counts as a failed start.
            reason = f"not ready in time, it was {event.detail}" if event.detail else "not ready in time"
            return replace(life, reason=reason), (Action(Do.KILL_TREE),)
        case Kind.NOT_ALIVE if life.phase in _SERVING:
            return replace(life, reason=event.detail), (Action(Do.KILL_TREE),)
        case Kind.CANNOT_SPAWN if life.phase is Phase.STARTING:
            return replace(life, phase=Phase.FAILED, reason=event.detail), ()
    return life, ()


def _started(life: Life) -> Step:
    started = replace(life, phase=Phase.STARTING, starts=life.starts + 1, reason="", goal=Goal.RUN)
    return started, (Action(Do.SPAWN),)


# -- user requests -----------------------------------------------------------------------------------------


def _asked(life: Life, event: LifecycleEvent, policy: RestartPolicy) -> Step:
    match event.kind:
        case Kind.DRAIN:
            return _drain(life, event.goal, policy)
        case Kind.DRAINED if life.phase is Phase.DRAINING:
            if life.goal is Goal.HOLD:
                return replace(life, phase=Phase.DRAINED), ()
            return _stopping(life, life.goal, policy)
        case Kind.STOP:
            return _stop(life, policy)
        case Kind.RESTART:
            return _restart(life, policy)
        case Kind.RESUME:
            return _resume(life)
        case Kind.GRACE_OVER if life.phase is Phase.STOPPING:
            return _next_signal(life, policy)
    return life, ()


def _drain(life: Life, goal: Goal, policy: RestartPolicy) -> Step:
    assert goal is not Goal.RUN
    if life.phase is Phase.READY:
        return replace(life, phase=Phase.DRAINING, goal=goal), (Action(Do.DRAIN),)
    if life.phase is Phase.DRAINING:
        return replace(life, goal=goal), ()
    if goal is Goal.HOLD:
        return life, ()
    # No requests run in it: there is nothing to wait for.
    return _stop(life, policy) if goal is Goal.STOP else _restart(life, policy)


def _stop(life: Life, policy: RestartPolicy) -> Step:
    if life.phase in (Phase.PENDING, Phase.BACKOFF):
        return replace(life, phase=Phase.STOPPED, goal=Goal.STOP), ()
    if life.phase in (Phase.STOPPING, Phase.CLEARING):
        return replace(life, goal=Goal.STOP), ()
    return _stopping(life, Goal.STOP, policy) if life.phase in LIVE else (life, ())


def _restart(life: Life, policy: RestartPolicy) -> Step:
    if life.phase in ENDED or life.phase is Phase.BACKOFF:
        return _resume(life)
    if life.phase in (Phase.STOPPING, Phase.CLEARING):
        return replace(life, goal=Goal.AGAIN), ()
    return _stopping(life, Goal.AGAIN, policy) if life.phase in LIVE else (life, ())


def _resume(life: Life) -> Step:
    if life.phase in ENDED:
        # Exits before a user's intervention no longer count.
        return replace(life, phase=Phase.PENDING, goal=Goal.RUN, exits=(), streak=0, reason=""), ()
    if life.phase is Phase.BACKOFF:
        return _started(life)
    if life.phase in (Phase.DRAINING, Phase.DRAINED):
        return replace(life, phase=Phase.READY, goal=Goal.RUN), ()
    if life.phase in (Phase.STOPPING, Phase.CLEARING) and life.goal is Goal.STOP:
        return replace(life, goal=Goal.AGAIN), ()
    return life, ()


def _stopping(life: Life, goal: Goal, policy: RestartPolicy) -> Step:
    return _next_signal(replace(life, phase=Phase.STOPPING, goal=goal, signals_sent=0), policy)


def _next_signal(life: Life, policy: RestartPolicy) -> Step:
    """Send the next stop signal; after the last one, kill the whole tree."""
    if life.signals_sent >= policy.signals:
        return life, (Action(Do.KILL_TREE),)
    return replace(life, signals_sent=life.signals_sent + 1), (Action(Do.SIGNAL, number=life.signals_sent),)


# -- the end of a process ----------------------------------------------------------------------------------


def _ended(life: Life, event: LifecycleEvent, policy: RestartPolicy) -> Step:
    if event.kind is Kind.EXITED and life.phase in LIVE:
        assert event.exit is not None
        ended = replace(
            life,
            phase=Phase.CLEARING,
            came_from=life.phase,
            exit=event.exit,
            last_words=event.detail,
            incurable=event.incurable,
        )
        return ended, (Action(Do.CLEAR),)
    if event.kind is Kind.CLEARED and life.phase is Phase.CLEARING:
        return _cleared(replace(life, exit=None), life.exit, event, policy)
    return life, ()


def _cleared(life: Life, ended: Exit | None, event: LifecycleEvent, policy: RestartPolicy) -> Step:
    assert ended is not None
    if life.goal is Goal.STOP:
        return replace(life, phase=Phase.STOPPED, reason=""), ()
    if life.came_from is Phase.STOPPING or life.goal is Goal.AGAIN:
        return replace(life, phase=Phase.PENDING, goal=Goal.RUN, reason=""), ()
    # Failed starts count without a time window: a start that takes a minute to fail would never use up the budget.
    starting = life.came_from is Phase.STARTING
    exits = (*(at for at in life.exits if starting or event.now - at < policy.within_s), event.now)
    streak = life.streak + 1
    reason = life.reason or describe_exit(ended)
    ended_life = replace(life, exits=exits, streak=streak, reason=reason, goal=Goal.RUN)
    # Only of a start: a Go program that was ready exits with 2 after a panic.
    if starting and (ended.code in INCURABLE or life.incurable):
        said = f": {life.last_words};" if life.last_words else ":"
        return replace(ended_life, phase=Phase.FAILED, reason=f"{reason}{said} a restart would not help"), ()
    if len(exits) > policy.max_restarts:
        said = f": {life.last_words}" if life.last_words else ""
        within = "failed starts" if starting else f"exits within {policy.within_s:g} s"
        return replace(ended_life, phase=Phase.FAILED, reason=f"{reason}{said}; {len(exits)} {within}"), ()
    delay = backoff_s(streak, event.chance)
    return replace(ended_life, phase=Phase.BACKOFF), (Action(Do.ARM_BACKOFF, delay),)


def backoff_s(streak: int, chance: float) -> float:
    """Zero after the first exit, then exponential with full jitter (AWS Architecture Blog, 2015)."""
    if streak <= 1:
        return 0.0
    ceiling: float = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** min(streak - 2, 16))
    return ceiling * chance


_SIGNALS = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE",
            9: "SIGKILL", 10: "SIGUSR1", 11: "SIGSEGV", 12: "SIGUSR2", 13: "SIGPIPE", 14: "SIGALRM",
            15: "SIGTERM", 24: "SIGXCPU", 25: "SIGXFSZ", 31: "SIGSYS"}  # fmt: skip


def signal_name(number: int) -> str:
    """SIGKILL for 9, and so on."""
    return _SIGNALS.get(number, f"signal {number}")


def describe_exit(exit_: Exit) -> str:
    """The exit as text for users."""
    if exit_.signal is not None:
        return f"killed by {signal_name(exit_.signal)}"
    if exit_.code is None:
        return "exited while no supervisor was running"
    return f"exited with code {exit_.code}"
