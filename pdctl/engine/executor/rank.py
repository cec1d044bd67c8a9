"""A process that is one rank of an engine, but not its first: it loads its part of the model, and then computes what
the first rank does, with the same inputs."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import msgspec
import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory, NoMemory
from pdctl.engine.cache.shards import local
from pdctl.engine.executor.exported import export
from pdctl.engine.executor.faults import reason_of
from pdctl.engine.executor.gpu_memory import free_memory, room_after
from pdctl.engine.executor.pipe import (
    Dense,
    Failed,
    Here,
    Join,
    Leave,
    Loaded,
    Measure,
    Pipe,
    PipeClosed,
    Pools,
    Refused,
    Room,
    Started,
    Step,
    ToRank,
    own_device,
)
from pdctl.engine.executor.ranks import STEP_S, how_loaded, width_of
from pdctl.engine.executor.single import load_part
from pdctl.engine.lifeline import die_with_parent
from pdctl.engine.model.loading import LoadedModel, ModelRefused, dense_logits
from pdctl.engine.model.parallel import RankLost
from pdctl.engine.model.parallel.group import Ranks
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.options import EngineOptions
from pdctl.net.serving import LOG_FORMAT
from pdctl.wire import EXIT_CONFIG, Manifest, Part


def main(options: EngineOptions) -> int:
    """Follow the first rank until it ends the engine. Returns the exit code."""
    die_with_parent(signal.SIGKILL, options.front_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    pipe = Pipe(socket.socket(fileno=options.rank_fd), None)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.cpus_of_rank:
        os.sched_setaffinity(0, options.cpus_of_rank)
    code = _run(options, pipe)
    sys.stdout.flush()
    # Without joining threads: those of the group may still wait for ranks that are gone.
    os._exit(code)


def _run(options: EngineOptions, pipe: Pipe) -> int:
    """Load and follow; a failure is told before the process ends. Returns the exit code."""
    runner = None
    try:
        pipe.send(Here())
        runner = _started(options, pipe)
        _follow(runner, pipe)
    except (ModelRefused, NoMemory) as failure:
        return _said(pipe, Refused(str(failure)), EXIT_CONFIG)
    except PipeClosed:
        # The first rank is gone; so will this process be.
        return 1
    except RankLost as failure:
        return _said(pipe, Failed(str(failure)), 1)
    except Exception as failure:
        logging.exception("the rank ends")
        in_a_step = runner is not None
        return _said(pipe, Failed(reason_of(failure) if in_a_step else f"{type(failure).__name__}: {failure}"), 1)
    return 0


def _said(pipe: Pipe, word: Refused | Failed, code: int) -> int:
    try:
        pipe.send(word)
    except PipeClosed:
        logging.info("%s", word.reason)
    return code


def _started(options: EngineOptions, pipe: Pipe) -> ModelRunner:
    """See _loaded. What does not fit now will not fit the next time."""
    try:
        return _loaded(options, pipe)
    except torch.OutOfMemoryError as failure:
        raise ModelRefused(str(failure)) from failure


def _loaded(options: EngineOptions, pipe: Pipe) -> ModelRunner:
    """This rank's part of the model, over the pool that the first rank has made for it."""
    device = own_device(options.device, options.rank)
    join = _next(pipe)[0]
    assert isinstance(join, Join), join
    group = Ranks(options.rank, width_of(options), Path(join.rendezvous), STEP_S, device)
    loaded, chosen = load_part(options, device, group)
    how = how_loaded(loaded.dtype, chosen.backend.name)
    pipe.send(Loaded(how, loaded.shapes, loaded.max_positions, free_memory(device)))
    # The shapes are those of this rank's layers already.
    manifest = local(_manifest(options, loaded), Part(loaded.part.rank, loaded.part.ranks))

    def runner_over(pool: KvPool) -> ModelRunner:
        return ModelRunner(loaded, pool, device, backend=chosen.backend, group=group)

    message, fd = _next(pipe)
    if isinstance(message, Measure):
        small = partial(KvPool, manifest, message.num_blocks, None, device)
        pipe.send(Room(room_after(options, device, lambda: _one_step(pipe, runner_over(small())))))
        message, fd = _next(pipe)
    assert isinstance(message, Pools), message
    pool = KvPool(manifest, message.num_blocks, _memory(options, message, manifest, fd), device)
    gc.collect()
    gc.freeze()
    pipe.send(Started(export(pool) if message.is_apart else ""))
    return runner_over(pool)


def _one_step(pipe: Pipe, runner: ModelRunner) -> None:
    step = _next(pipe)[0]
    assert isinstance(step, Step), step
    runner.follow(step.shape, step.data, step.gives_back)


def _memory(options: EngineOptions, pools: Pools, manifest: Manifest, fd: int | None) -> Memory | None:
    """What is shared with the core; None for a pool that is apart."""
    if pools.is_apart:
        return None
    if fd is None:
        # Memory of its own would be a pool that no other engine can read.
        raise RankLost("the pool's memory did not come with its message: no descriptor was free")
    return Memory(pools.num_blocks * block_bytes(manifest), options.epoch, fd)


def _manifest(options: EngineOptions, loaded: LoadedModel) -> Manifest:
    return Manifest(loaded.fingerprint, loaded.dtype, options.block_size, loaded.shapes)


def _follow(runner: ModelRunner, pipe: Pipe) -> None:
    while True:
        match _next(pipe)[0]:
            case Step(shape, data, gives_back):
                runner.follow(shape, data, gives_back)
            case Dense(token_ids, implementation):
                dense_logits(runner.loaded, torch.tensor(token_ids), implementation)
            case Leave():
                return
            case message:
                raise AssertionError(f"unexpected {message}")


_decoder = msgspec.msgpack.Decoder(ToRank)


def _next(pipe: Pipe) -> tuple[ToRank, int | None]:
    data, fd = pipe.receive()
    return _decoder.decode(data), fd
