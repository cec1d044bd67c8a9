"""The core process: loads the model, reports that it is ready, runs steps."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading

import msgspec
import torch
import zmq

from pdctl.engine.cache.memory import NoMemory
from pdctl.engine.core.build import build
from pdctl.engine.core.faults import reason_of
from pdctl.engine.core.loop import Core
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.ipc import pipes
from pdctl.engine.ipc.messages import Broken, StartRefused, ToCore
from pdctl.engine.lifeline import die_with_parent, vital
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.options import EngineOptions
from pdctl.engine.transfer import TransferError
from pdctl.net.serving import LOG_FORMAT
from pdctl.wire import EXIT_CONFIG


def main(options: EngineOptions) -> int:
    """Load the model, report that it is ready, run steps. Returns the exit code."""
    die_with_parent(signal.SIGKILL, options.front_pid)
    # The front decides when the core ends; Ctrl-C in the terminal must not interrupt a step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox = Outbox(pipes.from_core(options.run_dir, options.name))
    try:
        core, ready = build(options, outbox)
    except (ModelRefused, NoMemory, TransferError, torch.OutOfMemoryError) as failure:
        outbox.put(StartRefused(str(failure)))
        outbox.close()
        return EXIT_CONFIG
    # The model is never freed: freeze it, so garbage collection between steps does not traverse it.
    gc.collect()
    gc.freeze()
    inbound = context.socket(zmq.PULL)
    inbound.set_hwm(pipes.HIGH_WATER)
    inbound.connect(pipes.to_core(options.run_dir, options.name))
    threading.Thread(target=vital(lambda: _receive(inbound, core)), name="inbox", daemon=True).start()
    outbox.put(ready)
    code = run_to_end(core, outbox)
    # Exit without joining threads: they may still block in zmq, and all messages that matter have been sent.
    sys.stdout.flush()
    os._exit(code)


def run_to_end(core: Core, outbox: Outbox) -> int:
    """Run steps until shutdown, or until one fails: then the front is told why. Returns the exit code."""
    try:
        core.run()
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
