"""The core process: loads the model, reports that it is ready, runs steps."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import msgspec
import torch
import zmq

from pdctl.engine.cache.memory import NoMemory
from pdctl.engine.core.build import build
from pdctl.engine.core.loop import Core
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.executor.faults import reason_of
from pdctl.engine.ipc import pipes
from pdctl.engine.ipc.messages import Broken, StartRefused, ToCore
from pdctl.engine.lifeline import die_with_parent, vital
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.model.parallel import RankLost
from pdctl.engine.options import EngineOptions
from pdctl.engine.tiers import TierRefused
from pdctl.engine.transfer import TransferError
from pdctl.net.serving import LOG_FORMAT
from pdctl.wire import EXIT_CONFIG

# A rank that has ended is noticed by its closed pipe before that, seconds.
_RANK_S = 2.0


def main(options: EngineOptions) -> int:
    """Load the model, report that it is ready, run steps. Returns the exit code."""
    die_with_parent(signal.SIGKILL, options.front_pid)
    # The front decides when the core ends; Ctrl-C in the terminal must not interrupt a step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox = Outbox(pipes.from_core(options.run_dir, options.name))
    end = End(outbox)
    try:
        core, ready = build(options, outbox, end.of_rank)
    except (ModelRefused, NoMemory, TransferError, TierRefused, torch.OutOfMemoryError) as failure:
        end.tell(StartRefused(str(failure)), EXIT_CONFIG)
    except RankLost as failure:
        end.after_ranks(failure)
    # The model is never freed: freeze it, so garbage collection between steps does not traverse it.
    gc.collect()
    gc.freeze()
    inbound = context.socket(zmq.PULL)
    inbound.set_hwm(pipes.HIGH_WATER)
    inbound.connect(pipes.to_core(options.run_dir, options.name))
    threading.Thread(target=vital(lambda: _receive(inbound, core)), name="inbox", daemon=True).start()
    outbox.put(ready)
    code = run_to_end(core, outbox, end)
    # Exit without joining threads: they may still block in zmq, and all messages that matter have been sent.
    sys.stdout.flush()
    os._exit(code)


class End:
    """The end of a core that fails: the front is told the first reason, once. A rank's own reason goes first: what the
    others notice of its end only follows from it."""

    def __init__(self, outbox: Outbox, leave: Callable[[int], NoReturn] = os._exit) -> None:
        self._outbox = outbox
        self._leave = leave
        self._lock = threading.Lock()

    def of_rank(self, reason: str, is_final: bool) -> None:
        """A rank has ended. `is_final`: a restart would not help."""
        self.tell(StartRefused(reason) if is_final else Broken(reason), EXIT_CONFIG if is_final else 1)

    def after_ranks(self, failure: RankLost) -> NoReturn:
        """Other ranks cannot be reached: one of them has ended, which is told first, or none has."""
        time.sleep(_RANK_S)
        self.tell(Broken(str(failure)), 1)

    def tell(self, word: Broken | StartRefused, code: int) -> NoReturn:
        """End the process."""
        # Never released: others that fail now wait for the end.
        self._lock.acquire()
        self._outbox.put(word)
        self._outbox.close()
        sys.stderr.flush()
        self._leave(code)


def run_to_end(core: Core, outbox: Outbox, end: End) -> int:
    """Run steps until shutdown, or until one fails: then the front is told why. Returns the exit code."""
    try:
        core.run()
    except RankLost as failure:
        end.after_ranks(failure)
    except Exception as failure:
        logging.exception("the engine ends")
        outbox.put(Broken(reason_of(failure)))
        outbox.close()
        return 1
    core.close()
    outbox.close()
    return 0


def _receive(socket: zmq.Socket[bytes], core: Core) -> None:
    decode = msgspec.msgpack.Decoder(ToCore).decode
    while True:
        core.receive(decode(socket.recv()))
