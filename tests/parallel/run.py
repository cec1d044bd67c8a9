"""Parity of engines over several processes with one process, and deaths of single ranks. See scripts/try-parallel."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil

from pdctl.control_api import MeasuredProcess
from tests.parallel.widths import MATRIX, SINGLE, Answers, Ask, Width, answers, asks, service_of
from tests.service import Engine, Service, last_exit_of, pid_of, wait_until

VOCABULARY = {"sample:tiny-qwen3": 300, "sample:gemma-3-270m": 200_000}
TOKENS = 16
# Streams that run while a rank dies are longer.
LONG = 160
# Of which widths ranks are killed.
KILLED = [
    Width(2, 1), Width(1, 2), Width(2, 2, transport="mooncake"), Width(1, 1, prefill_stages=2, decode_stages=2),
    Width(1, 1, prefill_stripes=2), Width(2, 1, transport="auto", apart=True),
]  # fmt: skip


@dataclass
class Count:
    """What was compared, and what did not hold."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    checks: int = 0
    broken: list[str] = field(default_factory=list)
    reclaims: list[float] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether everything did."""
        return bool(self.answers) and not self.wrong and not self.broken

    def compare(self, what: str, found: Answers, expected: Answers) -> None:
        """Each answer with the one of a single process."""
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            self.answers += 1
            if one != other:
                self.wrong.append(f"{what}: answer {number} is {one}, not {other}")

    def check(self, what: str, holds: bool) -> None:
        """One promise."""
        self.checks += 1
        if not holds:
            self.broken.append(what)


def parity(count: Count, width: Width, model: str, asked: list[Ask], expected: Answers) -> None:
    """The answers of a service of these widths; afterwards every block is free and every lease has ended."""
    with service_of(width, model) as service:
        count.compare(str(width), answers(service, asked), expected)
        if width.keeps:
            count.compare(f"{width}, again", answers(service, asked), expected)
            for engine in service.engines():
                state = service.engine_state(engine.name)["counters"]
                back = {tier: state[f"{tier}_loaded"] for tier in ("host", "store")}
                came = sum(back.values()) > 0 or engine.role == "decode"
                count.check(f"{width}: {engine.name} has blocks back: {back}", came)
        service.idle()
        count.check(f"{width}: blocks and leases are back", True)
        if width.decode:
            used = {link.transport for link in service.status().links}
            wanted = {"cuda_ipc" if width.transport == "auto" else width.transport}
            count.check(f"{width}: KV moves by {used}", used == wanted)
            decodes = [engine.name for engine in service.engines() if engine.role == "decode"]
            count.check(f"{width}: {decodes} decode", len(decodes) == width.data_parallel)
            moved = sum(service.engine_state(name)["transfers"]["hand_overs"] for name in decodes)
            all_of_them = (2 if width.keeps else 1) * len(asked)
            count.check(f"{width}: {moved} of {all_of_them} prompts were handed over", moved == all_of_them)
    sys.stdout.write(f"{width}: {len(asked)} answers\n")
    sys.stdout.flush()


def kills(count: Count, width: Width, model: str, wanted: list[Ask], expected: Answers, rounds: int, seed: int) -> None:
    """Kill one process of an engine in the middle of four streams, again and again."""
    chance = random.Random(seed)
    with service_of(width, model) as service:
        for number in range(rounds):
            victim = chance.choice(service.engines())
            rank = chance.randrange(width.prefill_ranks if victim.role == "prefill" else width.decode_ranks)
            chosen = chance.sample(range(len(wanted)), 4)
            what = f"{width}, {victim.name} rank {rank} killed"
            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(service.stream, wanted[at].prompt, **wanted[at].options) for at in chosen]
                time.sleep(chance.uniform(0.0, 0.4))
                os.kill(ranks(victim)[rank], signal.SIGKILL)
                found = [_tokens(one) for one in running]
            count.compare(what, found, [expected[at] for at in chosen])
            _recovered(count, service, victim, rank, what)
            sys.stdout.write(f"{number + 1}: {what}\n")
            sys.stdout.flush()


def reclaim(count: Count, width: Width, model: str, wanted: list[Ask]) -> None:
    """How long KV stays leased to a decode engine of which a process has died."""
    with service_of(width, model) as service:
        prefill, decode = Engine(service, "prefill-0"), Engine(service, "decode-0")
        before = service.process("decode-0")
        for _ in range(4):
            given = prefill.hold("a prompt that nobody reads " * 4)
            prefill.lease("claim", given, decode.holder)
        count.check("four leases are held", len(prefill.state()["leases"]) == 4)
        began = time.monotonic()
        os.kill(ranks(before)[-1], signal.SIGKILL)
        wait_until(lambda: not prefill.state()["leases"], what="the leases to end")
        count.reclaims.append(time.monotonic() - began)
        service.restarted(before)
        service.idle()
    sys.stdout.write(f"{width}: four leases of a dead decode engine ended after {count.reclaims[-1]:.2f} s\n")
    sys.stdout.flush()


def ranks(engine: MeasuredProcess) -> list[int]:
    """The processes that share an engine's model: its core, then the others in their order."""
    [core] = psutil.Process(pid_of(engine)).children()
    return [core.pid, *(child.pid for child in sorted(core.children(), key=_rank))]


