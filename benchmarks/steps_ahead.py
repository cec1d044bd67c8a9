"""Decoding with and without steps launched ahead (`schedule_ahead`), through the core's own loop.

    python -m benchmarks.steps_ahead [--model gemma-3-270m] [--batches 1,8,16] [--rounds 3] [--tokens 64]

For each batch size: tokens per second both ways by turns, and the part of a step in which the device does not compute
(everything but the model and the sampling). Other processes on the same cores change the figures: compare the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import msgspec
import torch

from benchmarks.cpu_speed import _runner
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.core.inbox import Inbox
from pdctl.engine.core.loop import Core, CoreEvent
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.executor import Launched
from pdctl.engine.executor.launches import Launches, Step
from pdctl.engine.handover.puller import Puller
from pdctl.engine.ipc.messages import FromCore, Sampling, Shutdown, StepDone, Submit
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.ahead import LAUNCHED
from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root

_PROMPT = 32


class Decoded(NamedTuple):
    """One run. `idle`: the part of the time in which the model did not compute; `ahead`: of the steps, those that were
    launched while another one computed."""

    tokens_per_s: float
    idle: float
    ahead: float


class _Sent:
    """Encodes messages, as the way to the front does, and notes when the batch decodes and when it has ended."""

    def __init__(self, wanted: int, tokens: int) -> None:
        self.first = self.last = 0.0
        self.steps = 0
        self.ended = threading.Event()
        self._encode = msgspec.msgpack.Encoder().encode
        self._left = wanted
        self._started: set[str] = set()
        self._wanted = wanted
        self._tokens = tokens

    def put(self, message: FromCore) -> None:
        """See Outbox.put."""
        self._encode(message)
        if not isinstance(message, StepDone):
            return
        now = time.perf_counter()
        self.steps += bool(self.first)
        for token in message.tokens:
            self._started.add(token.request_id)
            self._left -= token.finish_reason is not None
        if not self.first and len(self._started) == self._wanted:
            self.first = now
        if not self._left and not self.ended.is_set():
            self.last = now
            self.ended.set()


class _Executor:
    """See Executor; one pool, which nobody reads."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def launch(self, batch: list[Slice], after: Launched | None = None) -> Launched:
        """See Executor.launch."""
        return self._launches.launch(batch, cast(Step | None, after))

    def publish(self, block_ids: Sequence[int]) -> None:
        """See Executor.publish."""

    def close(self) -> None:
        """See Executor.close."""
        self._launches.close()


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps_ahead")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--attention", default="native", choices=["native", "gather"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = locate_model(f"sample:{options.model}", cache_root()).path
    runner = _runner(path, torch.float32, options.attention)
    sys.stdout.write(f"{options.model}, {options.tokens} tokens\n")
    sys.stdout.write("batch  waits tok/s  idle  ahead tok/s  idle  ratio  launched\n")
    for batch in map(int, options.batches.split(",")):
        found: dict[bool, list[Decoded]] = {False: [], True: []}
        for _ in range(options.rounds):
            for ahead in (False, True):
                found[ahead].append(_decode(runner, batch, options.tokens, ahead))
        _row(batch, found[False], found[True])
    return 0


def _row(batch: int, waits: list[Decoded], ahead: list[Decoded]) -> None:
    def middle(runs: list[Decoded], of: Callable[[Decoded], float]) -> float:
        return statistics.median(map(of, runs))

    rates = [middle(runs, lambda run: run.tokens_per_s) for runs in (waits, ahead)]
    idle = [middle(runs, lambda run: run.idle) for runs in (waits, ahead)]
    sys.stdout.write(
        f"{batch:5}  {rates[0]:11.1f}  {idle[0]:4.0%}  {rates[1]:11.1f}  {idle[1]:4.0%}  {rates[1] / rates[0]:5.2f}  "
        f"{middle(ahead, lambda run: run.ahead):8.0%}\n"
    )
    sys.stdout.flush()


def _decode(runner: ModelRunner, batch: int, tokens: int, ahead: bool) -> Decoded:
    executor = _Executor(Launches(runner, in_thread=ahead))
    limits = Limits(batch, 512, 2048, runner.pool.block_size, frozenset())
    scheduler = Scheduler(limits, BlockAllocator(runner.pool.num_blocks))
    sent = _Sent(batch, tokens)
    inbox: Inbox[CoreEvent] = Inbox()
    for number in range(batch):
        prompt = [5 + (31 * number + 7 * at) % 370 for at in range(_PROMPT)]
        inbox.put(Submit(f"{number}", prompt, _PROMPT, Sampling(tokens, temperature=0.0, ignore_eos=True)))
    core = Core(
        scheduler, executor, runner.grammars, cast(Puller, None), inbox, cast(Outbox, sent), schedules_ahead=ahead
    )
    busy = _timed(runner, sent)
    loop = threading.Thread(target=core.run)
    loop.start()
    if not sent.ended.wait(600):
        raise TimeoutError("the batch did not end")
    inbox.put(Shutdown())
    loop.join(60)
    executor.close()
    seconds = sent.last - sent.first
    launched = scheduler.ahead.asked.get(LAUNCHED, 0) / max(1, sent.steps)
    return Decoded(batch * (tokens - 1) / seconds, 1 - busy() / seconds, launched)


def _timed(runner: ModelRunner, sent: _Sent) -> Callable[[], float]:
    """Note how long the device's halves of the batch's decode steps take; the returned function gives their sum."""
    spent: list[tuple[float, float]] = []
    start = ModelRunner.start.__get__(runner)

    def timed(*args: object) -> object:
        began = time.perf_counter()
        found = start(*args)
        spent.append((began, time.perf_counter()))
        return found

    runner.start = timed  # type: ignore[method-assign,assignment]
    return lambda: sum(end - began for began, end in spent if began >= sent.first and end <= sent.last)


if __name__ == "__main__":
    raise SystemExit(main())