def _rank(process: psutil.Process) -> int:
    words = process.cmdline()
    return int(words[words.index("--rank") + 1])


def _tokens(running: Future[dict[str, object]]) -> list[int]:
    found = running.result(timeout=600)["token_ids"]
    assert isinstance(found, list)
    return found


def _recovered(count: Count, service: Service, victim: MeasuredProcess, rank: int, what: str) -> None:
    """The engine is back, as wide as before, with a reason for its end; nothing is leased, and no process is left."""
    after = service.restarted(victim)
    service.healthy()
    service.idle()
    reason = last_exit_of(after).reason
    expected = f"rank {rank} was killed by SIGKILL" if rank else "the core process ended: killed by SIGKILL"
    count.check(f"{what}: the reason is {reason!r}", expected in reason)
    wanted = {pid for engine in service.engines() for pid in ranks(engine)}
    there = {p.pid for p in service.run.processes() if {"core", "rank"} & set(p.cmdline()[3:4])}
    count.check(f"{what}: processes {there - wanted} are left", there == wanted)


def main() -> int:
    """Run everything. Returns 0 only if all of it held."""
    parser = argparse.ArgumentParser(prog="scripts/try-parallel")
    parser.add_argument("--model", choices=sorted(VOCABULARY), default="sample:tiny-qwen3")
    parser.add_argument("--kills", type=int, default=12, help="of each width; 0: only parity")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one width of the matrix")
    given = parser.parse_args()
    count = Count()
    wanted = asks(VOCABULARY[given.model], TOKENS)
    long = [ask._replace(options={**ask.options, "max_tokens": LONG}) for ask in wanted]
    with service_of(SINGLE, given.model) as service:
        expected, expected_long = answers(service, wanted), answers(service, long) if given.kills else []
    variety = sum(len(set(tokens)) for tokens in expected) / len(expected)
    count.check(f"answers have {variety:.1f} different tokens", variety > TOKENS / 3)
    for width in MATRIX if given.only is None else [MATRIX[given.only]]:
        parity(count, width, given.model, wanted, expected)
    for width in KILLED if given.kills else []:
        kills(count, width, given.model, long, expected_long, given.kills, given.seed)
    for width in (Width(1, 1), Width(2, 2)) if given.kills else ():
        reclaim(count, width, given.model, wanted)
    for line in (*count.wrong, *count.broken):
        sys.stdout.write(f"did not hold: {line}\n")
    sys.stdout.write(
        f"{count.answers} answers, {len(count.wrong)} wrong; {count.checks} checks, {len(count.broken)} broken\n"
    )
    return 0 if count.held else 1


if __name__ == "__main__":
    sys.exit(main())
